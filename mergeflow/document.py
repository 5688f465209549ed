"""The text of a YAML file, which may come from a stranger, as plain data with the position of every key and value.

This module alone reads and writes YAML; what the data means is the recipe's business. It bounds everything before it
believes anything:

- Size, encoding, invisible characters and directives are settled by scans of the text. Directives go because libyaml
  compares each `%TAG` with all before it: one megabyte of them takes four seconds.
- The rest is composed from the parser's *events*, one at a time, with a stack of its own. PyYAML's composers recurse
  (100,000 `[` kill the process) and expand aliases without bound; events do neither. libyaml gives 50,000 of them in
  some 40 ms; where PyYAML was built without it, its own parser takes over: same answers, much slower.
- Scalars follow the YAML 1.2 core schema instead of PyYAML's 1.1: `1e-5` is a number, `no` is text.

Positions are looked up in the composed tree when somebody asks, since a recipe without errors asks for few.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import yaml

from mergeflow.errors import MergeflowError, Problems, RecipeError, did_you_mean, raise_all
from mergeflow.garbage import no_collection

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_EVENTS = 50_000
MAX_ALIASES = 200
MAX_NODES = 50_000
MAX_PROBLEMS = 20
MAX_DOCUMENTS = 100
WIDTH = 120

# libyaml takes `key:` only where the ':' follows within 1,024 characters; longer keys are written `? key`.
_LONG_KEY = 1000

Path = tuple[str | int, ...]
T = TypeVar("T")

_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "<<"

# U+0085, U+2028 and U+2029 end a line for libyaml but not for an editor: a comment could hide a key behind them.
# U+202A to U+202E and U+2066 to U+2069 show a line in another order than it is read.
_REFUSED = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
_DIRECTIVE = re.compile(r"(?:\A|[\r\n])%")
_DOCUMENT = re.compile(r"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
"""Where a document starts: no value of a document before it can hold such a line."""
_BREAK = re.compile(r"\r\n|\r|\n")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]++|0o[0-7]++|0x[0-9a-fA-F]++")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]++|[0-9]++(?:\.[0-9]*+)?)(?:[eE][-+]?[0-9]++)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_NUMBER_START = frozenset("+-.0123456789")


@dataclass(frozen=True, slots=True)
class Position:
    """A position in the file; both count from 1, columns in characters."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Document:
    """What a YAML file holds and where.

    `source` is the file's name as messages print it, `data` is made of dict, list, str, int, float, bool and None, no
    part of it shared. `positions` has the position of the value at each path (the root is `()`), `keys` that of its
    key, `texts` the plain (unquoted) scalars as they were written: `0123` where the data says 123. What an alias
    stands for has the position of the alias; what is inside it, and what `<<` brings, that where it is written.
    """

    source: str
    data: Any
    positions: Mapping[Path, Position]
    keys: Mapping[Path, Position]
    texts: Mapping[Path, str]

    def where(self, path: Path, key: bool = False) -> str:
        """`recipe.yaml:14:9` for the value at `path` (or for its key), or for the nearest parent that is there."""
        for end in range(len(path), -1, -1):
            place = (self.keys.get(path[:end]) if key else None) or self.positions.get(path[:end])
            if place:
                return f"{self.source}:{place.line}:{place.column}"
        return self.source


def read_document(text: str | bytes, source: str) -> Document:
    """The document in `text`; `source` is what messages call the file.

    Raises RecipeError, or Problems with several of them, each with `source:line:column`, for whatever is not one plain
    YAML document within the bounds of this module. An empty file is None.
    """
    return _document(_decoded(text, source), source)


def read_documents(text: str | bytes, source: str) -> tuple[Document, ...]:
    """The documents of a file, which `---` parts; positions are those in the file, and empty documents are left out.

    Each is read as by `read_document`; the problems of all are raised together.
    """
    decoded = _decoded(text, source)
    starts = [found.start() for found in _DOCUMENT.finditer(decoded)]
    if len(starts) > MAX_DOCUMENTS:
        line, column = _line_column(decoded, starts[MAX_DOCUMENTS])
        raise RecipeError(f"more than {MAX_DOCUMENTS} documents in one file", where=f"{source}:{line}:{column}")
    documents: list[Document] = []
    errors: list[MergeflowError] = []
    for start, stop in pairwise([0, *starts, len(decoded)]):
        # Empty lines stand for what is before a document, so that the parser counts as an editor does.
        padding = "\n" * len(_BREAK.findall(decoded, 0, start))
        try:
            found = _document(padding + decoded[start:stop], source)
        except Problems as several:
            errors += several.errors
        except MergeflowError as error:
            errors.append(error)
        else:
            documents += [found] if found.data is not None else []
    raise_all(errors)
    return tuple(documents)


def _document(text: str, source: str) -> Document:
    with no_collection():
        root = _Composer(text, source).compose()
    return Document(
        source=source,
        data=root.data,
        positions=_View(root, lambda key, node: Position(node.line, node.column)),
        keys=_View(root, lambda key, node: Position(key.line, key.column) if key else None),
        texts=_View(root, lambda key, node: node.text),
    )


class _Node:
    """A composed scalar: what it is (`data`), where, and as it was written where it is plain."""

    __slots__ = ("data", "mark", "text")

    children: list[_Node] | dict[str, tuple[_Node, _Node]] | None = None
    height = 0
    size = 1

    def __init__(self, mark: Any, data: Any, text: str | None = None) -> None:
        self.mark = mark
        self.data = data
        self.text = text

    @property
    def line(self) -> int:
        line: int = self.mark.line
        return line + 1

    @property
    def column(self) -> int:
        column: int = self.mark.column
        return column + 1


class _Collection(_Node):
    """A composed list or mapping, or what an alias stands for.

    `children` are nodes for a list, pairs of key and value for a mapping; `height` counts the collections from here
    down, `size` the nodes. `key` and `merged` serve while a mapping is open.
    """

    __slots__ = ("children", "height", "key", "merged", "size")

    def __init__(self, mark: Any, data: Any, children: Any, text: str | None = None) -> None:
        super().__init__(mark, data, text)
        self.children = children
        self.height = 1
        self.size = 1
        self.key: _Node | None = None
        self.merged: list[_Node] | None = None


class _View(Mapping[Path, T], Generic[T]):
    """One property of a tree's nodes, by path; paths for which `pick` has None are not in it."""

    __slots__ = ("_pick", "_root")

    def __init__(self, root: _Node, pick: Callable[[_Node | None, _Node], T | None]) -> None:
        self._root = root
        self._pick = pick

    def __getitem__(self, path: Path) -> T:
        key: _Node | None = None
        node = self._root
        for step in path:
            children = node.children
            if isinstance(children, dict) and step in children:
                key, node = children[step]
            elif isinstance(children, list) and type(step) is int and 0 <= step < len(children):
                key, node = None, children[step]
            else:
                raise KeyError(path)
        value = self._pick(key, node)
        if value is None:
            raise KeyError(path)
        return value

    def __iter__(self) -> Iterator[Path]:
        todo: list[tuple[Path, _Node | None, _Node]] = [((), None, self._root)]
        while todo:
            path, key, node = todo.pop()
            if self._pick(key, node) is not None:
                yield path
            if isinstance(node.children, dict):
                todo += [((*path, name), *pair) for name, pair in reversed(node.children.items())]
            elif node.children:
                todo += [((*path, i), None, node.children[i]) for i in reversed(range(len(node.children)))]

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Composer:
    """Turns events into one tree; collects the problems that leave the rest readable, stops at any other."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.problems: list[MergeflowError] = []
        self.root = _Node(yaml.Mark(source, 0, 0, 0, None, 0), None)
        self.open: list[_Collection] = []
        self.anchors: dict[str, _Node] = {}
        self.nodes = 0
        self.aliases = 0

    def compose(self) -> _Node:
        """The root of the document."""
        documents = 0
        for count, event in enumerate(self._events(), 1):
            if count > MAX_EVENTS:
                self._stop(event.start_mark, f"more than {MAX_EVENTS:,} keys, values and brackets in one file")
            kind = type(event)
            if kind is yaml.ScalarEvent:
                self._scalar(event)
            elif kind is yaml.SequenceStartEvent:
                self._enter(event, [], [])
            elif kind is yaml.MappingStartEvent:
                self._enter(event, {}, {})
            elif kind is yaml.SequenceEndEvent or kind is yaml.MappingEndEvent:
                self._leave()
            elif kind is yaml.AliasEvent:
                self._alias(event)
            elif kind is yaml.DocumentStartEvent:
                documents += 1
                if documents > 1:
                    self._stop(event.start_mark, "a second document starts here", "Keep one document in a file.")
        raise_all(self.problems)
        return self.root

    def _events(self) -> Iterator[yaml.Event]:
        """The parser's events; what it raises becomes a RecipeError behind the problems found so far."""
        try:
            # Not through `yaml.parse`, a generator that asks for each event twice.
            yield from iter(_PARSER(self.text).get_event, None)
        except yaml.MarkedYAMLError as error:
            self.problems.append(_syntax_error(error, self.text, self.source, self.open))
        except (yaml.YAMLError, ValueError, OverflowError):
            # PyYAML's own parser lets a ValueError or OverflowError of `chr` and `int` through, without a place.
            self.problems.append(RecipeError("this is not readable as YAML", where=f"{self.source}:1:1"))

    def _problem(self, mark: Any, what: str, fix: str = "") -> None:
        """Keep a problem at a mark, and go on unless there are enough of them."""
        self.problems.append(RecipeError(what, where=f"{self.source}:{mark.line + 1}:{mark.column + 1}", fix=fix))
        if len(self.problems) >= MAX_PROBLEMS:
            raise_all(self.problems)

    def _stop(self, mark: Any, what: str, fix: str = "") -> None:
        self._problem(mark, what, fix)
        raise_all(self.problems)

    def _scalar(self, event: Any) -> None:
        mark = event.start_mark
        value: str = event.value
        text = None if event.style else value
        data: Any = value
        if text is not None:
            try:
                data = _resolved(value)
            except RecipeError as error:
                data = None
                parent = self.open[-1] if self.open else None
                if parent is None or type(parent.children) is list or parent.key is not None:
                    self._problem(mark, error.what, error.fix)
        elif _UNUSABLE.search(value):
            self._problem(mark, "this text holds an escaped NUL or half a character", "Take the escape out.")
        node = _Node(mark, data, text)
        self._begin(event, node)
        self._place(node)

    def _enter(self, event: Any, data: Any, children: Any) -> None:
        node = _Collection(event.start_mark, data, children)
        if len(self.open) >= MAX_DEPTH:
            self._stop(node.mark, f"lists and mappings are nested more than {MAX_DEPTH} deep")
        self._begin(event, node)
        node.size = -self.nodes
        self.open.append(node)

    def _leave(self) -> None:
        node = self.open.pop()
        node.size += self.nodes + 1
        if node.merged is not None:
            _merge(node)
        self._place(node)

    def _begin(self, event: Any, node: _Node) -> None:
        """Count a node, refuse its tag, remember its anchor."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self._stop(node.mark, f"aliases make this file more than {MAX_NODES:,} values")
        if event.tag is not None:
            fix = "Leave it out, or put a text that starts with '!' in quotes."
            self._problem(node.mark, f"tags such as {_shown(event.tag)} are not accepted", fix)
        name = event.anchor
        if name is not None:
            if name in self.anchors:
                first = self.anchors[name].line
                self._problem(node.mark, f"the anchor {_shown('&' + name)} was already set in line {first}")
            self.anchors[name] = node

    def _alias(self, event: Any) -> None:
        mark = event.start_mark
        name: str = event.anchor
        target = self.anchors.get(name)
        if target is None:
            # Finding the nearest name takes time in the number and the length of names, which a stranger chose.
            near = did_you_mean(name, self.anchors) if len(self.anchors) <= 30 and len(name) <= 40 else ""
            what = f"{_shown('*' + name)} is no anchor of this file"
            self._problem(mark, what, f"{_star_fix('*' + name)} {near}".rstrip())
            # Stands in for any value, text or mapping, so that one mistake is one problem.
            self._place(_Collection(mark, "", {}))
            return
        if target in self.open:
            self._stop(mark, f"{_shown('*' + name)} stands inside the value it names")
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            self._stop(mark, f"more than {MAX_ALIASES} aliases in one file")
        self.nodes += target.size
        if self.nodes > MAX_NODES:
            self._stop(mark, f"aliases make this file more than {MAX_NODES:,} values")
        if len(self.open) + target.height > MAX_DEPTH:
            self._stop(mark, f"through this alias, lists and mappings are nested more than {MAX_DEPTH} deep")
        node = _Collection(mark, _copied(target.data), target.children, target.text)
        node.height = target.height
        self._place(node)

    def _place(self, node: _Node) -> None:
        """Put a finished value into what is open: as the root, an item, a key, or the value of the key before."""
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        if node.height >= parent.height:
            parent.height = node.height + 1
        children = parent.children
        if type(children) is list:
            parent.data.append(node.data)
            children.append(node)
            return
        assert isinstance(children, dict)
        key = parent.key
        if key is None:
            self._check_key(node)
            parent.key = node
            return
        parent.key = None
        name = key.data
        if type(name) is not str:
            return
        if name == _MERGE and key.text is not None:
            self._add_merged(parent, key, node)
        elif name in children:
            first = children[name][0].line
            lines = f"lines {first} and {key.line}" if first != key.line else f"line {first}"
            what = f"the key {_shown(name)} is here twice, in {lines}"
            self._problem(key.mark, what, "Keep one of them.")
        else:
            parent.data[name] = node.data
            children[name] = (key, node)

    def _check_key(self, key: _Node) -> None:
        """A key that is no text is a problem; its value is read and left out."""
        if type(key.data) is str:
            return
        if key.children is not None:
            what = "a list or a mapping stands where a key must be"
            self._problem(key.mark, what, "Put a text that starts with '{' or '[' in quotes.")
        elif not key.text:
            self._problem(key.mark, "there is no key before this ':'")
        else:
            kind = "a number" if key.text not in _WORDS else "null" if key.data is None else "true or false"
            what = f"the key {_shown(key.text)} is read as {kind}, and keys are texts"
            self._problem(key.mark, what, f"Put it in quotes: {_in_quotes(key.text)}.")

    def _add_merged(self, parent: _Collection, key: _Node, node: _Node) -> None:
        sources = node.children if isinstance(node.children, list) else [node]
        if parent.merged is not None:
            self._problem(key.mark, f"'<<' is here twice, the second time in line {key.line}", "Write '<<: [*a, *b]'.")
        elif all(isinstance(source.children, dict) for source in sources):
            parent.merged = sources
        else:
            self._problem(
                node.mark, "'<<' takes a mapping or a list of mappings", "Write '<<: *name' or '<<: [*a, *b]'."
            )


def _merge(node: _Collection) -> None:
    """Fill a mapping up from what its `<<` names: its own keys win, then the first source that has the key."""
    children: dict[str, tuple[_Node, _Node]] = {}
    assert node.merged is not None and isinstance(node.children, dict)
    for source in reversed(node.merged):
        assert isinstance(source.children, dict)
        children.update(source.children)
    data = {name: node.data[name] if name in node.children else _copied(children[name][1].data) for name in children}
    node.data = data | node.data
    node.children = children | node.children


def _copied(data: Any) -> Any:
    """A copy that shares no dict and no list; `MAX_DEPTH` bounds the recursion."""
    if type(data) is dict:
        return {key: _copied(value) for key, value in data.items()}
    if type(data) is list:
        return [_copied(value) for value in data]
    return data


def _resolved(text: str) -> str | int | float | bool | None:
    """A plain scalar by the YAML 1.2 core schema; a number that is not finite or too large is a RecipeError."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _NUMBER_START:
        return text
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        # A float of a megabyte of digits takes `float` a noticeable time; nobody means one.
        number = float(text) if len(text) <= 400 else math.inf
        if math.isfinite(number):
            return number
    elif not _NOT_FINITE.fullmatch(text):
        return text
    raise RecipeError(f"numbers must be finite, {_shown(text)} is not", fix="Put it in quotes if it is a text.")


def _integer(text: str) -> int:
    if len(text) <= 18 and text.isdecimal():  # whatever has so few digits fits
        return int(text)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    digits = (text[2:] if base != 10 else text.lstrip("+-")).lstrip("0") or "0"
    # `int` is quadratic in the digits, and refuses more than 4,300: the length comes first.
    number = int(digits, base) if len(digits) <= 22 else 1 << 64
    number = -number if text.startswith("-") else number
    if not -(1 << 63) <= number < 1 << 63:
        raise RecipeError(f"the integer {_shown(text)} has more than 64 bits", fix="Put it in quotes if it is a text.")
    return number


def _decoded(text: str | bytes, source: str) -> str:
    """The text of the file, once its size, encoding, characters and lines are such as a parser may see."""

    def fail(what: str, index: int, fix: str = "") -> RecipeError:
        line, column = _line_column(decoded, index)
        return RecipeError(what, where=f"{source}:{line}:{column}", fix=fix)

    decoded = ""
    if len(text) > MAX_BYTES:
        raise fail("a recipe has at most 1 MiB", 0)
    if isinstance(text, bytes):
        try:
            decoded = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # `error.object` has no byte order mark any more, which `error.start` counts from.
            decoded = error.object[: error.start].decode()
            byte = error.object[error.start]
            raise fail(f"byte 0x{byte:02x} is not UTF-8", len(decoded), "Save the file as UTF-8.") from None
    else:
        decoded = text.removeprefix("\ufeff")
    found = _REFUSED.search(decoded)
    if found:
        code = ord(found[0])
        escape = "" if _UNUSABLE.match(found[0]) else f', or write it as "\\u{code:04x}" in double quotes'
        raise fail(f"the character U+{code:04X} is not allowed here", found.start(), f"Take it out{escape}.")
    if not decoded.isascii() and len(decoded.encode()) > MAX_BYTES:
        raise fail("a recipe has at most 1 MiB", 0)
    found = _DIRECTIVE.search(decoded)
    if found:
        raise fail("a line that starts with '%' is a YAML directive", found.end() - 1, "Leave it out, or indent it.")
    return decoded


def _line_column(text: str, index: int) -> tuple[int, int]:
    """Line and column, from 1, of the character at `index`."""
    line, start = 1, 0
    for found in _BREAK.finditer(text, 0, index):
        line, start = line + 1, found.end()
    return line, index - start + 1


# Fragments of what PyYAML's two parsers say, in the order they are tried, and what a person is told instead.
_PHRASES = (
    (
        "<document start>",
        "the document has ended before this line",
        "Indent it as the lines before, or take it out.",
    ),
    ("scanning an anchor", "this is no name of an anchor", "Put a text that starts with '&' in quotes."),
    ("escape", "this is no escape of double quotes", r"Write '\\' for a backslash, or use single quotes."),
    (
        "could not find expected ':'",
        "there is no ':' behind this key",
        "Write 'key: value', and indent the lines of one mapping alike.",
    ),
    (
        "mapping values are not allowed",
        "this ':' makes no key here",
        "Check the indentation, or put a text that contains ': ' in quotes.",
    ),
    (
        "scanning a block scalar",
        "only line breaks and a comment can follow '|' or '>'",
        "Put a text that starts with them in quotes.",
    ),
    (
        "sequence entries",
        "a list cannot start here",
        "Start it on a line of its own, or put a text that starts with '-' in quotes.",
    ),
    (
        "node content",
        "a value is missing here",
        "Put a text that starts with a bracket, a comma or '-' in quotes.",
    ),
    (
        "block mapping",
        "'key: value' should stand here",
        "Check the indentation: the keys of one mapping start in one column.",
    ),
    (
        "block collection",
        "'- ' should stand here",
        "Check the indentation: the items of one list start in one column.",
    ),
)


def _syntax_error(error: yaml.MarkedYAMLError, text: str, source: str, inside: Sequence[_Node]) -> RecipeError:
    """What either of PyYAML's parsers says, in plain words, with the fix for what is written most often.

    `inside` are the lists and mappings that are open at the error, outermost first.
    """
    mark = error.problem_mark or error.context_mark
    context = error.context or ""
    said = " ".join(part for part in (error.problem, context) if part)
    if mark is None:
        return RecipeError(said, where=f"{source}:1:1")
    lines = _BREAK.split(text)
    line, column = mark.line, mark.column
    if line >= len(lines):  # libyaml's end of a file without a last line break
        line, column = len(lines) - 1, len(lines[-1])
    whole = lines[line]
    before, after = whole[:column], whole[column:]
    at_end = not after.strip() and not any(lines[line + 1 :])
    indent = re.match(r" *\t\s*", whole)
    bracket = "',' or" in said or "node content" in said

    def tell(what: str, fix: str = "") -> RecipeError:
        return RecipeError(what, where=f"{source}:{line + 1}:{column + 1}", fix=fix)

    if "scanning an alias" in said:
        column = max(before.rfind("*"), 0)
        word = _word(whole[column:])
        return tell(f"{_shown(word)} is no alias", _star_fix(word))
    if "tab" in said.split() or after.startswith("\t") or (indent and column <= indent.end()):
        column = whole.find("\t") if "\t" in whole else column
        return tell("a tab stands where only spaces may: YAML is indented by spaces", "Use two spaces for each level.")
    if "cannot start any token" in said and after:
        return tell(f"a text cannot start with {_shown(after[0])}", f"Put it in quotes: {_in_quotes(_word(after))}.")
    if "quoted scalar" in said and "end of stream" in said and error.context_mark:
        line, column = error.context_mark.line, error.context_mark.column
        return tell("this quote is never closed")
    if after.startswith(":") and ("node content" in said or "block mapping" in said):
        return tell("there is no key before this ':'")
    if bracket and at_end and inside:
        line, column = inside[-1].line - 1, inside[-1].column - 1
        kind, close = ("list", "]") if isinstance(inside[-1].data, list) else ("mapping", "}")
        return tell(f"this {kind} is never closed", f"Write '{close}' at its end.")
    if "',' or" in said and error.context_mark:
        kind, close = ("list", "]") if "sequence" in context else ("mapping", "}")
        what = f"',' or '{close}' should stand here, in the {kind} that starts in line {error.context_mark.line + 1}"
        return tell(what, f"Write '{close}', or put a text that contains brackets, commas or ': ' in quotes.")
    if "mapping values are not allowed" in said and len(before) > _LONG_KEY:
        return tell("a key has more than 1,000 characters")
    closing = before.rstrip()[-1:]
    if "block mapping" in context and closing and closing in "}]\"'":
        fix = "A text that starts with a bracket needs quotes around all of it."
        return tell(
            f"nothing can follow the closing {closing}", fix if closing in "}]" else "Put it inside the quotes."
        )
    return next((tell(what, fix) for fragment, what, fix in _PHRASES if fragment in said), tell(said))


def _word(line: str) -> str:
    """The unquoted word that a line begins with."""
    found = re.match(r"[^\s,\]}#]*", line)
    return found[0].removesuffix(":") if found else ""


def _star_fix(word: str) -> str:
    return f"A pattern that starts with '*' needs quotes: {_in_quotes(word)}."


def _in_quotes(word: str) -> str:
    return '"' + _cut(word).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _shown(text: str) -> str:
    return f"'{_cut(text)}'"


def _cut(text: str) -> str:
    """At most 60 characters of a text of unknown length, for a message."""
    return text if len(text) <= 60 else text[:57] + "..."


# A plain text is one that YAML 1.1 readers, too, take for the same text: no digits first, none of their words.
_PLAIN = re.compile(r"(?:[A-Za-z_]|\.{1,2}/)[A-Za-z0-9_./@+=-]*(?: [A-Za-z0-9_./@+=()-]+)*")
_WORDS_1_1 = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
_ESCAPED = re.compile('[\x00-\x1f"\\\\\x7f-\xa0\xad\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufffe\uffff]')
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def dump_yaml(data: Any) -> str:
    """YAML text that `read_document` reads back as `data`: the same bytes each time, keys in their order, no aliases.

    Lists and mappings below the top level stand on one line where they fit into 120 columns; a text is never folded.
    `data` is made of mappings with text keys, lists, tuples (read back as lists), str, int, float, bool and None.
    RecipeError if it is not, or if `read_document` would refuse it: too deep, not finite, more than 64 bits, or
    text that has NUL or half a surrogate pair.
    """
    if _is_leaf(data):
        return _leaf(data) + "\n"
    return "\n".join(_lines(data, 1, WIDTH)) + "\n"


def _is_leaf(value: Any) -> bool:
    return not (isinstance(value, (Mapping, list, tuple)) and value)


def _lines(value: Any, depth: int, width: int) -> Iterator[str]:
    """A list or mapping in block style, line by line, without the indentation of what is around it."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"lists and mappings are nested more than {MAX_DEPTH} deep")
    if not isinstance(value, Mapping):
        for item in value:
            yield from _entry("-", item, depth, width, "  ")
        return
    for key, item in value.items():
        name = _key(key)
        if len(name) > _LONG_KEY:
            yield f"? {name}"
            yield from _entry(":", item, depth, width, "  ")
        else:
            yield from _entry(f"{name}:", item, depth, width, "")


def _entry(head: str, item: Any, depth: int, width: int, compact: str) -> Iterator[str]:
    """`head` and its item: on one line if it may and fits, else below it, or beside it (`compact`)."""
    if _is_leaf(item):
        yield f"{head} {_leaf(item)}"
        return
    # What stands at the top level is a section (`models:`, `nodes:`): one line for each of its entries reads best.
    section = depth == 1 and (isinstance(item, Mapping) or any(isinstance(part, Mapping) for part in item))
    line = None if section else _flow(item, depth + 1, width - len(head) - 1)
    if line is not None:
        yield f"{head} {line}"
        return
    if not compact:
        yield head
    for i, line in enumerate(_lines(item, depth + 1, width - 2)):
        yield f"{head} {line}" if compact and i == 0 else f"  {line}"


def _flow(value: Any, depth: int, room: int) -> str | None:
    """The value on one line, or None where it has no `room`; stops as soon as that is clear."""
    if _is_leaf(value):
        text = _leaf(value) if not isinstance(value, str) or len(value) <= room else None
        return text if text is not None and len(text) <= room else None
    if depth > MAX_DEPTH:
        return None
    pairs = value.items() if isinstance(value, Mapping) else (("", item) for item in value)
    parts: list[str] = []
    room -= 2
    for key, item in pairs:
        name = f"{_key(key)}: " if isinstance(value, Mapping) else ""
        text = _flow(item, depth + 1, room - len(name))
        if text is None:
            return None
        parts.append(name + text)
        room -= len(parts[-1]) + 2
    line = ", ".join(parts)
    return f"{{{line}}}" if isinstance(value, Mapping) else f"[{line}]"


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise RecipeError(f"the key {key!r} is no text")
    return _leaf(key)


def _leaf(value: Any) -> str:
    """A scalar, or an empty list or mapping."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        # By the length in bits first: `str` of a huge integer is refused by Python with a ValueError.
        if value.bit_length() > 64 or not -(1 << 63) <= value < 1 << 63:
            raise RecipeError("an integer has more than 64 bits")
        return str(int(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecipeError(f"numbers must be finite, {value} is not")
        text = repr(float(value))
        return text if "." in text else text.replace("e", ".0e")
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, (list, tuple)):
        return "[]"
    raise RecipeError(f"a value of type {type(value).__name__} has no place in YAML")


def _text(value: str) -> str:
    if len(value) <= 200 and _PLAIN.fullmatch(value) and value.lower() not in _WORDS_1_1:
        return str(value)
    if _UNUSABLE.search(value):
        raise RecipeError("a text holds NUL or half a surrogate pair")
    return '"' + _ESCAPED.sub(lambda found: _SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", value) + '"'
