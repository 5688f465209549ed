"""RegMean++ against whole models that are put together anew for each block, and plain closed forms."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeflow.errors import Interrupted, MachineError, RecipeError
from mergeflow.ops.regmean_pp import RegMeanPP
from mergeflow.recipe.grammar import DataSource
from mergeflow.stages.regmean_pp import Candidate, MergeJob, run

ALPHA = 0.9


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def merge(tmp_path: Path, pairs: Sequence[tuple[str, DataSource]], **more: Any) -> dict[str, Tensor]:
    """What is written for these folders and data."""
    written: list[dict[str, Tensor]] = []

    def write(tensors: Mapping[str, Tensor], files: Mapping[str, bytes], metadata: Mapping[str, str]) -> None:
        written.append(dict(tensors))

    weights = more.pop("weights", [1.0] * len(pairs))
    (tmp_path / "work").mkdir(exist_ok=True)
    given = {"weight": weights, "batch_size": more.pop("batch_size", 4), "alpha": more.pop("alpha", ALPHA)}
    job = MergeJob(
        RegMeanPP(**given),
        tuple(Candidate(tmp_path / name, told) for name, told in pairs),
        tmp_path,
        tmp_path / "work",
        write,
        **more,
    )
    run(job)
    return written[0]


def closed_form(weights: Sequence[Tensor], rows: Sequence[Tensor], shares: Sequence[float], alpha: float) -> Tensor:
    """(sum c G~)^+ sum c G~ W^T around the mean, from the inputs themselves, in float64."""
    mean = sum(c * w for c, w in zip(shares, weights, strict=True)) / sum(shares)
    left, right = torch.zeros(()), torch.zeros(())
    for w, x, c in zip(weights, rows, shares, strict=True):
        gram = x.T @ x / len(x)
        gram = c * (alpha * gram + (1 - alpha) * gram.diag().diag())
        left, right = left + gram, right + gram @ (w - mean).T
    return mean + torch.linalg.lstsq(left, right, driver="gelsd").solution.T


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- rows of numbers

CONFIG = {
    "model_type": "mergeflow_mlp", "architectures": ["MergeflowMLP"], "input_size": 6, "hidden_size": 8,
    "num_hidden_layers": 3, "num_labels": 4,
}  # fmt: skip


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Two models and rows of their own, float64."""
    from safetensors.torch import save_file

    from mergeflow.stages.mlp import MergeflowMLP

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = MergeflowMLP(CONFIG).double()
        for one in model.parameters():
            one.data.add_(0.3 * torch.randn_like(one))
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        write_lines(tmp_path / f"{name}.jsonl", [{"x": x.tolist()} for x in numbers(seed)])
    return tmp_path


def numbers(seed: int) -> Tensor:
    return torch.randn(30, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + seed


def told(name: str) -> DataSource:
    return DataSource(path=f"{name}.jsonl", features="x")


def load(folder: Path) -> nn.Module:
    from mergeflow.stages.models import load_model, open_folder

    return load_model(open_folder(folder))


@pytest.mark.parametrize(("shares", "alpha"), [((1.0, 1.0), 0.9), ((1.0, 3.0), 0.5)])
def test_each_layer_is_solved_on_what_the_merged_layers_below_give(
    digits: Path, shares: tuple[float, float], alpha: float
) -> None:
    found = merge(digits, [("a", told("a")), ("b", told("b"))], weights=shares, alpha=alpha)
    states = [load(digits / name).state_dict() for name in "ab"]
    merged = {n: sum(c * s[n] for c, s in zip(shares, states, strict=True)) / sum(shares) for n in states[0]}
    rows = [numbers(0), numbers(1)]
    for layer in range(3):
        name = f"blocks.{layer}.linear.weight"
        merged[name] = closed_form([s[name] for s in states], rows, shares, alpha)
        for side, x in enumerate(rows):
            x = x @ merged[name].T + merged[f"blocks.{layer}.linear.bias"]
            norm = [merged[f"blocks.{layer}.norm.{part}"] for part in ("weight", "bias")]
            rows[side] = nn.functional.gelu(nn.functional.layer_norm(x, x.shape[1:], *norm))
    merged["head.weight"] = closed_form([s["head.weight"] for s in states], rows, shares, alpha)
    assert found.keys() == merged.keys()
    for name, one in merged.items():
        torch.testing.assert_close(found[name], one, rtol=1e-7, atol=1e-9)


def test_equal_models_are_given_back(digits: Path) -> None:
    found = merge(digits, [("a", told("a")), ("a", told("b"))])
    for name, one in load(digits / "a").state_dict().items():
        torch.testing.assert_close(found[name], one, rtol=1e-12, atol=1e-14)


def test_only_keeps_the_mean_of_what_it_leaves_out(digits: Path) -> None:
    pairs = [("a", told("a")), ("b", told("b"))]
    found, whole = merge(digits, pairs, only=("blocks.0.*",)), merge(digits, pairs)
    a, b = (load(digits / name).state_dict() for name in "ab")
    assert torch.equal(found["blocks.0.linear.weight"], whole["blocks.0.linear.weight"])
    for name in found.keys() - {"blocks.0.linear.weight"}:
        torch.testing.assert_close(found[name], (a[name] + b[name]) / 2, rtol=1e-14, atol=1e-16)
    assert not torch.allclose(found["head.weight"], whole["head.weight"])


def test_batches_and_memory_change_nothing(digits: Path) -> None:
    pairs = [("a", told("a")), ("b", told("b"))]
    whole = merge(digits, pairs, batch_size=30)
    for more in ({"batch_size": 7}, {"memory": 30_000}):
        found = merge(digits, pairs, **more)
        for name, one in whole.items():
            torch.testing.assert_close(found[name], one, rtol=1e-9, atol=1e-11)
    assert not list((digits / "work").glob("outputs-*"))


def test_progress_comes_to_its_total_and_a_stop_ends_the_run(digits: Path) -> None:
    done: list[tuple[int, int]] = []
    pairs = [("a", told("a")), ("b", told("b"))]
    merge(digits, pairs, progress=lambda what, count, total: done.append((count, total)))
    assert sum(count for count, _ in done) == done[-1][1] == 2 * 16 * 4
    stop = threading.Event()
    with pytest.raises(Interrupted):
        merge(digits, pairs, stop=stop, progress=lambda *one: stop.set())


def test_what_cannot_be_merged_is_refused(digits: Path) -> None:
    from safetensors.torch import save_file

    from mergeflow.stages.mlp import MergeflowMLP

    pairs = [("a", told("a")), ("b", told("b"))]
    with pytest.raises(RecipeError, match="two models or more"):
        merge(digits, pairs[:1])
    with pytest.raises(RecipeError, match="the mean divides by the sum of the weights, which is 0"):
        merge(digits, pairs, weights=[0.0, 0.0])
    with pytest.raises(MachineError, match="2 models and the merged one take"):
        merge(digits, pairs, memory=1000)
    other = {**CONFIG, "num_labels": 5}
    (digits / "c").mkdir()
    save_file(MergeflowMLP(other).state_dict(), digits / "c" / "model.safetensors", metadata={"format": "pt"})
    (digits / "c" / "config.json").write_text(json.dumps(other))
    with pytest.raises(RecipeError, match=r"'head.bias' is \[4\] in the first model, and \[5\] in c"):
        merge(digits, [("a", told("a")), ("c", told("a"))])


# ---- language models

WORDS = [f"w{i}" for i in range(28)]


def save_language_model(folder: Path, model: Any) -> None:
    """A model with a tokenizer of 28 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS])}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    model.save_pretrained(folder)


def documents(seed: int) -> list[Tensor]:
    """Token ids of texts of several lengths."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 30, (1, length), generator=source) for length in (9, 5, 11, 7, 6, 8)]


def llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.4, tie_word_embeddings=False,
        bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2(seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2, initializer_range=0.4, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def inputs_of(model: nn.Module, names: Sequence[str], texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the layers of these weights read in a whole model, one text after the other, unpadded."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for text in texts:
            model(input_ids=text, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_decoder_is_merged_as_whole_models_put_together_for_each_block_would_be(
    tmp_path: Path, make: Callable[[int], Any]
) -> None:
    pair = [make(0), make(1)]
    for number, (name, model) in enumerate(zip("ab", pair, strict=True)):
        save_language_model(tmp_path / name, model)
        write_lines(
            tmp_path / f"{name}.jsonl",
            [{"text": " ".join(WORDS[i - 2] for i in text[0].tolist())} for text in documents(number)],
        )
    found = merge(tmp_path, [(name, DataSource(path=f"{name}.jsonl")) for name in "ab"])
    own = [dict(model.named_parameters()) for model in pair]
    merged = copy.deepcopy(pair[0]).requires_grad_(False)
    state = dict(merged.named_parameters())
    for name, one in state.items():
        one.copy_((own[0][name] + own[1][name]) / 2)
    turned = make is gpt2
    stack = "transformer.h" if turned else "model.layers"
    layers = [n for n, one in state.items() if n.startswith(stack) and one.dim() == 2]
    parts = [f"{stack}.{i}." for i in range(2 if turned else 3)] + ([] if turned else ["lm_head."])
    for part in parts:
        names = [n for n in [*layers, "lm_head.weight"] if n.startswith(part)]
        rows = []
        for side, mine in enumerate(own):
            hybrid = copy.deepcopy(merged)
            for name, one in hybrid.named_parameters():
                # What comes behind the blocks is of one piece: the last norm feeds the head.
                if name.startswith(part) or (part == "lm_head." and not name.startswith((stack, "model.embed"))):
                    one.data.copy_(mine[name])
            rows.append(inputs_of(hybrid, names, documents(side)))
        for name in names:
            pieces = [mine[name].detach().T if turned else mine[name].detach() for mine in own]
            solved = closed_form(pieces, [one[name] for one in rows], (1.0, 1.0), ALPHA)
            state[name].copy_(solved.T if turned else solved)
    assert set(found) == set(state)
    for name, one in state.items():
        torch.testing.assert_close(found[name], one, rtol=1e-6, atol=1e-7, msg=name)


def test_integers_that_are_not_equal_are_refused_and_not_taken_from_the_first(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for number, name in enumerate("ab"):
        save_language_model(tmp_path / name, llama(number))
        write_lines(tmp_path / f"{name}.jsonl", [{"text": "w1 w2 w3"}])
        path = tmp_path / name / "model.safetensors"
        save_file({**load_file(path), "steps": torch.tensor([1])}, path, metadata={"format": "pt"})
    pairs = [(name, DataSource(path=f"{name}.jsonl")) for name in "ab"]
    assert merge(tmp_path, pairs)["steps"].tolist() == [1]
    save_file({**load_file(path), "steps": torch.tensor([2])}, path, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="steps: integer and boolean tensors are never computed on"):
        merge(tmp_path, pairs)
