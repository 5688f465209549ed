"""`mergeflow eval`: what it says of a model, held against scikit-learn and against one token at a time in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from mergeflow import cli
from mergeflow.errors import InputError, MergeflowError, NumericError, RecipeError
from mergeflow.evaluating import class_measures, evaluate, evaluation_text, windows_of
from mergeflow.recipe.grammar import DataSource

VOCAB = {"[PAD]": 0, "[UNK]": 1, "[BOS]": 2, **{f"w{i}": i for i in range(3, 32)}}
SIZES = {"input_size": 4, "hidden_size": 6, "num_hidden_layers": 1, "num_labels": 3}
LABELS = {"bad": 0, "fair": 1, "good": 2}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTEXT = 6
TEXTS = ("w4", "w5 w6 w7", "w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20", "w21 w22 w23 w24 w25 w26")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(path))


def write_tokenizer(folder: Path, **special: str) -> None:
    made = Tokenizer(WordLevel(VOCAB, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", **special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def mlp(folder: Path, head: torch.Tensor | None = None) -> Path:
    """A classifier of four numbers with random weights."""
    folder.mkdir()
    config = {"architectures": ["mergeflow_mlp"], "model_type": "mergeflow_mlp", **SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    tensors = {
        "blocks.0.linear.weight": torch.randn(6, 4),
        "blocks.0.linear.bias": torch.randn(6),
        "blocks.0.norm.weight": torch.ones(6),
        "blocks.0.norm.bias": torch.zeros(6),
        "head.weight": torch.randn(3, 6) if head is None else head,
        "head.bias": torch.zeros(3),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def answers(folder: Path, inputs: torch.Tensor) -> torch.Tensor:
    """What the classifier of `mlp` says, from its formula."""
    t = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    hidden = inputs.double() @ t["blocks.0.linear.weight"].T + t["blocks.0.linear.bias"]
    centred = hidden - hidden.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    active = normed * 0.5 * (1 + torch.erf(normed / math.sqrt(2)))
    return (active @ t["head.weight"].T + t["head.bias"]).argmax(1)


def numbers(path: Path, count: int = 50) -> tuple[DataSource, torch.Tensor, list[int]]:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    labels = [int(row.abs().argmax()) % 3 for row in inputs]
    rows = [{"features": row.tolist(), "label": label} for row, label in zip(inputs, labels, strict=True)]
    return write_rows(path, rows), inputs, labels


def llama(folder: Path, *, std: float = 0.4, **special: str) -> Path:
    """A language model with a context of six tokens."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        max_position_embeddings=CONTEXT,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        **SMALL,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std) if std else parameter.zero_()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    write_tokenizer(folder, **special)
    return folder


def bert(folder: Path, kind: Any = transformers.BertForSequenceClassification, **more: Any) -> Path:
    named = {"label2id": LABELS, "id2label": {number: name for name, number in LABELS.items()}}
    config = transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **{**named, **SMALL, **more})
    torch.manual_seed(2)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def surprise(folder: Path, texts: tuple[str, ...], start: int | None) -> tuple[float, int, int]:
    """Nats, tokens and bytes: each token is predicted in a run of its own, from as many before it as its window has."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).double().eval()
    nats, tokens, size = 0.0, 0, 0
    for text in texts:
        ids = ([] if start is None else [start]) + [VOCAB[word] for word in text.split()]
        if start is None:
            nats += math.log(len(VOCAB))
        for place in range(1, len(ids)):
            # The window that predicts `place` ends at a multiple of the context, or at the text's end.
            end = min(math.ceil(place / CONTEXT) * CONTEXT, len(ids) - 1)
            with torch.no_grad():
                logits = model(torch.tensor([ids[max(end - CONTEXT, 0) : place]])).logits[0, -1]
            nats -= float(logits.log_softmax(-1)[ids[place]])
        tokens += len(text.split())
        size += len(text.encode())
    return nats, tokens, size


def call(*words: str) -> None:
    cli.commands.main([*words], prog_name="mergeflow", standalone_mode=False)


def test_accuracy_and_macro_f1_are_those_of_scikit_learn(tmp_path: Path) -> None:
    model = mlp(tmp_path / "model")
    source, inputs, labels = numbers(tmp_path / "rows.jsonl")
    found = evaluate(model, [source], relative_to=tmp_path, batch_size=7).results[0]
    meant = answers(model, inputs).tolist()
    assert 0 < accuracy_score(labels, meant) < 1
    assert found.measures["accuracy"] == pytest.approx(accuracy_score(labels, meant), rel=1e-12)
    assert found.measures["macro_f1"] == pytest.approx(f1_score(labels, meant, average="macro"), rel=1e-12)
    assert (found.n_examples, found.left_out) == (50, 0)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_measures_of_a_table_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    counts = [[0] * 5 for _ in range(5)]
    for label, answer in pairs:
        counts[label][answer] += 1
    labels, given_answers = zip(*pairs, strict=True)
    found = class_measures(counts)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, given_answers))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, given_answers, average="macro", zero_division=0))


def test_texts_are_classified_by_the_names_of_labels_whatever_the_batch(tmp_path: Path) -> None:
    model = bert(tmp_path / "model")
    rows = [{"text": text, "label": name} for text, name in zip(TEXTS, ("bad", "good", "fair", "good"), strict=True)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    net = transformers.BertForSequenceClassification.from_pretrained(model).eval()
    right = 0
    with torch.no_grad():
        for row in rows:
            logits = net(torch.tensor([[VOCAB[word] for word in row["text"].split()]])).logits
            right += int(logits.argmax()) == LABELS[row["label"]]
    for batch_size in (1, 4):
        found = evaluate(model, [source], relative_to=tmp_path, batch_size=batch_size).results[0]
        assert found.measures["accuracy"] == right / len(rows)


@pytest.mark.parametrize("special", [{}, {"bos_token": "[BOS]"}], ids=["nothing stands before a text", "a start token"])
def test_bits_per_byte_and_perplexity_are_those_of_one_token_at_a_time(tmp_path: Path, special: dict[str, str]) -> None:
    model = llama(tmp_path / "model", **special)
    source = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    nats, tokens, size = surprise(model, TEXTS, VOCAB["[BOS]"] if special else None)
    for batch_size in (1, 3):
        found = evaluate(model, [source], relative_to=tmp_path, batch_size=batch_size).results[0]
        assert (found.n_tokens, found.n_bytes, found.n_examples) == (tokens, size, len(TEXTS))
        assert found.measures["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert found.measures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", std=0.0)
    source = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    assert evaluate(model, [source], relative_to=tmp_path).results[0].measures["perplexity"] == pytest.approx(32)


@given(st.integers(0, 60), st.integers(1, 9), st.booleans())
def test_windows_predict_each_token_once_with_all_before_it_that_fits(count: int, longest: int, starts: bool) -> None:
    ids = list(range(100, 100 + count))
    known = [99, *ids] if starts else ids
    windows = list(windows_of("a:1", ids, 99 if starts else None, longest))
    assert [token for window in windows for token in window.targets] == known[1:]
    for window in windows:
        assert len(window.targets) <= len(window.inputs) <= longest
        assert len(window.inputs) == min(longest, known.index(window.targets[-1]))
        assert known[known.index(window.targets[-1]) - 1] == window.inputs[-1]


def test_the_command_says_the_same_as_json_and_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp(tmp_path / "model")
    numbers(tmp_path / "a.jsonl")
    numbers(tmp_path / "b.jsonl", 30)
    words = ["eval", str(model), "--data", str(tmp_path / "a.jsonl"), "--data", str(tmp_path / "b.jsonl"), "-q"]
    call(*words, "--json")
    told = json.loads(capsys.readouterr().out)
    assert [one["n_examples"] for one in told["results"]] == [50, 30]
    both = [one["accuracy"] for one in told["results"]]
    assert told["mean"]["accuracy"] == pytest.approx(sum(both) / 2)
    assert told["kind"] == "classification"
    call(*words)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in table[3:]] == [f"{value:.4f}" for value in [*both, told["mean"]["accuracy"]]]


def test_rows_that_cannot_be_used_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp(tmp_path / "model")
    rows = [{"features": [1, 2, 3, 4], "label": 0}, {"features": [1, 2], "label": 0}, {"features": [0, 0, 1, 1]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    call("eval", str(model), "--data", str(tmp_path / "rows.jsonl"), "--json")
    told = capsys.readouterr()
    assert json.loads(told.out)["results"][0]["left_out"] == 2
    assert "2 rows could not be used" in told.err


def test_the_fields_can_be_named_and_rows_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = bert(tmp_path / "model")
    rows = [{"said": text, "as": 1, "text": "w9", "label": "none"} for text in TEXTS]
    path = str(write_rows(tmp_path / "rows.jsonl", rows).path)
    call("eval", str(model), "--data", path, "--text", "said", "--label", "as", "--limit", "3", "--json", "-q")
    assert json.loads(capsys.readouterr().out)["results"][0]["n_examples"] == 3


def refused(model: Path, source: DataSource, error: type[MergeflowError]) -> str:
    with pytest.raises(error) as caught:
        evaluate(model, [source], relative_to=model.parent)
    return str(caught.value)


def test_a_label_that_the_model_does_not_know_is_refused_with_its_place(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "w5", "label": "good"}, {"text": "w6", "label": "godo"}])
    said = refused(bert(tmp_path / "model"), source, InputError)
    assert "rows.jsonl:2" in said and "'godo'" in said and "'good'" in said


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    model = bert(tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "w5", "label": "good"}])
    assert "tokenizer" in refused(model, source, InputError)


@pytest.mark.parametrize("rows", [[], [{"other": "w5"}], [{"text": "  "}]], ids=["none", "no such field", "no words"])
def test_data_without_usable_rows_is_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert "has no row that can be used" in refused(llama(tmp_path / "model"), source, InputError)


def test_data_that_is_not_there_is_refused_as_a_file(tmp_path: Path) -> None:
    said = refused(mlp(tmp_path / "model"), DataSource(path="nothing.jsonl"), InputError)
    assert "no such file" in said


def test_a_model_without_classes_or_next_tokens_is_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "w5", "label": "good"}])
    assert "neither classes" in refused(bert(tmp_path / "model", transformers.BertModel), source, RecipeError)


def test_a_regression_is_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "w5", "label": 1}])
    model = bert(tmp_path / "model", label2id={"x": 0}, id2label={0: "x"})
    assert "does not choose" in refused(model, source, RecipeError)


def test_a_delta_is_refused(tmp_path: Path) -> None:
    model = mlp(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt", "mergeflow.space": "delta"})
    assert "holds delta" in refused(model, numbers(tmp_path / "rows.jsonl")[0], RecipeError)


def test_a_model_that_gives_nan_is_refused_with_the_row(tmp_path: Path) -> None:
    model = mlp(tmp_path / "model", torch.full((3, 6), torch.inf))
    assert "rows.jsonl:1" in refused(model, numbers(tmp_path / "rows.jsonl")[0], NumericError)


def test_a_table_for_language_models_names_its_measures(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    found = evaluate(llama(tmp_path / "model"), [source, source], relative_to=tmp_path)
    head, *rows = evaluation_text(found).splitlines()[2:]
    assert head.split() == ["data", "examples", "bits", "per", "byte", "perplexity"]
    assert rows[0] == rows[1]
    assert rows[2].split() == ["mean", rows[0].split()[2]]


def test_words_without_a_token_are_no_row(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert", transformers.BertForTokenClassification)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": [" ", "\t"], "label": ["good", "bad"]}) + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: has no token"):
        evaluate(folder, [DataSource(path=str(path), label="label")], relative_to=tmp_path)


def test_tokens_without_any_label_are_no_measure(tmp_path: Path) -> None:
    """Of a text that is cut before its first word, what stands before it alone."""
    folder = bert(tmp_path / "bert", transformers.BertForTokenClassification)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", made.token_to_id("[BOS]"))])
    made.save(str(folder / "tokenizer.json"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": ["w1", "w2"], "label": ["good", "bad"]}) + "\n")
    source = DataSource(path=str(path), label="label")
    assert evaluate(folder, [source], relative_to=tmp_path).results[0].n_tokens == 3
    with pytest.raises(InputError, match="has no token with a label"):
        evaluate(folder, [source], relative_to=tmp_path, max_length=1)
