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
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
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


_LAYER = re.compile(r"(?:^|\.)([0-9]+)\.")
"""The first all-digit component of a name that something follows."""


def in_stack(name: str) -> tuple[str, int, str] | None:
    """A name's stack, its layer there, and what follows the number; None outside the blocks."""
    found = _LAYER.search(name)
    return (name[: found.start()], int(found[1]), name[found.end() :]) if found else None


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted numbers as ranges, both ends included."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def places(names: Iterable[str], vocab: Iterable[str] = ()) -> dict[str, Place]:
    """The place of each name. A stack is a prefix before the first all-digit component; expert numbers never count."""
    split: dict[str, tuple[str, int]] = {}
    stacks: dict[str, set[int]] = {}
    names = list(names)
    for name in names:
        found = _LAYER.search(name)
        if found:
            stack, number = name[: found.start()], int(found[1])
            split[name] = (stack, number)
            stacks.setdefault(stack, set()).add(number)
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
_NUMBERS = re.compile(r"(\d{1,9})(-)?(\d{1,9})?")
_DIGITS = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]*)(?![0-9])")

Step = Callable[[str, int], int]
"""From the places in a name where a pattern may have come to, to those after its next piece: bit n is before character n."""


@lru_cache(maxsize=4096)
def matcher(pattern: str) -> Callable[[Place], bool]:
    """The test for one glob: `*` crosses dots, `{0-3}` `{28-}` `{0,4,8}` are numbers, `{q,k}` alternatives; case counts.

    Without braces it is a regular expression that never goes back; braces are followed in all their alternatives at once, since
    a regular expression tries them one after the other, and a hostile pattern makes that take hours.
    Raises RecipeError for a pattern that cannot be read.
    """
    if pattern.startswith("@"):
        if pattern not in _SETS:
            raise RecipeError(f"unknown set '{pattern}'", fix=f"Sets are {', '.join(_SETS)}.")
        return _SETS[pattern]
    if not pattern:
        raise RecipeError("an empty pattern fits nothing", fix="Write '*' for every tensor.")
    if len(pattern) > 1000:
        raise RecipeError("a pattern is at most 1000 characters long")
    if "{" not in pattern and "}" not in pattern:
        fits = re.compile(_expression(pattern)).fullmatch
        return lambda place: fits(place.name) is not None
    steps = [_step(piece, pattern) for piece in re.split(r"(\*+|\{[^{}]*\})", pattern) if piece]
    return lambda place: _follow(steps, place.name)


def _expression(pattern: str) -> str:
    """The regular expression of a glob without braces: the nearest fit of a segment never hides another, so it is atomic."""
    first, *others = map(re.escape, re.split(r"\*+", pattern))
    if not others:
        return first
    *middle, last = others
    return f"{first}{''.join(f'(?>.*?{segment})' for segment in middle)}.*{last}"


def _follow(steps: Sequence[Step], name: str) -> bool:
    """Whether the steps lead from the start of a name to its end."""
    reached = 1
    for step in steps:
        reached = step(name, reached)
        if not reached:
            return False
    return bool(reached >> len(name))


def _step(piece: str, pattern: str) -> Step:
    if piece.startswith("*"):
        return lambda name, reached: (2 << len(name)) - (reached & -reached)
    if piece.startswith("{") and piece.endswith("}"):
        return _braces(piece[1:-1], pattern)
    if "{" in piece or "}" in piece:
        raise RecipeError(f"the braces of '{pattern}' do not close", fix="Write {0-3}, {28-}, {0,4,8} or {q,k,v}.")
    return _words([piece])


def _words(words: Iterable[str]) -> Step:
    """Any of these words comes next."""
    words = sorted(set(words))

    def step(name: str, reached: int) -> int:
        after = 0
        if not reached & (reached - 1):  # one place only, as before the first star
            start = reached.bit_length() - 1
            for word in words:
                after |= name.startswith(word, start) << start + len(word)
            return after
        for word in words:
            start = name.find(word)
            while start >= 0:
                if reached >> start & 1:
                    after |= 1 << start + len(word)
                start = name.find(word, start + 1)
        return after

    return step


def _braces(inside: str, pattern: str) -> Step:
    words = [word.strip() for word in inside.split(",")]
    if not all(words):
        raise RecipeError(f"empty braces in '{pattern}'", fix="Write {0-3}, {28-}, {0,4,8} or {q,k,v}.")
    found = [_NUMBERS.fullmatch(word) if word.isascii() else None for word in words]
    ranges = [(int(one[1]), int(one[3] or 10**512) if one[2] else int(one[1])) for one in found if one]
    if len(ranges) < len(words):
        return _words(words)
    for first, last in ranges:
        if first > last:
            raise RecipeError(
                f"the range {{{first}-{last}}} in '{pattern}' runs backwards", fix=f"Write {{{last}-{first}}}."
            )

    def step(name: str, reached: int) -> int:
        """Whole numbers only: {1} does not fit the 1 of layers.10."""
        after = 0
        lowest = (reached & -reached).bit_length() - 1
        for run in _DIGITS.finditer(name, lowest):
            if reached >> run.start() & 1 and any(first <= int(run[0]) <= last for first, last in ranges):
                after |= 1 << run.end()
        return after

    return step


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


def _is_rule(item: Any) -> bool:
    return isinstance(item, Rule) or (isinstance(item, Mapping) and "gradient" not in item)


def _shape(value: Any) -> str:
    if isinstance(value, Each) or (isinstance(value, list | tuple) and value and not any(map(_is_rule, value))):
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
    if not isinstance(setting, tuple):
        return setting.at(place) if isinstance(setting, Gradient) else setting
    if isinstance(setting, Each):
        return tuple([value_at(one, place) for one in setting])
    for rule in setting:
        if rule.match is None or matches(rule.match, place):
            return value_at(rule.value, place)
    raise RecipeError(f"no rule fits '{place.name}'", fix="End the list in a rule without `match`.")


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
