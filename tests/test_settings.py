"""Settings in their three shapes, the patterns that rules are matched with, and the places they are asked for at."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from clock import seconds
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from mergeflow.errors import RecipeError
from mergeflow.settings import (
    Count,
    Each,
    Flag,
    FloatName,
    Fraction,
    Gradient,
    Number,
    Place,
    Rule,
    Unit,
    constant,
    fall_back,
    matcher,
    matches,
    places,
    rules_in,
    setting_of,
    value_at,
)


def read(value: Any, kind: Any = Number, **options: bool) -> Any:
    return TypeAdapter(setting_of(kind, **options)).validate_python(value)


def fits(pattern: str, name: str) -> bool:
    return matcher(pattern)(Place(name))


def layer(number: int, *stack: int, name: str = "") -> Place:
    return Place(name or f"layers.{number}.w", number, tuple(stack) or (0, 1, 2, 3))


# Shapes.


def test_a_value_a_gradient_and_rules_are_told_apart_by_shape_alone() -> None:
    assert read(0.5) == 0.5
    assert read(1) == 1.0
    assert isinstance(read({"gradient": [0, 1]}), Gradient)
    rules = read([{"match": "*.mlp.*", "value": 0.1}, {"value": {"gradient": [0.0, 1.0]}}])
    assert isinstance(rules, tuple)
    assert value_at(rules, layer(1, name="layers.1.mlp.w")) == 0.1
    assert value_at(rules, layer(3)) == 1.0


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Number, [0, -1.5, 1e300], ["0.5", True, None, float("nan"), float("inf"), [0.1]]),
        (Unit, [0, 1, 0.5], [-0.1, 1.1, "1"]),
        (Fraction, [1e-9, 1], [0, -1, 1.5]),
        (Flag, [True, False], [0, 1, "yes", "true"]),
        (Count, [0, 5], [-1, 1.0, True, 2**63]),
        (FloatName, ["bfloat16", "float8_e5m2"], ["bf16", "int8", 16]),
    ],
)
def test_kinds_take_what_they_say_and_nothing_near_it(kind: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert read(value, kind) == value
        assert value_at(read([{"match": "a", "value": value}, {"value": value}], kind), Place("b")) == value
    for value in bad:
        with pytest.raises(ValidationError):
            read(value, kind)
        with pytest.raises(ValidationError):
            read([{"value": value}], kind)


@pytest.mark.parametrize(
    "value",
    [
        "0.5",
        {"gradient": [0.5]},
        {"gradient": [0.5, "x"]},
        {"gradient": [0, 1], "outsid": 0},
        {"gradient": [0, 1], "over": "8"},
        {"gradient": [0, 1], "over": "-3"},
        {"values": [0, 1]},
        [],
        [0.1, 0.2],
        [{"match": "*", "value": 1}],
        [{"value": 1}, {"match": "*", "value": 2}],
        [{"value": 1}, {"value": 2}],
        [{"match": [], "value": 1}, {"value": 2}],
        [{"match": "", "value": 1}, {"value": 2}],
        [{"match": "{0-", "value": 1}, {"value": 2}],
        [{"match": 3, "value": 1}, {"value": 2}],
        [{"match": "*"}, {"value": 2}],
        [{"value": [{"value": 1}]}],
        None,
        True,
    ],
)
def test_what_is_no_setting_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        read(value)


@pytest.mark.parametrize("value", ["0.5", {"gradient": [0.5, "x", 1.0]}, [{"match": "*", "value": 0.5}], None])
def test_one_wrong_thing_gives_one_line(value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        read(value)
    assert caught.value.error_count() == 1


def test_gradients_are_for_numbers_only() -> None:
    for kind in (Flag, FloatName):
        with pytest.raises(ValidationError):
            read({"gradient": [True, False]}, kind)


def test_a_setting_for_each_input_may_mix_all_shapes() -> None:
    rules = [{"match": "*.mlp.*", "value": 0.1}, {"value": 0.9}]
    found = read([0.5, {"gradient": [0.0, 1.0]}, rules], per_input=True)
    assert isinstance(found, Each)
    assert value_at(found, layer(3)) == (0.5, 1.0, 0.9)
    assert read(rules, per_input=True) == read(rules)
    assert not isinstance(read(rules, per_input=True), Each)
    assert list(map(len, rules_in(found))) == [2]
    assert list(rules_in(0.5)) == []


def test_what_has_one_value_everywhere_is_constant() -> None:
    assert constant(0.5)
    assert constant(Each((0.5, 0.7)))
    assert not constant(read({"gradient": [0, 1]}))
    assert not constant(read([{"value": 1}]))
    assert not constant(Each((0.5, read({"gradient": [0, 1]}))))


# Gradients.


def test_a_gradient_is_linear_between_its_points_and_exact_at_them() -> None:
    stack = tuple(range(5))
    up = read({"gradient": [0.2, 0.8, 0.5]})
    assert [round(value_at(up, layer(number, *stack)), 12) for number in stack] == [0.2, 0.5, 0.8, 0.65, 0.5]
    assert value_at(up, layer(4, *stack)) == 0.5
    assert value_at(up, layer(2, *stack)) == 0.8


def test_a_gradient_starts_at_its_first_point_in_a_stack_of_one() -> None:
    assert value_at(read({"gradient": [0.2, 0.8]}), layer(7, 7)) == 0.2


def test_depth_is_a_rank_and_not_a_number() -> None:
    assert [layer(n, 3, 10, 40).depth for n in (3, 10, 40)] == [0.0, 0.5, 1.0]
    assert Place("norm").depth is None


def test_over_narrows_a_gradient_and_outside_says_the_rest() -> None:
    stack = tuple(range(10))
    part = read({"gradient": [0.0, 1.0], "over": "4-6", "outside": -1.0})
    assert [value_at(part, layer(number, *stack)) for number in (3, 4, 5, 6, 7)] == [-1.0, 0.0, 0.5, 1.0, -1.0]
    assert value_at(part, Place("embed.weight")) == -1.0
    assert value_at(read({"gradient": [0.25, 1.0], "over": "9-99"}), layer(9, *stack)) == 0.25


@pytest.mark.parametrize("value", [{"gradient": [0.5, 1]}, {"gradient": [0.5, 1], "over": "5-9"}])
def test_a_gradient_asked_outside_its_layers_says_what_to_write(value: Any) -> None:
    place = Place("embed.weight") if "over" not in value else layer(0)
    with pytest.raises(RecipeError, match=r"says nothing for .*outside: 0\.5"):
        value_at(read(value), place)


def test_outside_may_be_zero() -> None:
    assert value_at(read({"gradient": [0.5, 1], "outside": 0}), Place("norm")) == 0


# Rules.


def test_the_first_rule_that_fits_wins() -> None:
    rules = read(
        [{"match": ["*.mlp.*", "*.attn.*"], "value": 1}, {"match": "*.attn.q.*", "value": 2}, {"value": 3}], Number
    )
    assert [value_at(rules, Place(name)) for name in ("a.mlp.w", "a.attn.q.w", "norm")] == [1, 1, 3]


def test_a_list_in_a_list_of_patterns_is_laid_flat() -> None:
    rules = read([{"match": [["a", "b"], "c"], "value": 1}, {"value": 2}])
    assert rules[0].match == ("a", "b", "c")


def test_an_inputs_own_setting_wins_and_falls_back_to_the_nodes() -> None:
    node = read([{"match": "*.attn.*", "value": 5}, {"value": 6}])
    own = read([{"match": "*.mlp.*", "value": 1}], open_ended=True)
    whole = fall_back(own, node)
    assert [value_at(whole, Place(name)) for name in ("a.mlp.w", "a.attn.w", "norm")] == [1, 5, 6]
    assert [value_at(fall_back(own, 0.5), Place(name)) for name in ("a.mlp.w", "norm")] == [1, 0.5]
    assert value_at(fall_back(own, read({"gradient": [0, 1], "outside": 7})), Place("norm")) == 7
    assert fall_back(None, node) is node
    assert fall_back(0.3, node) == 0.3
    closed = read([{"match": "*.mlp.*", "value": 1}, {"value": 2}], open_ended=True)
    assert fall_back(closed, node) is closed


def test_a_place_that_no_rule_fits_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no rule fits 'norm'"):
        value_at((Rule[float](match=("*.mlp.*",), value=1.0),), Place("norm"))


# Patterns.


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*", "a . . | anything.at.all | x", ""),
        ("a.b", "a.b", "axb | a.b.c | xa.b | A.b"),
        ("*.mlp.*", "layers.0.mlp.up.weight | .mlp.", "mlp.up | layers.0.mlp | layers.0.MLP.up"),
        ("a*b*c", "abc | aXbYc | abbcc | abcbc", "abcd | xabc | ac"),
        ("**a**", "a | xax", "b"),
        ("*a*a", "aa | xaya", "a | ab"),
        ("layers.{0-3}.*", "layers.0.w | layers.3.w", "layers.4.w | layers.10.w | layers.30.w | layers.03.w | layers.00.w"),
        ("layers.{9-11}.*", "layers.9.w | layers.10.w | layers.11.w", "layers.1.w | layers.12.w | layers.111.w"),
        ("*.{28-}.*", "layers.28.w | layers.29.w | layers.100.w | x.1.y.99.z", "layers.27.w | layers.2.w | layers.9.w"),
        ("*.{0-}.*", "layers.0.w | layers.7.w", "layers.x.w | layers.07.w"),
        ("*.{0,4,8}.*", "layers.0.w | layers.4.w", "layers.1.w | layers.40.w | layers.80.w"),
        ("*.{0,4-6,20-}.*", "a.0.w | a.5.w | a.20.w | a.999.w", "a.1.w | a.7.w | a.19.w"),
        ("*layers{1}*", "layers1 | layers1.w", "layers10 | layers01 | layers21"),
        ("*{1}*", "layers.1.w | 1 | a1b", "layers.10.w | layers.21.w | 11"),
        ("*{q,k,v}_proj*", "a.q_proj.weight | v_proj", "a.o_proj.weight | a.Q_proj"),
        ("*{ gate , up }_proj", "x.gate_proj | up_proj", "x.down_proj"),
        ("*{abc,b}*c.", "abc. | xbc. | abcc.", "ac. | abc"),
        ("{a,ab}{c,bc}", "ac | abc | abbc", "a | abcc"),
        ("*{a,ab}*b", "ab | abb | aab", "ba"),
        ("*{q,1}*", "xqx | 21", "x"),
        ("a+b?[c](d).$^|\\", "a+b?[c](d).$^|\\", "aab[c](d).$^|\\"),
        ("ä.{ö,ü}", "ä.ö", "ä.o"),
    ],
)  # fmt: skip
def test_globs(pattern: str, yes: str, no: str) -> None:
    for name in yes.split(" | "):
        assert fits(pattern, name), name
    for name in filter(None, no.split(" | ")):
        assert not fits(pattern, name), name


def test_sets_are_read_off_the_place() -> None:
    block, embedding, norm = layer(1), Place("embed.weight", vocab=True), Place("norm.weight")
    table = {"@vocab": [embedding], "@blocks": [block], "@outside": [embedding, norm]}
    for pattern, members in table.items():
        assert [place for place in (block, embedding, norm) if matches([pattern], place)] == members
    assert matches(["x", "@vocab"], embedding)
    with pytest.raises(RecipeError, match=r"unknown set '@vocabulary'.*@vocab, @blocks, @outside"):
        matcher("@vocabulary")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "empty pattern"),
        ("a{", "do not close"),
        ("a}", "do not close"),
        ("{a{b}}", "do not close"),
        ("{}", "empty braces"),
        ("{a,}", "empty braces"),
        ("{3-1}", "runs backwards.*{1-3}"),
        ("a" * 1001, "at most 1000"),
    ],
)
def test_patterns_that_cannot_be_read_say_why(pattern: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        matcher(pattern)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*a" * 499 + "*b", "a" * 512),
        ("*{a,aa}" * 3 + "*b", "a" * 512),
        ("*{a,aa}" * 100 + "*b", "a" * 512),
        ("{a,aa}" * 160 + "b", "a" * 512),
        ("*" + "{a,b}{a,aa}" * 80 + "c", "a" * 512),
        ("*{" + ",".join("a" * length for length in range(1, 43)) + "}*b", "a" * 512),
        ("*{0-999999999}*{1-}*x", "1." * 256),
        ("*{0-9}" * 150 + "x", "1." * 256),
        ("{" * 1000, "a"),
        ("{a," * 300, "a"),
    ],
    ids=lambda value: value[:12],
)
def test_a_hostile_pattern_answers_at_once(pattern: str, name: str) -> None:
    def ask() -> None:
        try:
            assert not fits(pattern, name)
        except RecipeError:
            assert "{" in pattern

    assert seconds(ask, 0.1) < 0.1


pieces = st.sampled_from(["*", "a", "b", ".", "1", "10", "{a,ab}", "{b,ba,a}", "{0-1}", "{1-}", "{0,10}"])


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=6), st.text("ab.01", max_size=8))
def test_globs_fit_what_trying_every_way_fits(parts: list[str], name: str) -> None:
    @cache
    def tried(index: int, place: int) -> bool:
        if index == len(parts):
            return place == len(name)
        piece = parts[index]
        for end in range(place, len(name) + 1):
            taken = name[place:end]
            whole = taken.isdigit() and not name[place - 1 : place].isdigit() and not name[end : end + 1].isdigit()
            number = int(taken) if whole and str(int(taken)) == taken else None
            good = {
                "*": True,
                "{a,ab}": taken in ("a", "ab"),
                "{b,ba,a}": taken in ("b", "ba", "a"),
                "{0-1}": number in (0, 1),
                "{1-}": number is not None and number >= 1,
                "{0,10}": number in (0, 10),
            }.get(piece, taken == piece)
            if good and tried(index + 1, end):
                return True
        return False

    assert fits("".join(parts), name) == tried(0, 0)


# Places.


def test_a_stack_is_what_stands_before_the_first_number_and_experts_never_count() -> None:
    found = places(
        [
            "model.layers.0.mlp.experts.7.w",
            "model.layers.2.mlp.experts.0.w",
            "model.layers.10.attn.w",
            "model.embed.weight",
            "conv.weight.1",
        ],
        vocab=["model.embed.weight"],
    )
    assert found["model.layers.0.mlp.experts.7.w"] == Place(
        "model.layers.0.mlp.experts.7.w", 0, (0, 2, 10), vocab=False
    )
    assert found["model.layers.2.mlp.experts.0.w"].depth == 0.5
    assert found["model.layers.10.attn.w"].depth == 1.0
    assert found["model.embed.weight"] == Place("model.embed.weight", vocab=True)
    assert found["conv.weight.1"].layers is None  # a number at the very end names a tensor, not a layer


def test_encoder_and_decoder_are_stacks_of_their_own() -> None:
    found = places([f"encoder.{n}.w" for n in range(2)] + [f"decoder.{n}.w" for n in range(4)])
    assert found["encoder.1.w"].depth == 1.0
    assert found["decoder.1.w"].depth == pytest.approx(1 / 3)
    assert found["encoder.0.w"].layers == (0, 1)


def test_a_number_that_leads_a_name_is_a_layer_of_the_unnamed_stack() -> None:
    found = places(["0.weight", "2.weight", "layer10.weight", "²3.x.w"])
    assert found["2.weight"] == Place("2.weight", 2, (0, 2))
    assert found["layer10.weight"].layers is None
    assert found["²3.x.w"].layers is None


def test_places_are_in_the_order_of_the_names() -> None:
    names = ["b", "layers.1.w", "a", "layers.0.w"]
    assert list(places(names)) == names
