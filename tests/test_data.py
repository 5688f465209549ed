"""Rows as people have them: every kind of file, cut, of odd encodings, empty, huge; read, left out with a count, or refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mergeflow.errors import InputError, MachineError, MergeflowError, RecipeError
from mergeflow.recipe.grammar import DataSource
from mergeflow.stages import data, models
from tests.test_collecting import NAMED, SMALL, mlp, numbers, saved, tokenizer

pytest.importorskip("transformers", reason="running models needs transformers")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> models.Folder:
    """A classifier of texts."""
    import transformers

    path = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=24, **NAMED, **SMALL)
    saved(path, "bert", transformers.BertForSequenceClassification(config))
    return models.open_folder(path)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> models.Folder:
    """A classifier of six numbers."""
    return models.open_folder(mlp(tmp_path_factory.mktemp("mlp")))


def read(path: Path, model: models.Folder, **more: Any) -> data.Examples:
    return data.read_examples(DataSource(path=path.name, **more), path.parent, model)


def rows(path: Path, **more: Any) -> tuple[list[Mapping[str, Any]], data.Counts]:
    counts = data.Counts()
    source = DataSource(path=path.name, **more)
    return [row.fields for row in data.read_rows(source, path.parent, counts)], counts


# Anything at all


GOOD: dict[str, bytes] = {
    "jsonl": b'{"text": "w4 w5", "label": "good"}\n{"text": "w6", "label": "bad"}\n',
    "json": b'[{"text": "w4 w5", "label": "good"}, {"text": "w6", "label": "bad"}]',
    "csv": b'text,label\r\n"w4, w5",good\r\n"w6 ""w7""",bad\r\n',
    "tsv": b"text\tlabel\nw4 w5\tgood\n",
    "txt": "w4 w5\nw6 \u00e4\u00f6\n".encode(),
}


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of some kind: whole, cut, with bytes turned, put in or taken out, or bytes of no kind at all."""
    kind = draw(st.sampled_from(sorted(GOOD)))
    content = bytearray(GOOD[kind])
    how = draw(st.sampled_from(["noise", "cut", "turn", "insert", "repeat"]))
    at = draw(st.integers(0, len(content)))
    if how == "noise":
        content = bytearray(draw(st.binary(max_size=60)))
    elif how == "cut":
        del content[at:]
    elif how == "turn" and at < len(content):
        content[at] ^= draw(st.integers(1, 255))
    elif how == "insert":
        odd = [b"\0", b"\r", b'"', b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, b"9" * 5000, b"\\ud800", b"1e999", b"NaN"]
        content[at:at] = draw(st.sampled_from(odd))
    else:
        content = content * draw(st.integers(2, 5))
    return kind, bytes(content)


@given(damaged(), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(("json", b"[" * 200_000), True)
@example(("jsonl", b'{"text": ' * 200_000), True)
@example(("jsonl", b'{"text": "\\ud800"}'), False)
@example(("csv", b'text,label\n"w4'), True)
@example(("csv", b"text,text\nw4,w5\n"), False)
@example(("txt", "w4 \u2028 w5".encode("utf-16")), False)
def test_any_bytes_are_rows_or_left_out_or_refused_by_name(
    bert: models.Folder, tmp_path: Path, made: tuple[str, bytes], labelled: bool
) -> None:
    kind, content = made
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content)
    try:
        found = read(path, bert, **({"label": "label"} if labelled else {}))
    except MergeflowError as error:
        assert isinstance(error, InputError | RecipeError), error
        assert path.name in str(error)
        assert len(str(error)) < 1500
        return
    assert found.examples
    assert all(one.ids and one.where.startswith(path.name) for one in found.examples)
    assert found.counts.unusable == 0 or found.counts.first_unusable.startswith(path.name)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=12,
))  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_field_of_any_value_is_used_or_left_out(
    features: models.Folder, bert: models.Folder, tmp_path: Path, value: Any
) -> None:
    for model, name in ((features, "features"), (bert, "text")):
        path = tmp_path / "rows.jsonl"
        good = {"features": [0.5] * 6, "text": "w4"}
        path.write_text(json.dumps({name: value}) + "\n" + json.dumps(good) + "\n")
        found = read(path, model)
        assert len(found.examples) + found.counts.unusable == 2
        assert found.examples[-1].where == "rows.jsonl:2"


# Encodings


def test_utf8_with_and_without_a_mark_reads_the_same_and_other_encodings_are_refused(tmp_path: Path) -> None:
    text = '{"text": "Grüße, 世界 🙂"}\n'
    for name, encoding in (("plain", "utf-8"), ("mark", "utf-8-sig")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text, encoding=encoding)
        assert rows(path)[0] == [{"text": "Grüße, 世界 🙂"}]
    for ending in ("jsonl", "csv", "txt", "json"):
        for encoding in ("utf-16", "latin-1"):
            path = tmp_path / f"other.{ending}"
            path.write_text("Grüße", encoding=encoding)
            with pytest.raises(InputError, match=rf"other\.{ending}.*is not UTF-8"):
                rows(path)


def test_line_ends_of_every_system_end_a_row(tmp_path: Path) -> None:
    for end in (b"\n", b"\r\n", b"\r"):
        path = tmp_path / "a.txt"
        path.write_bytes(end.join([b"one", b"", b"  ", b"two \xe2\x80\xa8 still two"]) + end)
        assert [row["text"] for row in rows(path)[0]] == ["one", "two \u2028 still two"]


# Empty and huge


@pytest.mark.parametrize("ending", [*GOOD, "parquet", "png"])
def test_an_empty_file_or_folder_has_no_usable_row(ending: str, bert: models.Folder, tmp_path: Path) -> None:
    (tmp_path / f"a.{ending}").write_bytes(b"")
    with pytest.raises(MergeflowError) as refused:
        read(tmp_path / f"a.{ending}", bert)
    assert f"a.{ending}" in str(refused.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="holds no data"):
        read(tmp_path / "folder", bert)


def test_a_huge_row_is_cut_to_the_context_and_a_line_without_end_is_refused(
    bert: models.Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "w5 " * 100_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long}) + '\n{"text": "w4"}\n')
    (tmp_path / "a.csv").write_text(f'text\n"{long}"\nw4\n')
    for name in ("a.jsonl", "a.csv"):
        found = read(tmp_path / name, bert)
        assert [len(one.ids) for one in found.examples] == [24, 3]
        assert found.counts.cut == 1
    monkeypatch.setattr(data, "MOST_LINE", 1000)
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(InputError, match=name):
            read(tmp_path / name, bert)


# CSV


def test_rows_of_csv_with_another_number_of_fields_are_left_out_and_an_open_quote_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one, two",x\nshort\nlong,y,z\n"a\nb",w\n')
    found, counts = rows(path)
    assert found == [{"text": "one, two", "label": "x"}, {"text": "a\nb", "label": "w"}]
    assert (counts.unusable, counts.first_unusable) == (2, "a.csv:3: has another number of fields than the first line")
    path.write_text('text,label\n"never closed,x\nmore,y\n')
    with pytest.raises(InputError, match=r"a\.csv:2: is not CSV"):
        rows(path)
    path.write_text("text,text\none,two\n")
    with pytest.raises(InputError, match=r"names the column 'text' twice"):
        rows(path)


# Parquet, images and hub data sets


def test_parquet_of_texts_numbers_and_labels_is_read_and_a_damaged_one_is_refused(
    bert: models.Folder, features: models.Folder, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is not tested: pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = [{"text": f"w{4 + i}", "label": "good", "features": [float(i)] * 6} for i in range(5)]
    table[3] |= {"text": None, "features": None}
    parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=2)
    found = read(path, bert, label="label")
    assert [one.where for one in found.examples] == [f"a.parquet:{i}" for i in (1, 2, 3, 5)]
    assert found.counts.unusable == 1
    assert [one.label for one in found.examples] == [2] * 4
    assert len(read(path, features).examples) == 4
    whole = path.read_bytes()
    for at in (0, 4, len(whole) // 2, len(whole) - 6):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            read(path, bert)
        except MergeflowError as error:
            assert isinstance(error, InputError)
            assert "a.parquet" in str(error)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.parquet.*is not Parquet"):
        read(path, bert)


def test_images_of_parquet_and_of_folders_are_read_and_damaged_ones_left_out(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="images are not tested: Pillow is not installed")
    model = models.open_folder(mlp(tmp_path / "mlp"))
    pixels = np.arange(0, 252, 42, dtype=np.uint8).reshape(2, 3)
    for label in ("0", "2"):
        (tmp_path / "images" / label).mkdir(parents=True)
        image.fromarray(pixels).save(tmp_path / "images" / label / "a.png")
    png = (tmp_path / "images" / "0" / "a.png").read_bytes()
    (tmp_path / "images" / "2" / "cut.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "images" / "2" / "text.jpg").write_text("no image")
    (tmp_path / "images" / "2" / "empty.gif").write_bytes(b"")
    image.fromarray(pixels[:, :2]).save(tmp_path / "images" / "2" / "small.bmp")
    found = read(tmp_path / "images", model, label="label")
    assert [(one.where, one.label) for one in found.examples] == [("0/a.png", 0), ("2/a.png", 2)]
    assert found.counts.unusable == 4
    (tmp_path / "images" / "more.csv").write_text("text\n")
    with pytest.raises(InputError, match="several kinds: csv, images"):
        read(tmp_path / "images", model, label="label")
    assert len(read(tmp_path / "images", model, label="label", kind="images").examples) == 2
    pyarrow = pytest.importorskip("pyarrow", reason="images in Parquet are not tested: pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = [{"image": {"bytes": png, "path": None}, "label": 1}, {"image": {"bytes": b"no", "path": None}, "label": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "i.parquet")
    told = read(tmp_path / "i.parquet", model, label="label")
    assert [(one.where, one.label) for one in told.examples] == [("i.parquet:1", 1)]
    assert told.counts.unusable == 1
    assert (told.examples[0].values == found.examples[0].values).all()


def test_a_data_set_of_the_datasets_package_is_read_by_its_split(
    bert: models.Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="hub data sets are not tested: datasets is not installed")
    made = datasets.Dataset.from_list([{"text": "w4 w5", "label": "good"}, {"text": None, "label": "bad"}])
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(name: str, **more: Any) -> Any:
        asked.append((name, more))
        if more["split"] != "train":
            raise ValueError(f'Unknown split "{more["split"]}"')
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "someone/texts", "revision": "abc", "label": "label"}
    found = data.read_examples(DataSource(split="train", **source), tmp_path, bert)
    assert asked == [("someone/texts", {"split": "train", "revision": "abc"})]
    assert [(one.where, one.label) for one in found.examples] == [("someone/texts[train]:1", 2)]
    assert found.counts.unusable == 1
    with pytest.raises(RecipeError, match="split"):
        data.read_examples(DataSource(**source), tmp_path, bert)
    with pytest.raises(InputError, match=r"someone/texts.*Unknown split"):
        data.read_examples(DataSource(split="tran", **source), tmp_path, bert)


@pytest.mark.parametrize(("package", "name", "words"), [
    ("datasets", "someone/texts", r"mergeflow\[datasets\]"),
    ("pyarrow", "a.parquet", "pip install pyarrow"),
    ("PIL", "a.png", "pip install pillow"),
])  # fmt: skip
def test_a_package_that_is_not_installed_is_named(
    package: str, name: str, words: str, features: models.Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MachineError, match=words):
        data.read_examples(DataSource(path=name, split="train"), tmp_path, features)


# What is no data


def test_what_is_no_file_of_rows_is_refused(bert: models.Folder, tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        read(tmp_path / "pipe.jsonl", bert)
    (tmp_path / "a.xyz").write_text("w4\n")
    with pytest.raises(InputError, match=r"'\.xyz'"):
        read(tmp_path / "a.xyz", bert)
    assert len(read(tmp_path / "a.xyz", bert, kind="text").examples) == 1


def test_numbers_that_no_float_holds_are_seen_by_the_collector_and_not_by_the_reader(
    features: models.Folder, tmp_path: Path
) -> None:
    lines = [*numbers(3), {"features": [1e300] * 6}, {"features": [10**400] + [0] * 5}, {"features": ["x"] * 6}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read(tmp_path / "a.jsonl", features)
    assert len(found.examples) == 4
    assert found.counts.unusable == 2
    assert bool(found.examples[3].values.isinf().all())


def test_a_tokenizer_that_gives_no_token_leaves_the_row_out(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=24, **SMALL)
    path = saved(tmp_path / "llama", "llama", transformers.LlamaForCausalLM(config))
    tokenizer(path)
    (tmp_path / "a.jsonl").write_text('{"text": "w4"}\n{"text": "\\u200b"}\n')
    found = read(tmp_path / "a.jsonl", models.open_folder(path))
    assert len(found.examples) + found.counts.unusable == 2
