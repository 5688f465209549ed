"""The Fisher diagonal against a double loop over examples and classes, closed forms, and what must not change it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeflow.errors import InputError, Interrupted, MachineError, NumericError, RecipeError
from mergeflow.ops.statistics import FisherDiag
from mergeflow.recipe.grammar import DataSource
from mergeflow.stages import StageJob, predict, run_stage
from mergeflow.stages.fisher import Batch, Diagonal, bytes_beside, fisher_diagonal

D, C, N = 6, 5, 24


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Mlp(nn.Module):
    """A classifier whose forward takes `x`."""

    def __init__(self, classes: int = C, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(D, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, classes)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.nn.functional.gelu(self.norm(self.first(x))))


class Branching(Mlp):
    """One that looks at values, as routers do, which vmap cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if bool(x.sum() > 0) else x)


def rows(count: int = N, size: int | None = None, classes: int = C, seed: int = 1) -> list[Batch]:
    """Examples with labels, in batches of `size`."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, D, generator=source, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=source)
    size = size or count
    return [{"x": x[i : i + size], "labels": labels[i : i + size]} for i in range(0, count, size)]


def slow_fisher(
    model: nn.Module, examples: Sequence[Batch], weigh: Callable[[Tensor, Batch], Sequence[tuple[float, Tensor]]]
) -> dict[str, Tensor]:
    """1/N sum_x sum_j w_j (d l_j / d theta)^2 by one backward pass each, for the (w_j, l_j) of each example."""
    named = dict(model.named_parameters())
    for one in named.values():
        one.requires_grad_(True)
    sums = {name: torch.zeros_like(one) for name, one in named.items()}
    for example in examples:
        output = model(**{name: value for name, value in example.items() if name != "labels"})
        logits = output if isinstance(output, Tensor) else output.logits
        for weight, log_p in weigh(torch.log_softmax(logits[0], -1), example):
            for name, gradient in zip(
                named,
                torch.autograd.grad(log_p, list(named.values()), retain_graph=True, allow_unused=True),
                strict=True,
            ):
                if gradient is not None:
                    sums[name] += weight * gradient**2
    return {name: one / len(examples) for name, one in sums.items()}


def all_classes(log_p: Tensor, example: Batch) -> list[tuple[float, Tensor]]:
    return [(float(one.detach().exp()), one) for one in log_p]


def the_label(log_p: Tensor, example: Batch) -> list[tuple[float, Tensor]]:
    return [(1.0, log_p[int(example["labels"])])]


def next_tokens(log_p: Tensor, example: Batch) -> list[tuple[float, Tensor]]:
    """The summed log-probability of the labelled tokens, each at the place before it."""
    labels = example["labels"][0]
    return [(1.0, sum((log_p[i - 1, t] for i, t in enumerate(labels.tolist()) if i and t != -100), log_p[0, 0] * 0))]


def singles(batches: Sequence[Batch]) -> list[Batch]:
    return [
        {name: one[i : i + 1] for name, one in batch.items()} for batch in batches for i in range(len(batch["labels"]))
    ]


def same(found: Diagonal, expected: dict[str, Tensor], tolerance: float = 2e-7) -> None:
    """Equal to float32 rounding, relative to the largest element of each tensor."""
    assert found.tensors.keys() == expected.keys()
    for name, one in expected.items():
        assert found.tensors[name].dtype == torch.float32
        assert found.tensors[name].shape == one.shape
        largest = float(one.abs().max())
        assert largest > 0
        assert float((found.tensors[name].double() - one.double()).abs().max()) <= tolerance * largest, name


# ---- the definition


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("kind", [Mlp, Branching])
def test_the_expected_diagonal_is_that_of_a_loop_over_examples_and_classes(kind: type[Mlp], classes: int) -> None:
    model, data = kind(classes), rows(classes=classes)
    found = fisher_diagonal(model, data)
    assert found.estimator == "expected" and found.examples == N and found.dropped == 0
    assert found.gradients == "vmap" if kind is Mlp else found.gradients.startswith("loop (vmap cannot follow")
    same(found, slow_fisher(model, singles(data), all_classes))


@pytest.mark.parametrize("kind", [Mlp, Branching])
def test_the_empirical_diagonal_squares_the_gradient_at_the_label(kind: type[Mlp]) -> None:
    model, data = kind(), rows()
    same(fisher_diagonal(model, data, estimator="empirical"), slow_fisher(model, singles(data), the_label))


def test_a_logistic_regression_has_the_closed_form() -> None:
    torch.manual_seed(0)
    model = nn.Linear(D, 2).double()
    x = rows()[0]["x"]
    found = fisher_diagonal(model, [{"input": x}])
    p = model(x).softmax(-1)[:, 1:]
    expected = (p * (1 - p) * x**2).mean(0)
    same(found, {"weight": torch.stack([expected, expected]), "bias": (p * (1 - p)).mean(0).expand(2)})


def test_sure_models_keep_the_digits_of_small_probabilities() -> None:
    """1 - p is 1e-12 here, which float32 cannot tell from 0."""
    model = nn.Linear(1, 3).requires_grad_(False)
    model.weight.copy_(torch.tensor([[27.6], [0.0], [-30.0]]))
    model.bias.zero_()
    found = fisher_diagonal(model, [{"input": torch.ones(4, 1)}])
    p = torch.softmax(model.weight.double()[:, 0], -1)
    expected = p * torch.stack([p[1] + p[2], p[0] + p[2], p[0] + p[1]])
    torch.testing.assert_close(found.tensors["bias"].double(), expected, rtol=1e-6, atol=0)


def test_classes_without_probability_give_no_nan() -> None:
    model = nn.Linear(1, 4).requires_grad_(False)
    model.weight.zero_()
    model.bias.copy_(torch.tensor([-1e4, 0.0, -1e4, -2e4]))
    found = fisher_diagonal(model, [{"input": torch.ones(3, 1)}])
    assert torch.equal(found.tensors["bias"], torch.zeros(4)) and found.dropped == 0


def test_samples_come_to_the_expected_diagonal_and_a_seed_repeats_them() -> None:
    model, data = Mlp(), rows(8)
    exact = fisher_diagonal(model, data).tensors
    drawn = fisher_diagonal(model, data, estimator="sampled", samples=2000, seed=3).tensors
    for name, one in exact.items():
        assert float((drawn[name] - one).norm() / one.norm()) < 0.05, name
    few = [fisher_diagonal(model, data, estimator="sampled", samples=2, seed=seed).tensors for seed in (3, 3, 4)]
    assert all(torch.equal(few[0][name], few[1][name]) for name in exact)
    assert not all(torch.equal(few[0][name], few[2][name]) for name in exact)


# ---- what is not Fisher


def correlation(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    pair = torch.stack([torch.cat([one[name].flatten() for name in sorted(one)]) for one in (a, b)])
    return float(torch.corrcoef(pair.double())[0, 1])


def test_squares_of_whole_batches_leave_the_fisher_diagonal_the_larger_the_batch() -> None:
    model, data = Mlp(seed=2), rows(512, 100)
    exact = fisher_diagonal(model, data).tensors
    near = [
        correlation(fisher_diagonal(model, data, estimator="batch_hard", batch_size=size).tensors, exact)
        for size in (1, 16, 256)
    ]
    assert near[0] > near[1] + 0.02 and near[1] > near[2] + 0.02, near


@pytest.mark.parametrize("estimator", ["batch_hard", "batch_sqrt"])
def test_the_baselines_are_those_of_the_published_code(estimator: Any) -> None:
    model, data = Mlp(), rows(N, 7)
    found = fisher_diagonal(model, data, estimator=estimator, batch_size=10)
    assert found.gradients == "batches of 10" and found.examples == N
    x = torch.cat([batch["x"] for batch in data])
    sums = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    for start in range(0, N, 10):
        model.requires_grad_(True).zero_grad()
        log_p = model(x[start : start + 10]).log_softmax(-1)
        if estimator == "batch_hard":
            nn.functional.nll_loss(log_p, log_p.argmax(-1)).backward()
        else:
            (log_p.exp().detach().sqrt() * log_p).sum().backward()
        for name, one in model.named_parameters():
            sums[name] += one.grad**2  # type: ignore[operator]
    same(found, {name: one.detach() / (3 if estimator == "batch_hard" else N) for name, one in sums.items()})


def test_at_one_example_a_batch_of_the_likeliest_label_is_its_square() -> None:
    model, data = Mlp(), rows()
    likeliest = [{**batch, "labels": model(batch["x"]).argmax(-1)} for batch in data]
    one = fisher_diagonal(model, data, estimator="batch_hard", batch_size=1)
    same(one, {n: t.double() for n, t in fisher_diagonal(model, likeliest, estimator="empirical").tensors.items()})


# ---- transformers


def bert(classes: int = 3) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=classes, initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=12, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def texts(lengths: Sequence[int], vocab: int, *, width: int = 0, left: bool = False, seed: int = 5) -> Batch:
    """Random tokens, padded to one width with a token that also stands in texts."""
    source = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids, mask = torch.full((len(lengths), width), 7), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, None) if left else slice(length)
        ids[row, place] = torch.randint(vocab, (length,), generator=source)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def unpadded(batch: Batch) -> list[Batch]:
    """Each example alone, without its padding."""
    alone = []
    for row in range(len(batch["input_ids"])):
        kept = batch["attention_mask"][row] == 1
        alone.append({n: t[row : row + 1, kept] if t.dim() == 2 else t[row : row + 1] for n, t in batch.items()})
    return alone


@pytest.mark.parametrize("memory", [1 << 30, 1])
@pytest.mark.parametrize("estimator", ["expected", "empirical"])
def test_a_bert_classifier_has_the_diagonal_of_the_double_loop_and_padding_does_not_count(
    estimator: Any, memory: int
) -> None:
    model = bert().double()
    batch = {**texts([5, 9, 3, 7], 40, width=12), "labels": torch.tensor([0, 2, 1, 1])}
    batch["input_ids"][1, 2:5] = 3  # a token that stands in a text more than once
    found = fisher_diagonal(model, [batch], estimator=estimator, memory=memory)
    assert found.gradients.startswith("vmap" if memory > 1 else "loop (the memory") and found.tokens == 24
    slow = slow_fisher(model, unpadded(batch), all_classes if estimator == "expected" else the_label)
    assert "bert.embeddings.word_embeddings.weight" in slow
    rest = {name: one for name, one in slow.items() if float(one.abs().max()) > 1e-12}
    assert {name.rsplit(".", 1)[0][-3:] for name in slow.keys() - rest} <= {"key"}  # no softmax sees a key's bias
    same(Diagonal({n: found.tensors[n] for n in rest}, "expected", 4, 24, 0, "vmap"), rest, 1e-6)


def test_a_language_model_has_the_squares_of_whole_documents_with_its_tied_weights_once() -> None:
    model = gpt2().double()
    batch = texts([6, 9, 4], 30, width=11)
    labels = batch["input_ids"].clone()
    labels[1, :3] = -100  # a prompt
    found = fisher_diagonal(model, [{**batch, "labels": labels}], task="causal", estimator="empirical")
    assert "lm_head.weight" not in found.tensors and "transformer.wte.weight" in found.tensors
    slow = slow_fisher(model, unpadded({**batch, "labels": labels}), next_tokens)
    same(found, slow, 1e-6)


def test_a_model_of_two_texts_is_done_teacher_forced() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0
    )
    model = T5ForConditionalGeneration(config).eval().double()
    first, second = texts([5, 3, 5], 20, width=6), texts([2, 4, 2], 20, width=7, seed=6)
    batch = {
        **first,
        "decoder_input_ids": second["input_ids"],
        "decoder_attention_mask": second["attention_mask"],
        "labels": second["input_ids"].roll(-1, 1),
    }
    found = fisher_diagonal(model, [batch], task="seq2seq", estimator="empirical")

    def summed(log_p: Tensor, example: Batch) -> list[tuple[float, Tensor]]:
        return [(1.0, log_p[torch.arange(log_p.shape[0]), example["labels"][0]].sum())]

    alone = []
    for row, (a, b) in enumerate(((5, 2), (3, 4), (5, 2))):
        alone.append(
            {
                "input_ids": batch["input_ids"][row : row + 1, :a],
                "decoder_input_ids": batch["decoder_input_ids"][row : row + 1, :b],
                "labels": batch["labels"][row : row + 1, :b],
            }
        )
    assert found.tokens == 13
    same(found, slow_fisher(model, alone, summed), 1e-6)


def test_documents_without_labels_are_their_own() -> None:
    model, batch = gpt2().double(), texts([6, 9], 30)
    own = fisher_diagonal(model, [batch], task="causal", estimator="empirical")
    given = fisher_diagonal(model, [{**batch, "labels": batch["input_ids"]}], task="causal", estimator="empirical")
    assert all(torch.equal(own.tensors[name], one) for name, one in given.tensors.items())


@pytest.mark.parametrize("estimator", ["empirical", "sampled"])
def test_padding_and_the_size_of_micro_batches_change_nothing(estimator: Any) -> None:
    model = gpt2()
    lengths = [6, 9, 4, 7, 7]
    batch = texts(lengths, 30)
    ways: list[dict[str, Any]] = [
        {"batches": [batch]},
        {"batches": [texts(lengths, 30, width=12)]},
        {"batches": unpadded(batch)},
        {"batches": [batch], "memory": 1},
        {"batches": [batch], "memory": 100_000},
    ]
    found = [fisher_diagonal(model, task="causal", estimator=estimator, samples=2, seed=1, **way) for way in ways]
    assert found[0].gradients == "vmap" and "room for one" in found[3].gradients
    assert {one.tokens for one in found} == {sum(lengths)}
    for other in found[1:]:
        for name, one in found[0].tensors.items():
            assert float((other.tensors[name] - one).norm() / one.norm()) < 1e-6, name
    again = fisher_diagonal(model, **ways[0], task="causal", estimator=estimator, samples=2, seed=1)
    assert all(torch.equal(one, again.tensors[name]) for name, one in found[0].tensors.items())


def test_the_likelihood_of_tokens_is_summed_over_a_document() -> None:
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    model = BertForTokenClassification(config).eval().double()
    batch = texts([5, 8], 40, width=10)
    labels = torch.randint(3, (2, 10), generator=torch.Generator().manual_seed(0))
    labels[0, 1] = -100
    found = fisher_diagonal(model, [{**batch, "labels": labels}], task="tokens", estimator="empirical")

    def summed(log_p: Tensor, example: Batch) -> list[tuple[float, Tensor]]:
        return [(1.0, torch.stack([log_p[i, t] for i, t in enumerate(example["labels"][0].tolist()) if t >= 0]).sum())]

    slow = slow_fisher(model, unpadded({**batch, "labels": labels}), summed)
    rest = {name: one for name, one in slow.items() if float(one.abs().max()) > 1e-12}
    same(Diagonal({n: found.tensors[n] for n in rest}, "empirical", 2, 13, 0, "vmap"), rest, 1e-6)


# ---- which parameters, how far


def test_parameters_that_are_not_wanted_cost_and_change_nothing() -> None:
    model, data = Mlp(), rows()
    whole = fisher_diagonal(model, data).tensors
    part = fisher_diagonal(model, data, wanted=lambda name: name.startswith("last.")).tensors
    assert part.keys() == {"last.weight", "last.bias"}
    assert all(torch.equal(part[name], whole[name]) for name in part)
    with pytest.raises(RecipeError, match="no parameter"):
        fisher_diagonal(model, data, wanted=lambda name: False)


def test_progress_counts_examples_and_a_stop_ends_the_run() -> None:
    done: list[int] = []
    stop = threading.Event()

    def progress(count: int) -> None:
        done.append(count)
        if sum(done) >= 10:
            stop.set()

    with pytest.raises(Interrupted):
        fisher_diagonal(Mlp(), rows(N, 5), progress=progress, stop=stop)
    assert done == [5, 5]


# ---- bad input


@pytest.mark.parametrize("kind", [Mlp, Branching])
def test_an_example_with_nan_is_dropped_and_counted(kind: type[Mlp]) -> None:
    model = kind()
    clean = rows(1200, 50)
    x = clean[3]["x"].clone()
    x[7] = float("nan")
    broken = [*clean[:3], {**clean[3], "x": x}, *clean[4:]]
    kept = [*clean[:3], {n: torch.cat([t[:7], t[8:]]) for n, t in clean[3].items()}, *clean[4:]]
    found = fisher_diagonal(model, broken, estimator="empirical", total=1200)
    assert (found.dropped, found.examples) == (1, 1199)
    same(
        found, {name: one.double() for name, one in fisher_diagonal(model, kept, estimator="empirical").tensors.items()}
    )


@pytest.mark.parametrize("estimator", ["expected", "batch_hard"])
def test_too_many_nan_gradients_are_an_error(estimator: Any) -> None:
    data = rows(20)
    data[0]["x"][4] = float("inf")
    with pytest.raises(NumericError, match="NaN or infinite"):
        fisher_diagonal(Mlp(), data, estimator=estimator, batch_size=5)


def test_a_label_that_the_model_does_not_know_is_named() -> None:
    data = rows(20, 10)
    data[1]["labels"][2] = 9
    with pytest.raises(InputError, match="example 13 has the label 9, and the model knows 0 to 4"):
        fisher_diagonal(Mlp(), data, estimator="empirical")
    data[1]["labels"][2] = -100
    with pytest.raises(InputError, match="example 13 has no label"):
        fisher_diagonal(Mlp(), data, estimator="empirical")
    unlabelled = [{"x": batch["x"]} for batch in data]
    with pytest.raises(InputError, match="the data has none"):
        fisher_diagonal(Mlp(), unlabelled, estimator="empirical")
    assert fisher_diagonal(Mlp(), unlabelled).examples == 20


def test_the_expectation_over_many_classes_is_refused_with_the_numbers() -> None:
    model, data = Mlp(40), rows(4, classes=40)
    with pytest.raises(
        RecipeError, match="40 classes takes 39 backward passes an example, and is done for at most 32"
    ) as caught:
        fisher_diagonal(model, data)
    assert "sampled" in caught.value.fix and "empirical" in caught.value.fix
    assert fisher_diagonal(model, data, estimator="sampled").examples == 4
    assert fisher_diagonal(Mlp(32), rows(2)).estimator == "expected"


def test_a_language_model_is_refused_the_expectation_with_the_numbers() -> None:
    with pytest.raises(RecipeError, match="30 classes at each token takes 29 backward passes a token: 261 for"):
        fisher_diagonal(gpt2(), [texts([9, 5], 30)], task="causal")


def test_no_examples_and_no_classes_are_errors() -> None:
    with pytest.raises(InputError, match="no example"):
        fisher_diagonal(Mlp(), [])
    with pytest.raises(RecipeError, match="one number"):
        fisher_diagonal(Mlp(1), rows())


# ---- the stage, on folders


def run_on(model: Path, told: Mapping[str, Any], out: Path, **more: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the statistics.json that a stage writes, of this model and data."""
    written: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    def write(tensors: Mapping[str, Tensor], files: Mapping[str, bytes], metadata: Mapping[str, str]) -> None:
        assert metadata["mergeflow.space"] == "statistics" and "fisher_diag" in metadata["mergeflow.artifact"]
        written.append((dict(tensors), json.loads(files["statistics.json"])))

    out.mkdir(exist_ok=True)
    settings = {name: more.pop(name) for name in list(more) if name in FisherDiag.model_fields}
    job = StageJob(
        op=FisherDiag(**settings), model=model, source={"digest": "00"}, data=DataSource(**told), folder=model.parent,
        work=out, write=write, **more,
    )  # fmt: skip
    run_stage(job)
    return written[0]


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A `mergeflow_mlp` of 6 numbers and 5 classes, and rows for it."""
    from safetensors.torch import save_file

    from mergeflow.stages.mlp import MergeflowMLP

    config = {
        "model_type": "mergeflow_mlp", "architectures": ["MergeflowMLP"], "input_size": D, "hidden_size": 8,
        "num_hidden_layers": 2, "num_labels": C,
    }  # fmt: skip
    torch.manual_seed(0)
    (tmp_path / "mlp").mkdir()
    save_file(MergeflowMLP(config).state_dict(), tmp_path / "mlp" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "mlp" / "config.json").write_text(json.dumps(config))
    batch = rows()[0]
    write_lines(
        tmp_path / "rows.jsonl",
        [{"x": x.tolist(), "y": int(y)} for x, y in zip(batch["x"], batch["labels"], strict=True)],
    )
    return tmp_path


def test_a_stage_writes_the_diagonal_by_the_names_of_the_checkpoint(digits: Path) -> None:
    from mergeflow.stages.models import load_model, open_folder

    told = {"path": "rows.jsonl", "features": "x", "label": "y"}
    done: list[tuple[str, int, int]] = []
    tensors, facts = run_on(digits / "mlp", told, digits / "work", progress=lambda *one: done.append(one))
    model = load_model(open_folder(digits / "mlp"))
    slow = slow_fisher(model, [{"features": x[None].float()} for x in rows()[0]["x"]], all_classes)
    assert list(tensors) == sorted(f"fisher.{name}" for name in slow)
    same(Diagonal({n.removeprefix("fisher."): t for n, t in tensors.items()}, "expected", N, N, 0, ""), slow, 1e-5)
    assert (facts["kind"], facts["n_examples"], facts["n_tokens"]) == ("fisher_diag", N, N)
    assert facts["data"]["gradients"] == "vmap" and facts["op"]["estimator"] == "expected"
    assert sum(count for what, count, _ in done if what == "examples") == N
    told_before = predict(FisherDiag(), digits / "mlp")
    assert dict(told_before.tensors) == {name: ("float32", tuple(one.shape)) for name, one in tensors.items()}


def test_only_keeps_a_stage_to_some_tensors(digits: Path) -> None:
    told = {"path": "rows.jsonl", "features": "x", "label": "y"}
    whole, _ = run_on(digits / "mlp", told, digits / "work")
    part, facts = run_on(digits / "mlp", told, digits / "work", only=("blocks.1.*",))
    assert set(part) == {name for name in whole if name.startswith("fisher.blocks.1.")} and part
    assert all(torch.equal(part[name], whole[name]) for name in part)
    assert facts["only"] == ["blocks.1.*"]
    with pytest.raises(RecipeError, match="names no parameter"):
        run_on(digits / "mlp", told, digits / "work", only=("decoder.*",))


@pytest.mark.parametrize("estimator", ["expected", "sampled", "batch_hard"])
def test_parameters_that_do_not_fit_the_memory_together_are_done_in_several_passes(
    digits: Path, estimator: str
) -> None:
    told = {"path": "rows.jsonl", "features": "x", "label": "y"}
    whole, facts = run_on(digits / "mlp", told, digits / "work", estimator=estimator)
    totals: set[int] = set()
    weights = sum(4 * one.numel() for one in whole.values())
    largest = max(one.numel() for one in whole.values()) * bytes_beside(4)
    cut, told_too = run_on(
        digits / "mlp", told, digits / "work", estimator=estimator, memory=weights + largest,
        progress=lambda what, done, total: totals.add(total),
    )  # fmt: skip
    assert max(totals) >= 3 * N
    assert cut.keys() == whole.keys()
    assert all(torch.allclose(cut[name], whole[name], rtol=1e-5, atol=1e-9) for name in whole)
    assert (facts["n_examples"], facts["n_tokens"]) == (told_too["n_examples"], told_too["n_tokens"])
    with pytest.raises(MachineError, match=r"takes [\d,]+ bytes for the weights.*--memory"):
        run_on(digits / "mlp", told, digits / "work", estimator=estimator, memory=weights + largest - 1)


def test_the_rows_of_another_label_space_are_refused(digits: Path) -> None:
    write_lines(digits / "other.jsonl", [{"x": [0.0] * D, "y": 7}])
    with pytest.raises(InputError, match="'7' is none that the model knows"):
        run_on(digits / "mlp", {"path": "other.jsonl", "features": "x", "label": "y"}, digits / "work")
    with pytest.raises(InputError, match="the data has none"):
        run_on(digits / "mlp", {"path": "rows.jsonl", "features": "x"}, digits / "work", estimator="empirical")
    with pytest.raises(InputError, match="`min_tokens` asks for 100"):
        run_on(digits / "mlp", {"path": "rows.jsonl", "features": "x"}, digits / "work", min_tokens=100)


def test_a_tied_language_model_is_done_by_documents_of_its_own_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(28)]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", "[PAD]", *words])}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        tmp_path / "lm"
    )
    model = gpt2()
    model.save_pretrained(tmp_path / "lm")
    write_lines(
        tmp_path / "text.jsonl", [{"text": " ".join(words[i:j])} for i, j in ((0, 7), (3, 6), (9, 20), (4, 11))]
    )
    with pytest.raises(RecipeError, match="30 classes at each token takes 29 backward passes a token"):
        run_on(tmp_path / "lm", {"path": "text.jsonl"}, tmp_path / "work")
    with pytest.raises(RecipeError, match="29 backward passes"):
        predict(FisherDiag(), tmp_path / "lm")
    tensors, facts = run_on(tmp_path / "lm", {"path": "text.jsonl"}, tmp_path / "work", estimator="empirical")
    ids = [torch.arange(i + 2, j + 2)[None] for i, j in ((0, 7), (3, 6), (9, 20), (4, 11))]
    slow = slow_fisher(model, [{"input_ids": one, "labels": one} for one in ids], next_tokens)
    assert set(tensors) == {f"fisher.{name}" for name in slow} and "fisher.lm_head.weight" not in tensors
    assert facts["n_tokens"] == 28 and facts["n_examples"] == 4
    rest = {name: one for name, one in slow.items()}
    same(Diagonal({n: tensors[f"fisher.{n}"] for n in rest}, "empirical", 4, 28, 0, ""), rest, 2e-5)
    told = predict(FisherDiag(estimator="sampled"), tmp_path / "lm").tensors
    assert dict(told) == {name: ("float32", tuple(one.shape)) for name, one in tensors.items()}
