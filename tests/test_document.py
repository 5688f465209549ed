"""The YAML reader against strangers, and the writer against the reader."""

from __future__ import annotations

import contextlib
import math
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from clock import seconds
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeflow import document
from mergeflow.document import Document, Position, dump_yaml, read_document
from mergeflow.errors import Problems, RecipeError

LIMIT = 0.2  # seconds for any input
MIB = 1 << 20

RECIPE = """\
# yaml-language-server: $schema=../schemas/recipe.schema.json
recipe: 1
name: chat-math
description: A chat model that can count – 数える.
vars: {math_weight: 0.6}
x-rules: &attention ["*.self_attn.*", "*.attention.*"]
x-defaults: &defaults {weight: 0.4, missing: base}

models:
  base: {path: meta-llama/Llama-3.2-1B, revision: 0123}
  chat: org/chat-1b@9f31c2
  math: ./math
  tower: {path: org/vlm, only: "language_model.*", rename: {"language_model.*": "*"}}

nodes:
  skills:
    op: task_arithmetic
    base: base
    inputs:
      - {model: chat, <<: *defaults}
      - model: math
        weight: "${math_weight}"
    scale:
      - {match: "*.mlp.*", value: {gradient: [0.2, 0.8, 5e-1]}}
      - {value: 1.0}
  result:
    op: regmean
    alpha: .9
    only: *attention
    others: {model: skills}
    note: |
      two lines,
      one text
output:
  node: result
  shard_size: 5GB
  dtype: 'bfloat16'
"""


@pytest.fixture(params=["libyaml", "PyYAML's own parser"])
def either_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "libyaml":
        monkeypatch.setattr(document, "_PARSER", yaml.SafeLoader)


def data(text: str | bytes) -> Any:
    return read_document(text, "recipe.yaml").data


def error(text: str | bytes) -> str:
    with pytest.raises((RecipeError, Problems)) as caught:
        read_document(text, "recipe.yaml")
    assert caught.value.exit_code == 2
    for line in str(caught.value).split("\n"):
        assert re.match(r"recipe\.yaml:[1-9][0-9]*:[1-9][0-9]*: .", line), line
    return str(caught.value)


# What comes out


@pytest.mark.usefixtures("either_parser")
def test_a_recipe_becomes_plain_data() -> None:
    read = data(RECIPE)
    assert " ".join(read) == "recipe name description vars x-rules x-defaults models nodes output"
    assert read["nodes"]["skills"]["inputs"][0] == {"weight": 0.4, "missing": "base", "model": "chat"}
    assert read["nodes"]["skills"]["scale"][0] == {"match": "*.mlp.*", "value": {"gradient": [0.2, 0.8, 0.5]}}
    assert read["nodes"]["result"]["only"] == ["*.self_attn.*", "*.attention.*"]
    assert read["nodes"]["result"]["note"] == "two lines,\none text\n"
    assert read["output"] == {"node": "result", "shard_size": "5GB", "dtype": "bfloat16"}


@pytest.mark.usefixtures("either_parser")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, None) for word in ("", "~", "null", "Null", "NULL")],
        *[(word, True) for word in ("true", "True", "TRUE")],
        *[(word, False) for word in ("false", "False", "FALSE")],
        *[(word, word) for word in ("yes", "no", "on", "off", "y", "N", "tRUE", "nUll", "None")],
        *[("0", 0), ("-12", -12), ("+7", 7), ("0123", 123), ("0o17", 15), ("0x1F", 31), ("-0", 0)],
        *[(str(2**63 - 1), 2**63 - 1), (str(-(2**63)), -(2**63)), ("0x7fffffffffffffff", 2**63 - 1)],
        *[("1e-5", 1e-5), (".5", 0.5), ("1.", 1.0), ("+1.5E3", 1500.0), ("-0.0", -0.0), ("1e3", 1000.0), ("-.5", -0.5)],
        *[(word, word) for word in ("1_000", "0b11", "0x", "0o8", "-0x10", "1e", "e5", ".", "-.e1", "12:30:45", "1,5")],
        *[(word, word) for word in ("2024-01-01", "5GB", "4e20de3", "8-23", "${v}", "./math", "~/x", "=", "١٢")],
        *[
            ('"1"', "1"),
            ("'no'", "no"),
            ('"null"', "null"),
            ('""', ""),
            ('"a\\tb\\u00e9"', "a\tbé"),
            ("'it''s'", "it's"),
        ],
    ],
)
def test_scalars_follow_the_yaml_1_2_core_schema_and_quoted_ones_are_text(text: str, value: Any) -> None:
    got = data(f"a: {text}")["a"]
    assert (type(got), repr(got)) == (type(value), repr(value))


@pytest.mark.parametrize("text", [".inf", "-.Inf", "+.INF", ".nan", ".NaN", "1e999", "-1e400", "9" * 500 + ".0"])
def test_numbers_must_be_finite(text: str) -> None:
    assert "recipe.yaml:1:4: numbers must be finite" in error(f"a: {text}")


@pytest.mark.parametrize("text", [str(2**63), str(-(2**63) - 1), "0xffffffffffffffff", "1" * 5000, "0o" + "7" * 40])
def test_integers_have_at_most_64_bits(text: str) -> None:
    assert "has more than 64 bits" in error(f"a: {text}")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_none(text: str) -> None:
    read = read_document(text, "r.yaml")
    assert read.data is None
    assert read.where(("a",)).startswith("r.yaml:")


def test_bytes_and_text_with_or_without_a_byte_order_mark_read_alike() -> None:
    assert data(RECIPE) == data(RECIPE.encode()) == data("\ufeff" + RECIPE) == data(b"\xef\xbb\xbf" + RECIPE.encode())
    assert data(RECIPE) == data(RECIPE.replace("\n", "\r\n"))


def test_plain_scalars_keep_their_text_and_quoted_ones_have_none() -> None:
    read = read_document("a: 0123\nb: [1e-5, '7', x]\nc:\n", "r.yaml")
    assert dict(read.texts) == {("a",): "0123", ("b", 0): "1e-5", ("b", 2): "x", ("c",): ""}


def test_every_key_and_value_has_a_position() -> None:
    read = read_document("a: 1\nb:\n  - x\n  - {c: [2]}\n", "r.yaml")
    assert dict(read.keys) == {("a",): Position(1, 1), ("b",): Position(2, 1), ("b", 1, "c"): Position(4, 6)}
    assert dict(read.positions) == {
        (): Position(1, 1),
        ("a",): Position(1, 4),
        ("b",): Position(3, 3),
        ("b", 0): Position(3, 5),
        ("b", 1): Position(4, 5),
        ("b", 1, "c"): Position(4, 9),
        ("b", 1, "c", 0): Position(4, 10),
    }
    assert list(read.positions)[:3] == [(), ("a",), ("b",)]
    assert len(read.positions) == 7
    for absent in [("z",), ("b", 7), ("b", -1), ("b", True), ("a", "x"), ("b", "0")]:
        assert absent not in read.positions


def test_columns_count_characters() -> None:
    assert read_document("é𝒳数: {a: 1}", "r.yaml").where(("é𝒳数", "a")) == "r.yaml:1:10"


def test_where_falls_back_to_the_nearest_parent() -> None:
    read = read_document("a:\n  b: {c: 1}\n", "r.yaml")
    assert read.where(("a", "b", "c")) == "r.yaml:2:10"
    assert read.where(("a", "b", "c"), key=True) == "r.yaml:2:7"
    assert read.where(("a", "b", "z", 3)) == "r.yaml:2:6"
    assert read.where(("a", "b", "z", 3), key=True) == "r.yaml:2:3"
    assert read.where(()) == read.where(("z",), key=True) == "r.yaml:1:1"
    assert Document("r.yaml", {}, {}, {}, {}).where(("a",)) == "r.yaml"


def test_nothing_shares_a_part_with_what_an_alias_repeats() -> None:
    read = data("a: &a {x: [1]}\nb: *a\nc: {<<: *a, y: 2}\n")
    read["a"]["x"].append(2)
    assert read["b"] == {"x": [1]}
    assert read["c"] == {"x": [1], "y": 2}


def test_an_alias_has_its_own_position_and_its_parts_have_theirs() -> None:
    read = read_document("x: &a\n  - 1\nb: *a\n", "r.yaml")
    assert read.where(("b",)) == "r.yaml:3:4"
    assert read.where(("b", 0)) == "r.yaml:2:5"
    assert read.texts["b", 0] == "1"


@pytest.mark.usefixtures("either_parser")
def test_merged_keys_give_way_to_the_mappings_own_and_then_to_the_first_source() -> None:
    text = (
        "x: &x {a: 1, b: 1, c: 1}\ny: &y {b: 2, c: 2, d: 2}\nz: {c: 3, <<: [*y, *x], e: 3}\nw: {<<: {a: 4}, '<<': 5}\n"
    )
    read = read_document(text, "r.yaml")
    assert read.data["z"] == {"a": 1, "b": 2, "c": 3, "d": 2, "e": 3}
    assert read.data["w"] == {"a": 4, "<<": 5}
    assert read.where(("z", "b")) == "r.yaml:2:11"
    assert read.where(("z", "b"), key=True) == "r.yaml:2:8"
    assert read.where(("z", "c")) == "r.yaml:3:8"
    assert ("z", "<<") not in read.positions


def test_a_merge_takes_mappings_once() -> None:
    assert "'<<' takes a mapping or a list of mappings" in error("a: &a [1]\nb: {<<: *a}")
    assert "'<<' takes a mapping" in error("b:\n  <<: 1")
    assert "'<<' is here twice" in error("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a")


# What is refused, and how it reads


@pytest.mark.usefixtures("either_parser")
@pytest.mark.parametrize(
    ("text", "where", "pattern"),
    [
        ("only: *.mlp.*", "1:7", "*.mlp.*"),
        ("only: *attention", "1:7", "*attention"),
        ("match: [*.mlp.*]", "1:9", "*.mlp.*"),
        ("match: ['a', *.mlp.*, b]", "1:14", "*.mlp.*"),
        ("a:\n  only: *", "2:9", "*"),
        ("r: {*.a: b}", "1:5", "*.a"),
    ],
)
def test_an_unquoted_star_says_that_patterns_need_quotes(text: str, where: str, pattern: str) -> None:
    said = error(text)
    assert said.startswith(f"recipe.yaml:{where}: ")
    assert f"A pattern that starts with '*' needs quotes: \"{pattern}\"." in said


def test_an_unknown_alias_names_the_nearest_anchor() -> None:
    assert error("x: &attention [a]\nb: *atention").endswith("Did you mean 'attention'?")


@pytest.mark.usefixtures("either_parser")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("match: @vocab", "1:8: a text cannot start with '@'. Put it in quotes: \"@vocab\"."),
        ("a:\n\tb: 1", "2:1: a tab stands where only spaces may: YAML is indented by spaces."),
        ("a:\n  b: 1\n\tc: 2", "3:1: a tab stands where only spaces may"),
        ("a: {q,k}_proj.*", "1:9: nothing can follow the closing }. A text that starts with a bracket needs quotes"),
        ("a: 'x' y", "1:8: nothing can follow the closing '."),
        ('a: "x\n\n', "1:4: this quote is never closed"),
        ("a: [1, 2", "1:4: this list is never closed. Write ']' at its end."),
        ("a:\n  {b: 1,\n", "2:3: this mapping is never closed. Write '}' at its end."),
        ("a: [1, 2\nb: 3\nc: [", "2:2: ',' or ']' should stand here, in the list that starts in line 1."),
        ("a: b: c", "1:5: this ':' makes no key here."),
        ("a: 1\n b: 2", "2:3: this ':' makes no key here. Check the indentation"),
        ("a: 1\nb 2\nc: 3", "3:1: there is no ':' behind this key."),
        ("- a\nb: c", "2:1: '- ' should stand here. Check the indentation"),
        ("a:\n  - b\n - c", "3:2: 'key: value' should stand here. Check the indentation"),
        ("a: }", "1:4: a value is missing here."),
        ("a: - b", "1:4: a list cannot start here."),
        ("a: >x\n y", "1:5: only line breaks and a comment can follow '|' or '>'."),
        ("  a: 1\nb: 2", "2:1: the document has ended before this line."),
        ("a: &b.c d", "1:6: this is no name of an anchor. Put a text that starts with '&' in quotes."),
        ('a: "\\q"', ": this is no escape of double quotes."),
        ("k" * 1100 + ": 1", "1:1101: a key has more than 1,000 characters"),
        ("a: 1\n---\nb: 2", "2:1: a second document starts here. Keep one document in a file."),
        ("a: 1\nb: 2\na: 3", "3:1: the key 'a' is here twice, in lines 1 and 3. Keep one of them."),
        ("{a: 1, a: 2}", "1:8: the key 'a' is here twice, in line 1."),
        ("1: x", "1:1: the key '1' is read as a number, and keys are texts. Put it in quotes: \"1\"."),
        ("1e999: x", "1:1: the key '1e999' is read as a number"),
        ("true: x", "1:1: the key 'true' is read as true or false"),
        ("null: x", "1:1: the key 'null' is read as null"),
        ("{: x}", "1:2: there is no key before this ':'"),
        ("a: b\n: x", "2:1: there is no key before this ':'"),
        ("? \n: x", ": there is no key before this ':'"),
        ("~: x", "1:1: the key '~' is read as null"),
        ("a: [b: [1, {c", "1:12: this mapping is never closed."),
        ("[a]: x", "1:1: a list or a mapping stands where a key must be."),
        ("a: !!python/object/apply:os.system [x]", "1:4: tags such as 'tag:yaml.org,2002:python/object/apply:os."),
        ("a: ! b", "1:4: tags such as '!' are not accepted."),
        ("a: &x [*x]", "1:8: '*x' stands inside the value it names"),
        ("a: &x 1\nb: &x 2", "2:4: the anchor '&x' was already set in line 1"),
        ("%YAML 1.1\n---\na: no", "1:1: a line that starts with '%' is a YAML directive."),
    ],
)
def test_what_is_wrong_is_said_in_plain_words_with_its_position(text: str, said: str) -> None:
    assert said in error(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: b\nc: \xff", "2:4: byte 0xff is not UTF-8. Save the file as UTF-8."),
        (b"\xef\xbb\xbfa: b\nc: \xc3", "2:4: byte 0xc3 is not UTF-8."),
        ("a: b".encode("utf-16"), "1:1: byte 0xff is not UTF-8."),
        ("a: 1\r\nb: \x00", "2:4: the character U+0000 is not allowed here. Take it out."),
        ("a: \x1b[2J", '1:4: the character U+001B is not allowed here. Take it out, or write it as "\\u001b"'),
        ("a: 1 # x\u2028evil: 2", "1:9: the character U+2028"),
        ("a: 1 # x\x85evil: 2", "1:9: the character U+0085"),
        ("a: \u202eb", "1:4: the character U+202E"),
        ("a: \ud800", "1:4: the character U+D800"),
        ("a: \ufeffb", "1:4: the character U+FEFF"),
        ('a: "\\0"', "1:4: this text holds an escaped NUL"),
    ],
)
def test_bytes_and_characters_that_no_editor_shows_are_refused(text: str | bytes, said: str) -> None:
    assert f"recipe.yaml:{said}" in error(text)


def test_several_problems_are_reported_together_in_the_order_of_the_file() -> None:
    said = error("a: .inf\nb: 1\nb: 2\n3: x\nc: *nope\nd: }\n").split("\n")
    assert [line.split(":")[1] for line in said] == ["1", "3", "4", "5", "6"]
    assert len(error("a: 1\n" * 1000).split("\n")) == document.MAX_PROBLEMS


def test_the_parser_without_libyaml_leaks_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "_PARSER", yaml.SafeLoader)
    for text in ['a: "\\UFFFFFFFF"', 'a: "\\ud800"', "a: |99\n x", "[" * 3000, "- " * 3000]:
        error(text)


# Bounds


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_the_bounds_are_where_they_are_said_to_be() -> None:
    assert data(nested(32))
    assert "nested more than 32 deep" in error(nested(33))
    assert "nested more than 32 deep" in error("a: &a " + nested(20) + "\nb: " + "[" * 12 + "*a" + "]" * 12)
    assert len(data("- a\n" * 49_990)) == 49_990
    assert "more than 50,000 keys, values and brackets" in error("- a\n" * 50_000)
    assert len(data("a: &a x\nb: [" + "*a, " * 200 + "]")["b"]) == 200
    assert "more than 200 aliases" in error("a: &a x\nb: [" + "*a, " * 201 + "]")
    assert data("#" * MIB) is None
    assert "at most 1 MiB" in error("#" * (MIB + 1))
    assert "at most 1 MiB" in error("#" + "é" * (MIB // 2))
    big = "a: &a [" + "x, " * 10_000 + "]\n"
    assert len(data(big + "b: [*a, *a, *a]\n")["b"]) == 3
    assert "aliases make this file more than 50,000 values" in error(big + "b: [*a, *a, *a, *a]\n")
    assert "aliases make this file more than 50,000 values" in error(
        big + "b: [*a, *a, *a]\nc: [" + "x, " * 20_000 + "]"
    )


BOMBS: dict[str, str | bytes] = {
    "100,000 open lists": "[" * 100_000,
    "a megabyte of open lists": "[" * MIB,
    "open mappings": "{a: " * (MIB // 4),
    "nested items": "- " * 100_000,
    "nested complex keys": "? " * (MIB // 2),
    "billion laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "laughing merges": "a: &a {" + ", ".join(f"k{i}: 1" for i in range(9000)) + "}\n" + "b: {<<: *a}\n" * 150,
    "depth by aliases": "a0: &a0 x\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(150)),
    "a huge key": "k" * (MIB - 3) + ": 1",
    "a huge scalar": "a: " + "x" * (MIB - 3),
    "a huge quoted scalar": 'a: "' + "\\n" * (MIB // 2 - 3) + '"',
    "a huge folded scalar": 'a: "' + "x\n " * (MIB // 3 - 3) + '"',
    "a huge block": "a: |\n" + "  x\n" * (MIB // 4 - 3),
    "a huge alias": "a: *" + "a" * (MIB - 5),
    "a huge integer": "a: " + "9" * (MIB - 3),
    "a huge hexadecimal": "a: 0x" + "f" * (MIB - 5),
    "a huge float": "a: 0." + "9" * (MIB - 5),
    "almost a number": "a: " + "9" * (MIB - 4) + "x",
    "as many items as may be": "[" + "1," * 49_990 + "]",
    "as many keys as may be": "".join(f"k{i}: v\n" for i in range(24_990)),
    "as many anchors as may be": "".join(f"- &a{i} x\n" for i in range(49_900)),
    "too many items": "- a\n" * (MIB // 4),
    "long duplicate keys": ("k" * 900 + ": 1\n") * 1100,
    "anchors that look alike": "".join(f"- &{'ab' * 18}{i:02} x\n" for i in range(30))
    + "".join(f"- *{'ba' * 18}{i}\n" for i in range(30)),
    "directives that libyaml compares pairwise": "".join(f"%TAG !a{i}! b\n" for i in range(60_000)),
    "an error after a million lines": "\n" * (MIB - 1) + "@",
    "tabs": "\t" * MIB,
    "carriage returns": "\r" * MIB,
    "a bad last byte": "é".encode() * (MIB // 2 - 1) + b"\xff",
}


def read_or_refuse(text: str | bytes) -> None:
    with contextlib.suppress(RecipeError, Problems):
        read_document(text, "recipe.yaml")


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_answered_in_time(name: str) -> None:
    assert seconds(lambda: read_or_refuse(BOMBS[name]), LIMIT) < LIMIT
    try:
        read_document(BOMBS[name], "recipe.yaml")
    except (RecipeError, Problems):
        # A message shows at most 60 characters of what a stranger wrote.
        assert all(len(line) < 400 for line in error(BOMBS[name]).split("\n"))


def test_a_recipe_loads_in_ten_milliseconds() -> None:
    assert seconds(lambda: read_or_refuse(RECIPE), 0.01) < 0.01


SNIPPETS = re.findall(r"\S+", "[ ] { } : , - ? * & ! | > ' \" % @ ` # << ~ .inf 1e999 0x *a &a !!x ${v} null true")
SNIPPETS += ["\t", "\n", "\r", "\n---\n", "\n...\n", ": ", "- ", "<<: *defaults", "&attention ", "\x00", "\u2028", "é"]


def mutated(rng: random.Random) -> bytes:
    """The recipe after one to six small accidents."""
    raw = bytearray(RECIPE.encode())
    for _ in range(rng.randint(1, 6)):
        at, to = rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            raw[at:at] = rng.choice(SNIPPETS).encode()
        elif kind == 2:
            del raw[at : at + rng.randint(1, 8)]
        elif kind == 3:
            raw[at:at] = raw[to : to + rng.randint(1, 80)]
        elif kind == 4:
            raw[at : at + 1] = bytes([rng.randrange(32, 127)])
        else:
            del raw[at:]
        raw = raw or bytearray(b" ")
    return bytes(raw)


def plain_parts(value: Any) -> Iterator[Any]:
    yield value
    for part in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from plain_parts(part)


def fuzz(trials: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(trials):
        raw = mutated(rng)
        start = time.perf_counter()
        try:
            read = read_document(raw, "recipe.yaml")
        except (RecipeError, Problems) as problem:
            slow = time.perf_counter() - start > LIMIT
            for line in str(problem).split("\n"):
                assert re.match(r"recipe\.yaml:[1-9][0-9]*:[1-9][0-9]*: .", line), (raw, line)
        else:
            slow = time.perf_counter() - start > LIMIT
            kinds = {dict, list, str, int, float, bool, type(None)}
            assert {type(part) for part in plain_parts(read.data)} <= kinds, raw
            assert len(read.positions) == sum(1 for _ in plain_parts(read.data)), raw
            assert repr(data(dump_yaml(read.data))) == repr(read.data), raw
        assert not slow or seconds(lambda: read_or_refuse(raw), LIMIT) < LIMIT, raw  # noqa: B023


def test_mutated_recipes_give_data_or_an_error_with_its_position() -> None:
    fuzz(2_000, seed=1)


# Writing

TRICKY = re.findall(
    r"\S+",
    "1e-5 0x10 no null ~ 1_000 yes on true 0123 .5 .inf .nan - -- -1 +1 1.0 : a: #a a# *a &a !a %a @a `a =  << --- ... "
    "2024-01-01 12:30:45 {a} [a] a,b a: 'a' ? | > ~/x ./x ../x . .. 5GB Null TRUE y N 0o17 0b1 ${v} *.mlp.* a&b",
)
TRICKY += ["", " ", " a", "a ", "a  b", "a #b", "a: b", "a\nb", "a\n", "\n", "\t", "a\tb", '"', "\\", "\\n", "\r\n"]
TRICKY += ["\x7f", "\x85", "\xa0", "\u2028", "\ufeff", "\ufffe", "\U0001f600", "é", "\x1b", "x" * 300, "k" * 1500]

texts = st.one_of(st.sampled_from(TRICKY), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
)
nests = st.recursive(
    scalars,
    lambda parts: st.one_of(st.lists(parts, max_size=6), st.dictionaries(texts, parts, max_size=6)),
    max_leaves=40,
)


@settings(deadline=None, max_examples=300)
@given(nests)
def test_what_is_written_reads_back_the_same(value: Any) -> None:
    text = dump_yaml(value)
    # `repr` tells 1 from 1.0 and True, -0.0 from 0.0, and the order of keys.
    assert repr(data(text)) == repr(value)
    assert text == dump_yaml(data(text))


@pytest.mark.parametrize("value", TRICKY)
def test_tricky_texts_read_back_anywhere_and_in_any_reader(value: str) -> None:
    whole: Any = {value: value, "list": [value, [value]], "map": {"m": {value: value, "n": [{value: value}]}}}
    assert data(dump_yaml(whole)) == whole
    assert data(dump_yaml(value)) == value
    assert yaml.safe_load(dump_yaml(whole)) == whole


def test_numbers_read_back_in_any_reader() -> None:
    numbers = [1e-5, 1e16, 1e300, 5e-324, -0.0, 0.1, 1.0, 100000.0, 1, -(2**63)]
    assert repr(data(dump_yaml(numbers))) == repr(yaml.safe_load(dump_yaml(numbers))) == repr(numbers)


def test_the_resolved_recipe_is_made_to_be_read() -> None:
    assert (
        dump_yaml(data(RECIPE))
        == """\
recipe: 1
name: chat-math
description: "A chat model that can count – 数える."
vars:
  math_weight: 0.6
x-rules: ["*.self_attn.*", "*.attention.*"]
x-defaults:
  weight: 0.4
  missing: base
models:
  base: {path: meta-llama/Llama-3.2-1B, revision: 123}
  chat: org/chat-1b@9f31c2
  math: ./math
  tower: {path: org/vlm, only: "language_model.*", rename: {"language_model.*": "*"}}
nodes:
  skills:
    op: task_arithmetic
    base: base
    inputs: [{weight: 0.4, missing: base, model: chat}, {model: math, weight: "${math_weight}"}]
    scale: [{match: "*.mlp.*", value: {gradient: [0.2, 0.8, 0.5]}}, {value: 1.0}]
  result:
    op: regmean
    alpha: 0.9
    only: ["*.self_attn.*", "*.attention.*"]
    others: {model: skills}
    note: "two lines,\\none text\\n"
output:
  node: result
  shard_size: "5GB"
  dtype: bfloat16
"""
    )


def test_a_line_has_at_most_120_columns_unless_one_text_is_longer() -> None:
    long = {"a": [f"tensor.{i}" for i in range(40)], "b": {"c": {f"key{i}": {"x": [i] * 50} for i in range(9)}}}
    text = dump_yaml(long)
    assert data(text) == long
    assert max(map(len, text.split("\n"))) <= 120


def test_tuples_are_written_as_lists() -> None:
    assert data(dump_yaml({"a": (1, (2, ()))})) == {"a": [1, [2, []]]}


def test_what_the_reader_would_refuse_is_not_written() -> None:
    deep: Any = []
    deep.append(deep)
    bad: list[Any] = [math.inf, math.nan, 2**63, -(10**9999), "a\0", "\ud800", {1: 2}, object(), {"a": {1, 2}}, deep]
    for value in bad:
        with pytest.raises(RecipeError):
            dump_yaml(value)
        with pytest.raises(RecipeError):
            dump_yaml({"a": [{"b": value}]})


def test_what_is_as_deep_as_may_be_is_written_and_read() -> None:
    value: Any = "x" * 200
    for i in range(document.MAX_DEPTH):
        value = [value] if i % 2 else {"k" * (1500 if i % 3 else 1): value}
    assert data(dump_yaml(value)) == value
    with pytest.raises(RecipeError, match="nested more than 32 deep"):
        dump_yaml([value])
