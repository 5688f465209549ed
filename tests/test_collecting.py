"""Statistics of what linear layers read, held against plain loops over single examples in float64."""

from __future__ import annotations

import csv
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

from mergeflow.checkpoint.statistics import Facts
from mergeflow.errors import InputError, Interrupted, MachineError, MergeflowError, NumericError, RecipeError
from mergeflow.ops.statistics import ActAbsmean, Gram, GramDiag, InputMean, StageOp
from mergeflow.recipe.grammar import DataSource
from mergeflow.stages import StageJob, collecting, data, models, naming, offloading, predict, run_stage

VOCAB = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **{f"w{i}": i for i in range(4, 64)}}
LABELS = {"bad": 0, "fair": 1, "good": 2}
NAMED = {"label2id": LABELS, "id2label": {number: name for name, number in LABELS.items()}}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
DECODER = {
    **SMALL,
    "vocab_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DECODER, "num_hidden_layers": 3, **more}))


def mixtral() -> Any:
    config = transformers.MixtralConfig(**DECODER, num_hidden_layers=2, num_local_experts=12, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def gpt2(kind: Any = transformers.GPT2LMHeadModel, **more: Any) -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "n_inner": 16}
    return kind(transformers.GPT2Config(vocab_size=64, bos_token_id=2, eos_token_id=3, **sizes, **more))


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=64,
        num_hidden_layers=2,
        max_position_embeddings=24,
        **NAMED,
        **SMALL,
    )
    return transformers.BertForSequenceClassification(config)


def deberta() -> Any:
    """Its blocks give two values, and some of its layers read vectors of positions, which are the same for all examples."""
    more = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
    config = transformers.DebertaV2Config(
        vocab_size=64, num_hidden_layers=2, max_position_embeddings=24, **SMALL, **more
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def bart() -> Any:
    """It asks for a number while it makes its masks."""
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("ffn_dim", 24), ("layers", 2))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    config = transformers.BartConfig(vocab_size=64, d_model=16, max_position_embeddings=24, **sizes, **heads, **tokens)
    return transformers.BartForConditionalGeneration(config)


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=64, decoder_start_token_id=0, eos_token_id=3, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> Any:
    config = transformers.ViTConfig(num_hidden_layers=2, image_size=8, patch_size=4, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config)


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mixtral": mixtral,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "deberta": deberta,
    "bart": bart,
}
TEXTS = ["w4 w5 w6", "w7", "w8 w9 w10 w11 w12 w4 w30", "w13 w14", "w15 w16 w17 w18", "w40 w41 w42 w43 w44", "w19"]
ANSWERS = ["w5 w6 w7 w8", "w9", "w10 w11", "w20 w21 w22", "w50", "w51 w52", "w53 w54 w55"]


def tokenizer(folder: Path, *, closed: bool = False) -> None:
    made = Tokenizer(WordLevel(VOCAB, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    if closed:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )


def saved(folder: Path, name: str, model: Any = None) -> Path:
    """A model with random weights, large enough that layers do something, and its tokenizer."""
    torch.manual_seed(len(name))
    model = MAKERS[name]() if model is None else model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    with models.quietly():
        model.save_pretrained(folder)
    if name != "vit":
        tokenizer(folder, closed=name == "bert")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One model of each family, made when it is asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = saved(tmp_path_factory.mktemp(name), name)
            return self[name]

    return Made()


def ids_of(text: str, *, closed: bool = False) -> list[int]:
    inside = [VOCAB.get(word, 1) for word in text.split()]
    return [2, *inside, 3] if closed else inside


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_for(name: str) -> list[dict[str, Any]]:
    if name == "vit":
        noise = np.random.RandomState(0).randn(6, 3, 8, 8)
        return [{"features": image.tolist()} for image in noise]
    if name in ("t5", "bart"):
        return [{"text": text, "answer": answer} for text, answer in zip(TEXTS, ANSWERS, strict=True)]
    return [{"text": text} for text in TEXTS]


@dataclass
class Outcome:
    tensors: dict[str, Tensor]
    facts: Facts
    said: list[str]
    metadata: dict[str, str]

    def of(self, weight: str) -> np.ndarray[Any, Any]:
        """The statistic that a weight reads, as float64."""
        group = self.facts.groups[weight]
        (found,) = [tensor for name, tensor in self.tensors.items() if name.split(".", 1)[1] == group]
        return found.double().numpy()

    def rows(self, weight: str) -> int:
        return self.facts.tokens.get(self.facts.groups[weight], self.facts.n_tokens)


def collected(
    op: StageOp,
    model: Path,
    rows: Path | Sequence[Mapping[str, Any]],
    tmp_path: Path,
    progress: Any = None,
    **more: Any,
) -> Outcome:
    """What a stage writes, and what it says."""
    source = rows if isinstance(rows, Path) else lines(tmp_path / "rows.jsonl", rows)
    of_job = {key: more.pop(key) for key in ("only", "memory", "stop", "seed") if key in more}
    out: list[Outcome] = []
    said: list[str] = []

    def write(tensors: Mapping[str, Tensor], files: Mapping[str, bytes], metadata: Mapping[str, str]) -> None:
        save_file(dict(tensors), tmp_path / "made.safetensors", metadata=dict(metadata))
        facts = Facts.model_validate_json(files["statistics.json"])
        out.append(Outcome(load_file(tmp_path / "made.safetensors"), facts, said, dict(metadata)))

    def tell(what: str, done: int, total: int) -> None:
        said.append(what)
        if progress is not None:
            progress()

    described = DataSource(path=source.name, **more)
    job = StageJob(
        op, model, {"digest": "00"}, described, source.parent, tmp_path / "work", write, progress=tell, **of_job
    )
    run_stage(job)
    return out[0]


def exact(**more: Any) -> Gram:
    return Gram(codec="float32", batch_size=3, **more)


# The oracle: a plain loop over single examples, without padding, in float64, by transformers alone.


EAGER = {"dtype": torch.float64, "experts_implementation": "eager"}


def inputs_of(name: str, row: Mapping[str, Any]) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.tensor(row["features"], dtype=torch.float64)[None]}
    inputs = {"input_ids": torch.tensor([ids_of(row["text"], closed=name == "bert")])}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0, *ids_of(row["answer"])[:-1]]])
    return inputs


def reads(name: str, folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """What each linear layer reads: (tokens, channels), by the name of its weight."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder, **EAGER).eval()
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    for own, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D", "Conv2d"):
            module.register_forward_pre_hook(
                lambda module, args, own=own: found.setdefault(f"{own}.weight", []).append(flat(module, args[0]))
            )
    with torch.no_grad():
        for row in rows:
            model(**inputs_of(name, row))
    return {weight: np.concatenate(parts) for weight, parts in found.items()}


def flat(module: nn.Module, x: Tensor) -> np.ndarray[Any, Any]:
    values = x.double().numpy()
    if not isinstance(module, nn.Conv2d):
        return values.reshape(-1, values.shape[-1])
    (height, width), (down, right), (top, left) = module.kernel_size, module.stride, module.padding  # type: ignore[misc]
    values = np.pad(values, ((0, 0), (0, 0), (top, top), (left, left)))
    return np.stack(
        [
            image[:, y : y + height, x : x + width].reshape(-1)
            for image in values
            for y in range(0, image.shape[1] - height + 1, down)
            for x in range(0, image.shape[2] - width + 1, right)
        ]
    )


def close(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], tolerance: float = 1e-5) -> bool:
    return bool(np.abs(found - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-6))


# Values


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_grams_are_those_of_a_plain_loop_over_single_examples(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    rows = rows_for(name)
    label = {"label": "answer"} if name in ("t5", "bart") else {}
    found = collected(exact(), folders[name], rows, tmp_path, **label)
    known = reads(name, folders[name], rows)
    compared = 0
    for weight in found.facts.groups:
        if "experts" not in weight:
            x = known[weight]
            assert close(found.of(weight), x.T @ x / len(x)), weight
            assert found.rows(weight) == len(x), weight
            compared += 1
    assert compared == {"llama": 22, "gpt2": 8, "bert": 14, "t5": 32, "mixtral": 9}[name]


def test_images_and_their_patches_are_those_of_a_plain_loop(folders: Mapping[str, Path], tmp_path: Path) -> None:
    rows = rows_for("vit")
    found = collected(exact(), folders["vit"], rows, tmp_path)
    known = reads("vit", folders["vit"], rows)
    model = models.load_model(models.open_folder(folders["vit"]))
    pieces = naming.names_of(model, naming.shapes(models.open_folder(folders["vit"]).checkpoint)).pieces
    own = {piece.tensor: parameter for parameter, (piece,) in pieces.items()}
    assert len(found.facts.groups) == 14
    for weight in found.facts.groups:
        x = known[own[weight]]
        assert close(found.of(weight), x.T @ x / len(x)), weight
        assert found.rows(weight) == len(x)


@pytest.mark.parametrize("op", [GramDiag, InputMean, ActAbsmean])
def test_vectors_are_those_of_a_plain_loop(op: type[StageOp], folders: Mapping[str, Path], tmp_path: Path) -> None:
    rows = rows_for("llama")
    found = collected(op(batch_size=3), folders["llama"], rows, tmp_path)
    formulas: dict[str, Callable[[Any], Any]] = {"gram_diag": np.square, "input_mean": np.array, "act_absmean": np.abs}
    for weight, x in reads("llama", folders["llama"], rows).items():
        assert close(found.of(weight), formulas[op.name](x).mean(0)), weight


def test_the_diagonal_of_a_gram_is_what_gram_diag_collects(folders: Mapping[str, Path], tmp_path: Path) -> None:
    whole = collected(exact(), folders["llama"], rows_for("llama"), tmp_path)
    diagonal = collected(GramDiag(batch_size=3), folders["llama"], rows_for("llama"), tmp_path)
    for weight in whole.facts.groups:
        assert close(np.diag(whole.of(weight)), diagonal.of(weight), 1e-6)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mixtral", "deberta", "bart"])
def test_padding_changes_nothing(name: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    label = {"label": "answer"} if name in ("t5", "bart") else {}
    alone = collected(Gram(codec="float32", batch_size=1), folders[name], rows_for(name), tmp_path, **label)
    padded = collected(Gram(codec="float32", batch_size=7), folders[name], rows_for(name), tmp_path, **label)
    assert alone.facts.groups == padded.facts.groups
    assert alone.facts.n_tokens == padded.facts.n_tokens
    for weight in alone.facts.groups:
        assert close(padded.of(weight), alone.of(weight)), weight
        if ".pos_" not in weight:  # those read vectors that no token has, once a batch
            assert padded.rows(weight) == alone.rows(weight)


def test_float64_keeps_more_than_float32(folders: Mapping[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 8, dtype=torch.float64) + 30
    found = {}
    for dtype in (torch.float32, torch.float64):
        moments = collecting.Moments.zeros("gram", 8, dtype, "cpu")
        for part in x.split(3):
            moments.add(part.float().to(dtype))
        found[dtype] = moments.mean.double()
    wanted = x.float().double().T @ x.float().double() / len(x)
    assert (found[torch.float64] - wanted).abs().max() < 1e-9 < (found[torch.float32] - wanted).abs().max()
    made = collected(exact(accumulate="float64"), folders["llama"], rows_for("llama"), tmp_path)
    assert made.facts.dtype == "float64" and {t.dtype for t in made.tensors.values()} == {torch.float32}


# Groups


def test_what_reads_one_tensor_has_one_gram(folders: Mapping[str, Path], tmp_path: Path) -> None:
    groups = collected(exact(), folders["llama"], rows_for("llama"), tmp_path).facts.groups
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert {groups[f"{attention}{x}_proj.weight"] for x in "qkv"} == {f"{attention}q_proj.weight"}
    assert groups[f"{mlp}up_proj.weight"] == groups[f"{mlp}gate_proj.weight"] == f"{mlp}gate_proj.weight"
    assert len(set(groups.values())) == 3 * 4 + 1  # four inputs a block, and the head's


def test_cross_attention_of_all_layers_shares_the_encoders_output(folders: Mapping[str, Path], tmp_path: Path) -> None:
    found = collected(exact(), folders["t5"], rows_for("t5"), tmp_path, label="answer").facts
    first = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    assert found.groups["decoder.block.1.layer.1.EncDecAttention.v.weight"] == first
    assert found.n_tokens == sum(len(ids_of(text)) for text in TEXTS)
    assert first not in found.tokens
    own = found.groups["decoder.block.0.layer.0.SelfAttention.q.weight"]
    assert found.tokens[own] == sum(len(ids_of(text)) for text in ANSWERS)


def test_square_conv1d_layers_keep_the_orientation_of_their_module(folders: Mapping[str, Path], tmp_path: Path) -> None:
    found = collected(exact(), folders["gpt2"], rows_for("gpt2"), tmp_path)
    square = "transformer.h.1.mlp.c_proj.weight"
    assert load_file(folders["gpt2"] / "model.safetensors")[square].shape == (16, 16)
    assert square in found.facts.transposed and len(found.facts.transposed) == 8
    x = reads("gpt2", folders["gpt2"], rows_for("gpt2"))[square]
    assert close(found.of(square), x.T @ x / len(x))
    other = collected(exact(), folders["llama"], rows_for("llama"), tmp_path)
    assert other.facts.transposed == ()


def test_a_tied_head_has_no_gram_and_an_untied_one_has(folders: Mapping[str, Path], tmp_path: Path) -> None:
    tied = collected(exact(), saved(tmp_path / "tied", "llama", llama(tie_word_embeddings=True)), TEXT_ROWS, tmp_path)
    assert "lm_head.weight" not in tied.facts.groups and "model.embed_tokens.weight" in tied.facts.skipped
    untied = collected(exact(), folders["llama"], TEXT_ROWS, tmp_path)
    assert "lm_head.weight" in untied.facts.groups


TEXT_ROWS = [{"text": text} for text in TEXTS]


def test_a_tied_head_that_is_stored_too_has_no_gram_whichever_way_the_model_runs(tmp_path: Path) -> None:
    model = saved(tmp_path / "tied", "llama", llama(tie_word_embeddings=True))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    whole = collected(exact(), model, TEXT_ROWS, tmp_path)
    walked = collected(exact(), model, TEXT_ROWS, tmp_path, memory=20_000)
    assert whole.facts.skipped["lm_head.weight"] == "tied to the embedding model.embed_tokens"
    assert whole.facts == walked.facts and predict(exact(), model).skipped == whole.facts.skipped
    assert all(torch.equal(walked.tensors[name], whole.tensors[name]) for name in whole.tensors)


class Twice(nn.Module):
    """Two layers of one weight, which read different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, features: Tensor) -> Tensor:
        return self.other(self.second(self.first(features).relu()))


def test_a_weight_of_two_layers_takes_in_what_both_read() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(50, 4)
    names = naming.names_of(model, {"second.weight": (4, 4), "other.weight": (3, 4)})
    collector = collecting.Collector(model, names, "gram", torch.float64)
    batch = data.Batch(0, (), {"features": x})
    with torch.no_grad():
        groups = collector.learn(lambda: model(x))
        found = collector.measure(groups, iter([batch]), lambda batch: model(**batch.inputs))
        hidden = model.first(x).relu()
    both = torch.cat([x, hidden]).double()
    assert [group.weights for group in groups] == [("second.weight",), ("other.weight",)]
    assert torch.allclose(found["second.weight"].mean, both.T @ both / 100, atol=1e-6)


def test_a_tensor_that_was_written_to_in_between_is_another_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x) + self.b(x)
            return first + self.c(x.mul_(2))

    model = InPlace()
    names = naming.names_of(model, {f"{name}.weight": (4, 4) for name in "abc"})
    collector = collecting.Collector(model, names, "gram", torch.float32)
    with torch.no_grad():
        groups = collector.learn(lambda: model(torch.randn(5, 4)))
    assert [group.weights for group in groups] == [("a.weight", "b.weight"), ("c.weight",)]


@pytest.mark.parametrize("kernel, stride, padding, dilation", [(3, 1, 1, 1), (2, 2, 0, 1), ((3, 1), (2, 1), (1, 0), 1)])
def test_a_convolution_reads_its_unfolded_patches(kernel: Any, stride: Any, padding: Any, dilation: int) -> None:
    torch.manual_seed(0)
    module, x = nn.Conv2d(3, 5, kernel, stride, padding, dilation), torch.randn(2, 3, 7, 6)
    rows = collecting._unfolded(module, x)
    assert close(rows.double().numpy(), flat(module, x))
    with torch.no_grad():
        made = rows @ module.weight.reshape(5, -1).T + module.bias
    assert torch.allclose(made.reshape(2, -1, 5).transpose(1, 2).reshape(module(x).shape), module(x), atol=1e-5)


def test_only_restricts_and_groups_keep_their_names(folders: Mapping[str, Path], tmp_path: Path) -> None:
    found = collected(exact(), folders["llama"], TEXT_ROWS, tmp_path, only=("*.1.self_attn.{k,o}_proj.weight",))
    prefix = "model.layers.1.self_attn."
    assert found.facts.groups == {
        f"{prefix}k_proj.weight": f"{prefix}q_proj.weight",
        f"{prefix}o_proj.weight": f"{prefix}o_proj.weight",
    }
    assert sorted(found.tensors) == [f"gram.{prefix}o_proj.weight", f"gram.{prefix}q_proj.weight"]
    with pytest.raises(RecipeError, match="names no weight"):
        collected(exact(), folders["llama"], TEXT_ROWS, tmp_path, only=("*norm*",))


# Mixtures of experts


def routed(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[np.ndarray[Any, Any]]]:
    """What each expert's matrices read, computed by hand from what goes into each mixture and the stored weights."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    model = transformers.MixtralForCausalLM.from_pretrained(folder, **EAGER).eval()
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    given: list[tuple[int, Tensor]] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, number=number: given.append((number, args[0])))
    with torch.no_grad():
        for row in rows:
            model(**inputs_of("mixtral", row))
    for number, hidden in given:
        prefix = f"model.layers.{number}.block_sparse_moe."
        for token in hidden.reshape(-1, hidden.shape[-1]):
            for expert in (weights[f"{prefix}gate.weight"] @ token).topk(2).indices.tolist():
                own = f"{prefix}experts.{expert}."
                gate, up = weights[f"{own}w1.weight"] @ token, weights[f"{own}w3.weight"] @ token
                inner = nn.functional.silu(gate) * up
                for name, value in (("w1", token), ("w3", token), ("w2", inner)):
                    found.setdefault(f"{own}{name}.weight", []).append(value.numpy())
    return found


def test_experts_see_only_the_tokens_routed_to_them(folders: Mapping[str, Path], tmp_path: Path) -> None:
    found = collected(exact(), folders["mixtral"], TEXT_ROWS, tmp_path)
    known = routed(folders["mixtral"], TEXT_ROWS)
    experts = [weight for weight in found.facts.groups if "experts" in weight]
    assert len(experts) == 2 * 12 * 3
    for weight in experts:
        x = np.array(known.get(weight, np.zeros((0, len(found.of(weight))))))
        assert found.rows(weight) == len(x), weight
        assert close(found.of(weight), x.T @ x / max(len(x), 1)), weight
    assert "MixtralTopKRouter" in found.facts.skipped["model.layers.0.block_sparse_moe.gate.weight"]


def test_an_expert_without_tokens_has_zeros_and_says_so(folders: Mapping[str, Path], tmp_path: Path) -> None:
    found = collected(exact(), folders["mixtral"], [{"text": "w4 w5 w6"}], tmp_path)
    idle = [weight for weight in found.facts.groups if "experts" in weight and found.rows(weight) == 0]
    assert len(idle) >= 2 * 3 * (12 - 6)
    assert all(not found.of(weight).any() for weight in idle)
    assert all(np.isfinite(found.of(weight)).all() for weight in found.facts.groups)


# The walker


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "deberta"])
def test_a_model_walked_block_by_block_gives_the_same_bits(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    whole = collected(exact(), folders[name], TEXT_ROWS, tmp_path)
    walked = collected(exact(), folders[name], TEXT_ROWS, tmp_path, memory=20_000)
    assert "batches through layers" in walked.said and "batches through layers" not in whole.said
    assert walked.facts == whole.facts
    assert walked.tensors.keys() == whole.tensors.keys()
    for tensor in whole.tensors:
        assert torch.equal(walked.tensors[tensor], whole.tensors[tensor]), tensor


@pytest.fixture
def settled_heap() -> Iterator[None]:
    """What is there already is not looked through each time that parameters are counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def parameters_in_memory() -> int:
    """Bytes of all parameters that live anywhere in this process."""
    found = {id(one): one for one in gc.get_objects() if type(one) is nn.Parameter and not one.is_meta}
    return sum(one.nbytes for one in found.values())


def bytes_read() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.usefixtures("settled_heap")
def test_a_walk_holds_one_block_and_reads_each_weight_once(folders: Mapping[str, Path], tmp_path: Path) -> None:
    collected(exact(), folders["llama"], TEXT_ROWS, tmp_path, memory=20_000)  # what is loaded once in a process
    model = saved(tmp_path / "large", "llama", llama(num_hidden_layers=8, hidden_size=128, intermediate_size=512))
    stored = (model / "model.safetensors").stat().st_size
    block = 4 * (128 * 128 * 3 + 3 * 128 * 512 + 2 * 128)
    most: list[int] = []
    gc.collect()
    before, read = parameters_in_memory(), bytes_read()
    found = collected(
        Gram(codec="diagonal", batch_size=3), model, TEXT_ROWS, tmp_path, memory=stored // 2,
        progress=lambda: most.append(parameters_in_memory() - before),
    )  # fmt: skip
    assert bytes_read() - read < 1.25 * stored
    assert len(found.facts.groups) == 8 * 7 + 1
    assert block < max(most) < 1.5 * block + 2 * 4 * 64 * 128 < stored / 3


def test_a_walk_ends_behind_the_last_block_that_is_asked_for(folders: Mapping[str, Path], tmp_path: Path) -> None:
    walked = collected(exact(), folders["llama"], TEXT_ROWS, tmp_path, memory=20_000, only=("*.0.self_attn.*",))
    whole = collected(exact(), folders["llama"], TEXT_ROWS, tmp_path, only=("*.0.self_attn.*",))
    assert walked.said.count("batches through layers") == 3 * 2  # the embedding and one block
    assert walked.facts == whole.facts and all(torch.equal(walked.tensors[n], whole.tensors[n]) for n in whole.tensors)


@pytest.mark.parametrize("name", ["t5", "bart", "vit"])
def test_a_model_of_other_families_runs_with_one_block_in_memory_and_gives_the_same_bits(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    label = {} if name == "vit" else {"label": "answer"}
    whole = collected(exact(), folders[name], rows_for(name), tmp_path, **label)
    memory = 40_000 if name == "bart" else 20_000
    large = collected(exact(), folders[name], rows_for(name), tmp_path, memory=memory, **label)
    assert any("its blocks are read again for every batch" in said for said in large.said)
    assert not any("its blocks are read again" in said for said in whole.said)
    assert large.facts == whole.facts
    assert large.tensors.keys() == whole.tensors.keys()
    for tensor in whole.tensors:
        assert torch.equal(large.tensors[tensor], whole.tensors[tensor]), tensor


@pytest.mark.usefixtures("settled_heap")
def test_no_more_than_the_outside_and_one_block_is_in_memory(folders: Mapping[str, Path], tmp_path: Path) -> None:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 8, "num_heads": 4}
    config = transformers.T5Config(vocab_size=64, decoder_start_token_id=0, eos_token_id=3, **sizes)
    model = saved(tmp_path / "large", "t5", transformers.T5ForConditionalGeneration(config))
    stored = (model / "model.safetensors").stat().st_size
    empty = models.empty_model(models.open_folder(model))
    least = offloading.least_bytes(empty, offloading.blocks_of(empty))
    before = parameters_in_memory()
    most: list[int] = []
    original = offloading.Filling.fill

    def fill(self: offloading.Filling, names: Sequence[str]) -> None:
        original(self, names)
        most.append(parameters_in_memory() - before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloading.Filling, "fill", fill)
        collected(Gram(codec="diagonal"), model, rows_for("t5"), tmp_path, memory=stored // 2, label="answer")
    assert max(most) == least < stored / 6


def test_a_model_that_cannot_fit_is_refused_with_the_numbers(folders: Mapping[str, Path], tmp_path: Path) -> None:
    refused(
        MachineError, r"takes [\d,]+ bytes.*largest block, and may take 9,000.*--memory", exact(), folders["t5"],
        rows_for("t5"), tmp_path, label="answer", memory=9_000,
    )  # fmt: skip


def test_a_block_whose_weights_are_used_outside_it_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    own = transformers.T5ForConditionalGeneration.forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        made = own(self, *args, **more)
        return made.logits @ self.encoder.block[0].layer[1].DenseReluDense.wi.weight.new_ones(64) + bool(
            self.encoder.block[0].layer[1].DenseReluDense.wi.weight.sum() > 0
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.T5ForConditionalGeneration, "forward", forward)
        refused(
            MachineError, "weights of a block are used outside it", exact(), folders["t5"], rows_for("t5"), tmp_path,
            label="answer", memory=20_000,
        )  # fmt: skip


# The MLP of our own


def mlp(folder: Path, *, dead: bool = False, nan: bool = False) -> Path:
    sizes = {"input_size": 6, "hidden_size": 8, "num_hidden_layers": 2, "num_labels": 3}
    torch.manual_seed(1)
    state = {"head.weight": torch.randn(3, 8), "head.bias": torch.zeros(3)}
    for index, width in enumerate((6, 8)):
        state |= {f"blocks.{index}.linear.weight": torch.randn(8, width), f"blocks.{index}.linear.bias": torch.randn(8)}
        state |= {f"blocks.{index}.norm.weight": torch.ones(8), f"blocks.{index}.norm.bias": torch.zeros(8)}
    if nan:
        state["blocks.1.linear.bias"][2] = float("nan")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["mergeflow_mlp"], "model_type": "mergeflow_mlp", **sizes})
    )
    save_file(state, folder / "model.safetensors")
    return folder


def numbers(count: int, seed: int = 0) -> list[dict[str, Any]]:
    values = np.random.RandomState(seed).rand(count, 6)
    return [{"features": row.tolist(), "label": int(row[0] * 3)} for row in values]


def by_hand(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray[Any, Any]]:
    """What the three layers of the MLP read, in numpy and float64."""
    weights = {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    x = np.array([row["features"] for row in rows], dtype=np.float32).astype(np.float64)
    found = [x]
    for index in range(2):
        x = x @ weights[f"blocks.{index}.linear.weight"].T + weights[f"blocks.{index}.linear.bias"]
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        x = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
        found.append(x)
    return found


def test_the_mlp_of_our_own_reads_rows_of_numbers(tmp_path: Path) -> None:
    model, rows = mlp(tmp_path / "mlp"), numbers(40)
    found = collected(exact(), model, rows, tmp_path)
    for weight, x in zip(
        ("blocks.0.linear.weight", "blocks.1.linear.weight", "head.weight"), by_hand(model, rows), strict=True
    ):
        assert close(found.of(weight), x.T @ x / len(x)), weight
    assert found.facts.n_tokens == found.facts.n_examples == 40 and found.facts.tokens == {}
    assert not [name for name in found.facts.skipped if "bias" not in name and "norm" not in name]


def test_the_models_of_the_quickstart_run(tmp_path: Path) -> None:
    base = Path(__file__).parent.parent / "recipes" / "quickstart" / "models" / "base"
    rows = [{"pixels": np.random.RandomState(i).rand(64).tolist()} for i in range(10)]
    found = collected(exact(), base, rows, tmp_path, features="pixels")
    assert sorted(found.facts.groups) == [*(f"blocks.{i}.linear.weight" for i in range(3)), "head.weight"]


def test_a_channel_that_is_always_zero_has_zeros(tmp_path: Path) -> None:
    rows = numbers(20)
    for row in rows:
        row["features"][2] = 0.0
    for op in (exact(), Gram(codec="correlation16"), GramDiag(), ActAbsmean()):
        found = collected(op, mlp(tmp_path / "mlp"), rows, tmp_path)
        assert all(torch.isfinite(tensor.float()).all() for tensor in found.tensors.values())
    gram = collected(exact(), mlp(tmp_path / "mlp"), rows, tmp_path).of("blocks.0.linear.weight")
    assert not gram[2].any() and not gram[:, 2].any() and (np.diag(gram) > 0).sum() == 5


def test_what_does_not_fit_the_memory_at_once_is_collected_in_several_passes(tmp_path: Path) -> None:
    model, rows = mlp(tmp_path / "mlp"), numbers(30)
    once, often = collected(exact(), model, rows, tmp_path), collected(exact(), model, rows, tmp_path, memory=1)
    assert len(often.said) == 3 * len(once.said)
    assert often.facts == once.facts and all(torch.equal(once.tensors[n], often.tensors[n]) for n in once.tensors)


# Predicting


@pytest.mark.parametrize("name", [*MAKERS, "mlp"])
def test_what_is_predicted_from_headers_is_what_is_written(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    model = mlp(tmp_path / "mlp") if name == "mlp" else folders[name]
    rows = numbers(5) if name == "mlp" else rows_for(name)
    label = {"label": "answer"} if name in ("t5", "bart") else {}
    for op in (Gram(), exact(), InputMean()):
        made, told = collected(op, model, rows, tmp_path, **label), predict(op, model)
        assert told.tensors == {
            n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in made.tensors.items()
        }
        assert told.groups == made.facts.groups and told.skipped == made.facts.skipped
    made, told = collected(exact(), model, rows, tmp_path, only=("*1*",), **label), predict(exact(), model, ("*1*",))
    assert told.tensors.keys() == made.tensors.keys() and told.groups == made.facts.groups


def test_a_model_whose_headers_are_known_needs_no_weights_to_foresee(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    checkpoint = models.open_folder(folders["llama"]).checkpoint
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    assert predict(Gram(), tmp_path, None, checkpoint) == predict(Gram(), folders["llama"])
    with pytest.raises(InputError):
        predict(Gram(), tmp_path)


def test_headers_say_that_it_is_statistics(tmp_path: Path) -> None:
    found = collected(exact(), mlp(tmp_path / "mlp"), numbers(5), tmp_path, seed=3)
    assert found.metadata["mergeflow.space"] == "statistics"
    assert json.loads(found.metadata["mergeflow.artifact"]) == {"kind": "gram"}
    assert found.facts.op.name == "gram" and found.facts.seed == 3
    assert found.facts.data == {"source": "rows.jsonl", "rows_left_out": 0, "texts_cut": 0, "batches_dropped": 0}
    assert not list((tmp_path / "work").rglob("*.safetensors"))


# Data


def examples(rows: Path, model: Path, max_length: int | None = None, **more: Any) -> data.Examples:
    return data.read_examples(DataSource(path=rows.name, **more), rows.parent, models.open_folder(model), max_length)


def test_every_format_of_rows_gives_the_same_examples(folders: Mapping[str, Path], tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS[:3], ("good", "bad", "fair"), strict=True)]
    paths = [lines(tmp_path / "a.jsonl", rows), tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "a.tsv"]
    paths[1].write_text(json.dumps(rows))
    for path, delimiter in ((paths[2], ","), (paths[3], "\t")):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    for path in paths:
        found = examples(path, folders["bert"], label="label").examples
        assert [one.ids for one in found] == [tuple(ids_of(text, closed=True)) for text in TEXTS[:3]], path
        assert [one.label for one in found] == [2, 0, 1]
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:3]) + "\n\n")
    plain = examples(tmp_path / "a.txt", folders["bert"]).examples
    assert [one.ids for one in plain] == [tuple(ids_of(text, closed=True)) for text in TEXTS[:3]]
    assert [one.where for one in plain] == ["a.txt:1", "a.txt:2", "a.txt:3"]


def test_parquet_rows_are_read_or_say_what_to_install(folders: Mapping[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(MachineError, match="pip install pyarrow"):
            examples(path, folders["bert"])
        return
    parquet.write_table(pyarrow.Table.from_pylist([{"text": text} for text in TEXTS]), path)
    assert len(examples(path, folders["bert"]).examples) == len(TEXTS)


def test_images_of_a_folder_are_read_or_say_what_to_install(tmp_path: Path) -> None:
    model = mlp(tmp_path / "mlp")
    (tmp_path / "images" / "1").mkdir(parents=True)
    path = tmp_path / "images" / "1" / "a.png"
    try:
        from PIL import Image
    except ImportError:
        path.write_bytes(b"\x89PNG")
        with pytest.raises(MachineError, match="pip install pillow"):
            examples(tmp_path / "images", model, label="label")
        return
    Image.fromarray(np.arange(0, 252, 42, dtype=np.uint8).reshape(2, 3)).save(path)
    (tmp_path / "images" / "1" / "b.png").write_bytes(b"\x89PNG")
    found = examples(tmp_path / "images", model, label="label")
    assert [one.label for one in found.examples] == [1] and found.counts.unusable == 1
    assert torch.allclose(found.examples[0].values, torch.arange(0, 252, 42) / 255)


def test_limit_takes_the_first_rows_and_with_a_seed_some_that_keep_their_order(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": f"w{4 + i}"} for i in range(50)])
    order = {
        seed: [one.ids[0] for one in examples(path, folders["llama"], limit=12, seed=seed).examples]
        for seed in (None, 0, 1)
    }
    assert order[None] == list(range(4, 16))
    assert len(order[0]) == 12 and order[0] == sorted(order[0]) and order[0] != order[None] != order[1] != order[0]
    assert order[0] == [one.ids[0] for one in examples(path, folders["llama"], limit=12, seed=0).examples]
    everything = [one.ids[0] for one in examples(path, folders["llama"], limit=90, seed=5).examples]
    assert everything == list(range(4, 54))


def test_a_template_joins_fields_and_is_no_program(folders: Mapping[str, Path], tmp_path: Path) -> None:
    rows = [{"q": "w4 w5", "a": "w6"}, {"q": "w7"}, {"q": "{a} w8", "a": 3}]
    path = lines(tmp_path / "a.jsonl", rows)
    found = examples(path, folders["llama"], template="{q} {{ {a}")
    assert found.examples[0].ids == (4, 5, 1, 6)
    assert found.counts.unusable == 1 and found.counts.first_unusable == "a.jsonl:2: lacks the field 'a'"
    with pytest.raises(InputError, match="no row that can be used"):
        examples(path, folders["llama"], template="{q.__class__}")


def test_messages_go_through_the_chat_template(folders: Mapping[str, Path], tmp_path: Path) -> None:
    rows = [{"chat": [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5 w6"}]}, {"chat": "w7"}]
    path = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match="chat template"):
        examples(path, folders["llama"], messages="chat")
    model = saved(tmp_path / "chat", "llama")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    found = examples(path, model, messages="chat")
    assert [one.ids for one in found.examples] == [(9, 4, 9, 5, 6)] and found.counts.unusable == 1


def test_long_texts_are_cut_counted_and_said(folders: Mapping[str, Path], tmp_path: Path) -> None:
    rows = [{"text": " ".join(["w5"] * 40)}, {"text": "w6 w7"}]
    found = collected(exact(), folders["llama"], rows, tmp_path)
    assert found.facts.n_tokens == 24 + 2 and found.facts.data["texts_cut"] == 1
    assert any("cut: 1" in text for text in found.said)
    shorter = collected(exact(max_length=5), folders["llama"], rows, tmp_path)
    assert shorter.facts.n_tokens == 5 + 2
    closed = examples(lines(tmp_path / "b.jsonl", rows), folders["bert"], max_length=6)
    assert closed.examples[0].ids == (2, 5, 5, 5, 5, 3)  # a cut text keeps its closing token


def test_labels_of_words_stand_on_their_first_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=24, **NAMED, **SMALL)
    model = saved(tmp_path / "bert", "bert", transformers.BertForTokenClassification(config))
    path = lines(
        tmp_path / "a.jsonl", [{"words": ["w4", "w5"], "tags": ["good", "bad"]}, {"words": ["w6"], "tags": [1, 2]}]
    )
    found = examples(path, model, text="words", label="tags")
    assert [(one.ids, one.target) for one in found.examples] == [((2, 4, 5, 3), (-100, 2, 0, -100))]
    assert found.counts.unusable == 1


def test_a_decoder_is_never_as_long_as_its_encoder(folders: Mapping[str, Path], tmp_path: Path) -> None:
    rows = [{"text": "w4 w5 w6", "answer": "w7 w8 w9"}, {"text": "w4", "answer": "w7"}]
    found = examples(lines(tmp_path / "a.jsonl", rows), folders["t5"], label="answer")
    batch = next(found.batches(2))
    assert batch.mask is not None and batch.decoder_mask is not None and batch.labels is not None
    assert batch.mask.shape == (2, 3) and batch.decoder_mask.shape == (2, 4)
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 7, 8, 9], [0, 7, 0, 0]]
    assert batch.labels.tolist() == [[7, 8, 9, -100], [7, -100, -100, -100]]


# Bad input


def refused(
    error: type[MergeflowError], match: str, op: StageOp, model: Path, rows: Any, tmp_path: Path, **more: Any
) -> None:
    """The stage raises, and has written nothing."""
    with pytest.raises(error, match=match):
        collected(op, model, rows, tmp_path, **more)
    assert not (tmp_path / "made.safetensors").exists()


def test_data_without_a_usable_row_is_an_error_with_file_and_line(folders: Mapping[str, Path], tmp_path: Path) -> None:
    rows = [{"question": "w4"}, {"text": "  "}, {"text": 3}]
    refused(
        InputError, r"no row.*rows\.jsonl:1: has no text in its field 'text'", exact(), folders["llama"], rows, tmp_path
    )
    refused(InputError, "there are no rows", exact(), folders["llama"], [], tmp_path)
    refused(
        InputError,
        r"rows\.jsonl:1: has 2 numbers.*reads 6",
        exact(),
        mlp(tmp_path / "m"),
        [{"features": [1, 2]}],
        tmp_path,
    )
    refused(InputError, "no such file", exact(), folders["llama"], tmp_path / "none.jsonl", tmp_path)


def test_rows_that_are_not_usable_are_counted_and_said(folders: Mapping[str, Path], tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": "w4 w5"}, {"other": 1}])
    path.write_text(path.read_text() + "not json\n[1]\n\n")
    found = collected(exact(), folders["llama"], path, tmp_path)
    assert found.facts.n_examples == 1 and found.facts.data["rows_left_out"] == 3
    assert any("rows left out: 3 (first: rows.jsonl:2" in text for text in found.said)


def test_a_label_that_the_model_does_not_know_is_an_error_with_its_place(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    rows = [{"text": "w4", "y": "good"}, {"text": "w5", "y": "goood"}]
    refused(
        InputError, r"rows\.jsonl:2: the label 'goood'.*'good'", exact(), folders["bert"], rows, tmp_path, label="y"
    )
    for odd in (3, -1, True, "3"):
        refused(InputError, "the label", exact(), folders["bert"], [{"text": "w5", "y": odd}], tmp_path, label="y")


def test_a_model_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", "llama")
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(InputError, r"tokenizer cannot be loaded.*tokenizer\.json", exact(), model, TEXT_ROWS, tmp_path)


def test_nan_activations_are_an_error_over_a_thousandth_of_the_batches(tmp_path: Path) -> None:
    model, rows = mlp(tmp_path / "mlp"), numbers(1200)
    refused(NumericError, "NaN or Inf", exact(), mlp(tmp_path / "nan", nan=True), rows[:9], tmp_path)
    bad = [*rows[:700], {"features": [float("nan")] * 6}, *rows[700:]]
    refused(NumericError, "batch 233 have NaN", exact(), model, bad, tmp_path)
    found = collected(Gram(codec="float32", batch_size=1), model, bad, tmp_path)
    assert found.facts.data["batches_dropped"] == 1 and found.facts.n_tokens == 1201
    assert "batches left out for NaN or Inf: 1" in found.said
    assert {found.rows(weight) for weight in found.facts.groups} == {1200}
    wanted = collected(Gram(codec="float32", batch_size=1), model, rows, tmp_path)
    assert all(torch.equal(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors)


def test_few_tokens_are_refused_where_it_is_asked(folders: Mapping[str, Path], tmp_path: Path) -> None:
    refused(InputError, "has 23 tokens.*asks for 24", exact(min_tokens=24), folders["llama"], TEXT_ROWS, tmp_path)
    assert collected(exact(min_tokens=23), folders["llama"], TEXT_ROWS, tmp_path).facts.n_tokens == 23


def test_a_class_that_transformers_does_not_have_is_never_run_from_the_folder(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    model = saved(tmp_path / "m", "llama")
    config = json.loads((model / "config.json").read_text())
    (model / "custom.py").write_text("raise SystemExit(9)\n")
    config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "custom.OwnForCausalLM"}}
    (model / "config.json").write_text(json.dumps(config))
    refused(InputError, r"OwnForCausalLM.*never run", exact(), model, TEXT_ROWS, tmp_path)
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config))
    refused(InputError, "names no class", exact(), model, TEXT_ROWS, tmp_path)


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", "bert")
    weights = load_file(model / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if n != "classifier.weight"}, model / "model.safetensors", {"format": "pt"}
    )
    refused(InputError, r"lacks 1 weights.*classifier\.weight", exact(), model, TEXT_ROWS, tmp_path)


def test_weights_whose_values_the_model_changes_have_no_statistics(folders: Mapping[str, Path]) -> None:
    folder = models.open_folder(folders["llama"])
    model = models.load_model(folder)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(2)
    names = naming.checked(naming.names_of(model, naming.shapes(folder.checkpoint)), model, folder.checkpoint)
    assert list(names.lost) == ["model.layers.1.mlp.up_proj.weight"] and "values" in next(iter(names.lost.values()))


def test_a_stage_that_is_asked_to_stop_writes_nothing(folders: Mapping[str, Path], tmp_path: Path) -> None:
    import threading

    stop = threading.Event()
    with pytest.raises(Interrupted):
        collected(exact(), folders["llama"], TEXT_ROWS, tmp_path, stop=stop, progress=stop.set)
    assert not (tmp_path / "made.safetensors").exists()


def test_torch_has_its_threads_back_after_a_stage(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    collected(exact(), mlp(tmp_path / "mlp"), numbers(3), tmp_path)
    assert torch.get_num_threads() == before


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without transformers' remarks on made-up models."""
    with models.quietly():
        yield


# What a class has and a checkpoint has not


def test_a_head_above_a_pooler_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """What is not there would be random, and so what comes out of the model; of one without a head nobody uses it."""
    folder = saved(tmp_path / "bert", "bert")
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: one for name, one in state.items() if "pooler" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=r"lacks 2 weights that BertForSequenceClassification has: bert\.pooler"):
        models.load_model(models.open_folder(folder))
    bare = {
        name.removeprefix("bert."): one
        for name, one in state.items()
        if name.startswith("bert.") and "pooler" not in name
    }
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert models.load_model(models.open_folder(folder)) is not None


@pytest.mark.parametrize("kind", models._OFFSET)
def test_the_context_of_models_whose_places_begin_behind_padding(tmp_path: Path, kind: str) -> None:
    more: dict[str, Any] = {
        "luke": {"entity_vocab_size": 10, "entity_emb_size": 8}, "longformer": {"attention_window": 4},
        "xmod": {"languages": ["en"], "default_language": "en"},
        "esm": {"position_embedding_type": "absolute", "mask_token_id": 3},
    }.get(kind, {})  # fmt: skip
    sizes = {"vocab_size": 40, "num_hidden_layers": 1, "max_position_embeddings": 20, "pad_token_id": 1}
    config = transformers.AutoConfig.for_model(kind, **sizes, **SMALL, **more)
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    context = models.open_folder(tmp_path).context
    assert context == 18
    model(input_ids=torch.full((1, context), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, context + 1), 5))


def test_a_model_that_continues_texts_beside_images_has_no_encoder_apart(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((saved(tmp_path / "t5", "t5") / "model.safetensors").read_bytes())
    told = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert models.open_folder(tmp_path).task == "causal"
    config = json.loads((tmp_path / "t5/config.json").read_text())
    (tmp_path / "t5/config.json").write_text(
        json.dumps({key: one for key, one in config.items() if key != "is_encoder_decoder"})
    )
    assert models.open_folder(tmp_path / "t5").task == "seq2seq"


def test_ids_that_a_model_has_no_row_for_are_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama", llama(vocab_size=20))
    refused(InputError, "its tokenizer gives the id 44, and the model knows 20", exact(), folder, TEXT_ROWS, tmp_path)


def test_a_model_that_is_padded_on_the_left_is_not_padded_on_the_right(tmp_path: Path) -> None:
    """Its layers see (tokens, examples, channels): with as many of both, padding would be taken for tokens."""
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 24,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    model = transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**sizes))
    folder = saved(tmp_path / "xlnet", "xlnet", model)
    rows = [{"text": text} for text in ("w4 w5 w6", "w7 w8", "w9")]
    for size in (2, 3):
        refused(InputError, "Set `batch_size: 1`", Gram(codec="float32", batch_size=size), folder, rows, tmp_path)
    assert collected(Gram(codec="float32", batch_size=1), folder, rows, tmp_path).facts.n_examples == 3
