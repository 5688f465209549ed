"""Settings: a parameter's value over a whole model, and the patterns and places it is asked for with.

A setting is written in one of three shapes, told apart by shape alone: a value, ``{gradient: [...]}``, or a list of rules
``{match: ..., value: ...}`` whose last has no ``match``. `setting_of` makes the pydantic type of a setting of one kind of value;
`value_at` reads a setting at a `Place`. Parsing and reading stay apart so that a recipe can be checked without any model.
The type comes from a function, and the union has a discriminator by shape, since a plain union answers one wrong number with a
line for each of its members.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Strict, Tag
from pydantic_core import PydanticCustomError, core_schema

from mergeflow.errors import RecipeError

T = TypeVar("T")

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Unit = Annotated[float, Strict(), Field(ge=0, le=1)]
Fraction = Annotated[float, Strict(), Field(gt=0, le=1)]
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a setting is asked for: a tensor's name, and where that stands in the model.

    `layer` is the tensor's number in its stack and `layers` all numbers of that stack, sorted; both are None outside the blocks.
    `vocab` is true when the tensor's first axis is the vocabulary.
    """

    name: str
    layer: int | None = None
    layers: tuple[int, ...] | None = None
    vocab: bool = False

    @property
    def depth(self) -> float | None:
        """Position in the stack from 0 (first layer) to 1 (last); 0 in a stack of one, None outside the blocks."""
        return None if self.layers is None else _position(self.layers, self.layer)


def _position(layers: Sequence[int], layer: int | None) -> float:
    return 0.0 if len(layers) == 1 else layers.index(layer or 0) / (len(layers) - 1)


def places(names: Iterable[str], vocab: Iterable[str] = ()) -> dict[str, Place]:
    """The place of each name. A stack is a prefix before the first all-digit component; expert numbers never count."""
    split: dict[str, tuple[str, int]] = {}
    stacks: dict[str, set[int]] = {}
    names = list(names)
    for name in names:
        components = name.split(".")
        for index, component in enumerate(components):
            if component.isascii() and component.isdigit() and index + 1 < len(components):
                stack = ".".join(components[:index])
                split[name] = (stack, int(component))
                stacks.setdefault(stack, set()).add(int(component))
                break
    layers = {stack: tuple(sorted(numbers)) for stack, numbers in stacks.items()}
    vocabulary = frozenset(vocab)
    return {
        name: Place(name, split[name][1], layers[split[name][0]], name in vocabulary)
        if name in split
        else Place(name, vocab=name in vocabulary)
        for name in names
    }


_SETS: dict[str, Callable[[Place], bool]] = {
    "@vocab": lambda place: place.vocab,
    "@blocks": lambda place: place.layers is not None,
    "@outside": lambda place: place.layers is None,
}
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})?")
_LARGEST_RANGE = 100_000


@lru_cache(maxsize=4096)
def matcher(pattern: str) -> Callable[[Place], bool]:
    """The test for one glob: `*` crosses dots, `{0-3}` `{28-}` `{0,4,8}` are numbers, `{q,k}` alternatives; case counts.

    Raises RecipeError for a pattern that cannot be read.
    """
    if pattern.startswith("@"):
        if pattern not in _SETS:
            raise RecipeError(f"unknown set '{pattern}'", fix=f"Sets are {', '.join(_SETS)}.")
        return _SETS[pattern]
    fits = re.compile(_expression(pattern)).fullmatch
    return lambda place: fits(place.name) is not None


def _expression(pattern: str) -> str:
    """The regular expression of a glob."""
    if not pattern:
        raise RecipeError("an empty pattern fits nothing", fix="Write '*' for every tensor.")
    if len(pattern) > 1000:
        raise RecipeError("a pattern is at most 1000 characters long")
    *starts, last = [_literal(segment, pattern) for segment in re.split(r"\*+", pattern)]
    if sum("(?:" in segment for segment in starts[1:]) > 3:
        raise RecipeError(
            f"'{pattern}' has braces between too many stars", fix="Write it as a list of simpler patterns."
        )
    if not starts:
        return last
    # The nearest fit of a plain segment never hides another, so it is atomic: matching stays linear, whatever the pattern.
    middle = [f".*?{segment}" if "(?:" in segment else f"(?>.*?{segment})" for segment in starts[1:]]
    return f"{starts[0]}{''.join(middle)}.*{last}"


def _literal(segment: str, pattern: str) -> str:
    """The regular expression of what stands between two stars."""
    pieces: list[str] = []
    for piece in re.split(r"(\{[^{}]*\})", segment):
        if piece.startswith("{") and piece.endswith("}"):
            pieces.append(_braces(piece[1:-1], pattern))
        elif "{" in piece or "}" in piece:
            raise RecipeError(f"the braces of '{pattern}' do not close", fix="Write {0-3}, {28-}, {0,4,8} or {q,k,v}.")
        else:
            pieces.append(re.escape(piece))
    return "".join(pieces)


def _braces(inside: str, pattern: str) -> str:
    words = [word.strip() for word in inside.split(",")]
    if not all(words):
        raise RecipeError(f"empty braces in '{pattern}'", fix="Write {0-3}, {28-}, {0,4,8} or {q,k,v}.")
    if not all(word.isascii() and (word.isdigit() or _RANGE.fullmatch(word)) for word in words):
        return f"(?:{'|'.join(map(re.escape, words))})"
    numbers = []
    for word in words:
        found = _RANGE.fullmatch(word)
        if not found:
            numbers.append(str(int(word)))
        elif found[2] is None:
            numbers.append(_at_least(int(found[1])))
        else:
            first, last = int(found[1]), int(found[2])
            if first > last:
                raise RecipeError(
                    f"the range {{{word}}} in '{pattern}' runs backwards", fix=f"Write {{{last}-{first}}}."
                )
            if last - first > _LARGEST_RANGE:
                raise RecipeError(f"the range {{{word}}} in '{pattern}' is too long", fix=f"Write {{{first}-}}.")
            numbers.append("|".join(map(str, range(first, last + 1))))
    # The borders keep a number whole: {1} does not fit the 1 of layers.10.
    return rf"(?<!\d)(?:{'|'.join(numbers)})(?!\d)"


def _at_least(least: int) -> str:
    """A regular expression for the decimal numbers from `least` on."""
    digits = str(least)
    choices = [digits, rf"[1-9]\d{{{len(digits)},}}"]
    for index, digit in enumerate(digits):
        if digit != "9":
            rest = len(digits) - index - 1
            choices.append(rf"{digits[:index]}[{int(digit) + 1}-9]\d{{{rest}}}")
    return "|".join(choices)


def matches(patterns: Sequence[str], place: Place) -> bool:
    """Whether any of the patterns fits the place."""
    return any(matcher(pattern)(place) for pattern in patterns)


def _readable(patterns: tuple[str, ...]) -> tuple[str, ...]:
    if not patterns:
        raise PydanticCustomError("pattern", "a list of patterns needs at least one")
    for pattern in patterns:
        try:
            matcher(pattern)
        except RecipeError as error:
            raise PydanticCustomError("pattern", "{message}", {"message": str(error)}) from None
    return patterns


def _flat(value: Any) -> Any:
    """One pattern as a list of one; a list in a list (an alias of a list, say) laid flat."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(inner for item in value for inner in (item if isinstance(item, list | tuple) else (item,)))
    return value


class _OneOrMany:
    """The JSON Schema of a pattern or a list of them; validation is left to the validators around it."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        return {
            "anyOf": [
                text,
                {"type": "array", "items": {"anyOf": [text, {"type": "array", "items": text}]}, "minItems": 1},
            ],
            "description": "A glob over tensor names, or a list of them.",
        }


Patterns = Annotated[
    tuple[Annotated[str, Strict()], ...], BeforeValidator(_flat), AfterValidator(_readable), _OneOrMany
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Gradient(_Frozen, Generic[T]):
    """Values spread over layer depth, linear between the points: the first for the first layer, the last for the last."""

    gradient: Annotated[tuple[T, ...], Field(min_length=2, description="Values from the first layer to the last.")]
    over: Annotated[str, Strict(), Field(pattern=r"^\d{1,9}-\d{1,9}$")] | None = Field(
        default=None, description="Layers the gradient runs over, both ends included, e.g. '8-23'; default: all."
    )
    outside: T | None = Field(default=None, description="The value for tensors that are in none of these layers.")

    def at(self, place: Place) -> T:
        """The value at a place. Raises RecipeError where the place is in no layer and no `outside` is given."""
        position = self._position(place)
        if position is None:
            if self.outside is None:
                raise RecipeError(
                    f"a gradient says nothing for '{place.name}', which is in none of its layers",
                    fix=f"Add `outside: {self.gradient[0]}` beside `gradient:`, or narrow it by a rule with `match: '@blocks'`.",
                )
            return self.outside
        points: Sequence[Any] = self.gradient
        where = position * (len(points) - 1)
        left = min(int(where), len(points) - 2)
        share = where - left
        value: T = points[left] * (1 - share) + points[left + 1] * share if share else points[left]
        return value

    def _position(self, place: Place) -> float | None:
        if place.layers is None or place.layer is None:
            return None
        if self.over is None:
            return place.depth
        first, last = map(int, self.over.split("-"))
        inside = [number for number in place.layers if first <= number <= last]
        return _position(inside, place.layer) if place.layer in inside else None


class Rule(_Frozen, Generic[T]):
    """One rule of a setting: where it holds (`match`; everywhere without it) and the value there."""

    match: Patterns | None = Field(default=None, description="A glob over tensor names, or a list of them.")
    value: T = Field(description="The value at these tensors.")


def _last_rule_is_open(rules: tuple[Rule[Any], ...]) -> tuple[Rule[Any], ...]:
    _no_early_open_rule(rules)
    if not rules or rules[-1].match is not None:
        raise PydanticCustomError("rules", "the last rule needs to have no `match`, so that every tensor has a value")
    return rules


def _no_early_open_rule(rules: tuple[Rule[Any], ...]) -> tuple[Rule[Any], ...]:
    for rule in rules[:-1]:
        if rule.match is None:
            raise PydanticCustomError("rules", "only the last rule may leave out `match`: it hides those after it")
    return rules


class Each(tuple[Any, ...]):
    """A setting for each input, in order: what an op holds once its recipe's inputs have spoken for themselves."""

    __slots__ = ()


def _shape(value: Any) -> str:
    if isinstance(value, Each) or (
        isinstance(value, list | tuple) and value and not any(isinstance(item, Mapping | Rule) for item in value)
    ):
        return "each"
    if isinstance(value, list | tuple):
        return "rules"
    if isinstance(value, Mapping | Gradient):
        return "gradient"
    return "value"


def _numeric(kind: Any) -> bool:
    return (get_args(kind)[0] if get_origin(kind) is Annotated else kind) is float


@lru_cache(maxsize=256)
def setting_of(kind: Any, *, open_ended: bool = False, per_input: bool = False) -> Any:
    """The pydantic type of a setting whose values are of `kind`.

    `open_ended` rules may leave out the last rule (an input's own, which fall back to the node's);
    `per_input` also takes a list with one setting for each input, as ops built in Python do.
    """
    value, gradient = Annotated[kind, Tag("value")], Annotated[Gradient[kind], Tag("gradient")]
    point: Any = Annotated[Union[(value, gradient)], Discriminator(_shape)] if _numeric(kind) else kind
    check = AfterValidator(_no_early_open_rule if open_ended else _last_rule_is_open)
    shapes: list[Any] = [value, Annotated[tuple[Rule[point], ...], check, Field(min_length=1), Tag("rules")]]
    if _numeric(kind):
        shapes.append(gradient)
    if per_input:
        inner: Any = Annotated[Union[tuple(shapes)], Discriminator(_shape)]
        shapes.append(Annotated[tuple[inner, ...], AfterValidator(Each), Tag("each")])
    return Annotated[
        Union[tuple(shapes)],
        Discriminator(
            _shape,
            custom_error_type="setting",
            custom_error_message="write one value, {gradient: [...]}, or a list of rules {match: ..., value: ...}",
        ),
    ]


@dataclass(frozen=True, slots=True)
class SettingOf:
    """Marks an op's field as a setting, and gives pydantic its type."""

    kind: Any
    per_input: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        schema: core_schema.CoreSchema = handler.generate_schema(setting_of(self.kind, per_input=self.per_input))
        return schema


if TYPE_CHECKING:
    Setting = Union[T, Gradient[T], tuple[Rule[T], ...], Sequence[Mapping[str, Any]], Mapping[str, Any]]
    PerInput = Union[T, Gradient[T], tuple[Rule[T], ...], Each, Sequence[Any], Mapping[str, Any]]
else:

    class Setting:
        """A field whose value may change over the model: `t: Setting[Unit] = setting(0.5, "...")`."""

        def __class_getitem__(cls, kind: Any) -> Any:
            return Annotated[Any, SettingOf(kind)]

    class PerInput:
        """A setting that each input may also give for itself: `weight: PerInput[Number] = setting(1.0, "...")`."""

        def __class_getitem__(cls, kind: Any) -> Any:
            return Annotated[Any, SettingOf(kind, per_input=True)]


def setting(default: Any, description: str) -> Any:
    """A field of an op that is a setting; without a default (`...`) the recipe must give it."""
    return Field(default=default, description=description, validate_default=False)


def value_at(setting: Any, place: Place) -> Any:
    """The value of a setting at a place. Raises RecipeError where it has none."""
    if isinstance(setting, Each):
        return tuple(value_at(one, place) for one in setting)
    if isinstance(setting, tuple):
        for rule in setting:
            if rule.match is None or matches(rule.match, place):
                return value_at(rule.value, place)
        raise RecipeError(f"no rule fits '{place.name}'", fix="End the list in a rule without `match`.")
    return setting.at(place) if isinstance(setting, Gradient) else setting


def constant(setting: Any) -> bool:
    """Whether a setting has one value over the whole model."""
    return all(map(constant, setting)) if isinstance(setting, Each) else not isinstance(setting, tuple | Gradient)


def fall_back(own: Any, node: Any) -> Any:
    """An input's own setting, with the node's at places that its rules do not name."""
    if own is None:
        return node
    if isinstance(own, tuple) and own[-1].match is not None:
        rest = node if isinstance(node, tuple) else (Rule[Any](value=node),)
        return (*own, *rest)
    return own


def rules_in(setting: Any) -> Iterable[tuple[Rule[Any], ...]]:
    """Each list of rules in a setting."""
    if isinstance(setting, Each):
        for one in setting:
            yield from rules_in(one)
    elif isinstance(setting, tuple):
        yield setting


FloatName = Literal[
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
]
