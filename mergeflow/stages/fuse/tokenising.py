"""Texts -> documents that every model can read whole, and each document's tokens with the UTF-8 bytes that they cover.

Bytes of one text are what tokens of different tokenizers have in common, so all that pairs tokens goes by them. Where the bytes of
a document's tokens put together are the document (byte-level BPE, SentencePiece with bytes for what it does not know), their
lengths say where each token ends, inside a character too. Elsewhere (WordPiece drops spaces, an unknown word has no bytes of
its own) the offsets do that `tokenizers` tells. What the template of a tokenizer adds covers nothing.

A tokenizer that reads another text than it is given (lower case, compatibility forms) is refused: its tokens would be said to cover
bytes that they do not. Composing accents (NFC) is let pass, since the text stays the same to a reader.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergeflow.errors import InputError, RecipeError
from mergeflow.stages import models, scratch

SPACE = "▁"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
DOCUMENTS_AT_ONCE = 512
TOKENS, TEXTS = "tokens.safetensors", "texts.safetensors"

Integers = NDArray[np.int64]


# Tokenizers


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's tokenizer as fusing needs it.

    `backend` is of the package tokenizers. `tokens` and `pieces` have, by id, the token as the vocabulary writes it and the bytes
    that it stands for (None where there is no such id, or it is special); `roles` the ids of special tokens by what they are for
    (`bos`, `eos`, ...). The template puts `before` tokens ahead of a text, and `behind` after it.
    """

    backend: Any
    tokens: tuple[str | None, ...]
    pieces: tuple[bytes | None, ...]
    roles: Mapping[str, int]
    before: int
    behind: int
    where: str = ""

    @property
    def size(self) -> int:
        """How many ids there are: logits beyond them are of padding."""
        return len(self.tokens)

    @cached_property
    def digest(self) -> str:
        """A digest of all that decides the tokens of a text and what they mean."""
        return blake3(json.dumps([self.backend.to_str(), sorted(self.roles.items())]).encode()).hexdigest()

    @cached_property
    def widths(self) -> Integers:
        """(size,): how many bytes each token stands for."""
        return np.array([len(piece or b"") for piece in self.pieces], dtype=np.int64)


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a local Hugging Face folder. Raises InputError where it has none that can be used."""
    library = models.transformers()
    fix = "Put its tokenizer files (tokenizer.json, tokenizer_config.json) beside its config.json."
    try:
        with models.quietly():
            found = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"its tokenizer cannot be loaded: {first}", where=str(folder), fix=fix) from error
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise InputError("its tokenizer does not say which text a token covers", where=str(folder), fix=fix)
    roles = {role: getattr(found, f"{role}_token_id", None) for role in ROLES}
    return tokenizer_of(backend, {role: int(one) for role, one in roles.items() if one is not None}, where=str(folder))


def tokenizer_of(backend: Any, roles: Mapping[str, int], *, where: str = "") -> Tokenizer:
    """A `tokenizers.Tokenizer` with the ids of its special tokens. Raises InputError where it changes the text."""
    backend.no_truncation()
    backend.no_padding()
    _refuse_changes(backend, where)
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    if not size:
        raise InputError("its tokenizer knows no token", where=where)
    tokens: list[str | None] = [None] * size
    for token, number in vocabulary.items():
        tokens[number] = token
    added = backend.get_added_tokens_decoder()
    special = {number for number, token in added.items() if token.special and not _byte(token.content)}
    special |= set(roles.values())
    spell = _spelling(json.loads(backend.to_str()))
    pieces = [
        None
        if token is None or number in special
        else token.encode()
        if number in added and not _byte(token)
        else spell(token)
        for number, token in enumerate(tokens)
    ]
    marks = backend.encode("a").special_tokens_mask
    before = next((index for index, mark in enumerate(marks) if not mark), len(marks))
    return Tokenizer(backend, tuple(tokens), tuple(pieces), dict(roles), before, sum(marks) - before, where)


_PROBES = (
    ("Ab", "writes lower case for capitals"),
    ("\u00e9", "drops accents"),
    ("\ufb01 \u00b2 \uff21", "writes common characters for compatibility forms (NFKC)"),
)


def _refuse_changes(backend: Any, where: str) -> None:
    for probe, what in _PROBES:
        if not _keeps(backend, probe):
            raise InputError(
                f"its tokenizer {what}: its tokens are of another text than other models read",
                where=where,
                fix="Fuse models whose tokenizers keep the text as it is.",
            )


def _keeps(backend: Any, text: str) -> bool:
    """Whether the text that is cut into tokens is this one, but for spaces and for how accents are composed."""
    if backend.normalizer is None:
        return True
    read = _bare(backend.normalizer.normalize_str(text))
    return read == _bare(text) or unicodedata.normalize("NFC", read) == unicodedata.normalize("NFC", _bare(text))


def _bare(text: str) -> str:
    return "".join(text.replace(SPACE, " ").split())


def _types(spec: Any) -> Iterator[str]:
    """The types of all parts of a tokenizer, its vocabulary apart."""
    if isinstance(spec, dict):
        if isinstance(spec.get("type"), str):
            yield spec["type"]
        for key, value in spec.items():
            if key not in ("vocab", "merges", "added_tokens"):
                yield from _types(value)
    elif isinstance(spec, list):
        for one in spec:
            yield from _types(one)


def _spelling(spec: Mapping[str, Any]) -> Any:
    """The function that gives a token's bytes."""
    model = spec["model"]
    if "ByteLevel" in {*_types(spec.get("pre_tokenizer")), *_types(spec.get("decoder"))}:
        table = _byte_level()
        return lambda token: bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
    if model.get("type") == "WordPiece":
        inside = model.get("continuing_subword_prefix") or "##"
        return lambda token: (
            token.removeprefix(inside).encode()
            if token.startswith(inside) and token != inside
            else (b" " if token[:1].isalnum() else b"") + token.encode()
        )
    fallback = bool(model.get("byte_fallback")) or "ByteFallback" in set(_types(spec.get("decoder")))
    suffix = model.get("end_of_word_suffix") or ""

    def spelled(token: str) -> bytes:
        if fallback and _byte(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").removesuffix(suffix).encode()

    return spelled


def _byte(token: str) -> bool:
    """Whether a token is written as the number of a byte, which some vocabularies list as special."""
    return re.fullmatch("<0x[0-9A-F]{2}>", token) is not None


def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable Latin-1 itself, the others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(shown)))}


# Documents


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents that each model can read whole. `empty` counts the texts without a character, which are left out."""

    texts: tuple[str, ...]
    empty: int = 0

    @cached_property
    def lengths(self) -> Integers:
        """(documents,): UTF-8 bytes."""
        return np.array([len(text.encode()) for text in self.texts], dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Write the texts with their lengths in bytes."""
        whole = np.frombuffer("".join(self.texts).encode(), dtype=np.uint8)
        tensors: dict[str, NDArray[Any]] = {"bytes": whole, "lengths": self.lengths, "empty": np.array([self.empty])}
        scratch.save(folder / TEXTS, tensors)

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """What `save` wrote. Raises InputError where it is damaged."""
        read = read_tensors(folder / TEXTS)
        whole, ends = read["bytes"].tobytes(), np.cumsum(read["lengths"])
        starts = ends - read["lengths"]
        texts = tuple(whole[start:end].decode() for start, end in zip(starts, ends, strict=True))
        return cls(texts, int(read["empty"][0]))


def cut(texts: Sequence[str], readers: Sequence[tuple[Tokenizer, int]]) -> Corpus:
    """Each text whole where each of the readers (a tokenizer, and the most tokens that its model reads) can read it whole, else in
    pieces, cut between characters, before a space where one is near.

    Raises RecipeError where a context holds less than one character, InputError where no text has any.
    """
    found: list[str] = []
    for text in texts:
        start = 0
        while start < len(text):
            end = min(_fitting(text, start, tokenizer, longest) for tokenizer, longest in readers)
            end = _border(text, start, end)
            while not all(_count(tokenizer, text[start:end]) <= longest for tokenizer, longest in readers):
                end = _border(text, start, end - 1 - (end - start) // 16)  # cut tokens may be more than whole ones
            found.append(text[start:end])
            start = end
    empty = sum(not text for text in texts)
    if not found:
        raise InputError("has no text with a character in it", fix="Look at the data, and at the field's name.")
    return Corpus(tuple(found), empty)


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.backend.encode(text).ids)


def _fitting(text: str, start: int, tokenizer: Tokenizer, longest: int) -> int:
    """Where a piece that begins at `start` may end at most."""
    room = longest - tokenizer.before - tokenizer.behind
    width = 8 * longest
    while True:
        window = text[start : start + width]
        offsets = tokenizer.backend.encode(window, add_special_tokens=False).offsets
        if len(offsets) > room:
            end = offsets[room][0] if room > 0 else 0
            if end == 0:
                raise RecipeError(
                    f"a context of {longest} tokens is too short for '{window[:1]}'",
                    where=tokenizer.where,
                    fix="Write more in `max_length`.",
                )
            return start + int(end)
        if start + width >= len(text):
            return len(text)
        width *= 2


def _border(text: str, start: int, end: int) -> int:
    """The last good place for a cut at or before `end`: before a space in the last quarter, else between characters that are
    read apart."""
    if end >= len(text):
        return len(text)
    for place in range(end, max(start + 1, end - (end - start) // 4), -1):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    place = max(end, start + 1)
    while place > start + 1 and (unicodedata.combining(text[place]) or text[place - 1 : place + 1] == "\r\n"):
        place -= 1
    return place


# Tokens


@dataclass(frozen=True, eq=False)
class Tokenised:
    """The tokens of all documents, one after the other.

    `ids` (tokens,) and `ends` (tokens,), the bytes of its document that the first tokens up to this one cover, both int32;
    `offsets` (documents + 1,) int64, where each document begins; `lengths` (documents,) int64, bytes.
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int32]
    offsets: Integers
    lengths: Integers

    def document(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The ids and ends of a document."""
        here = slice(self.offsets[number], self.offsets[number + 1])
        return self.ids[here], self.ends[here]

    @cached_property
    def owners(self) -> Integers:
        """(tokens,): the document that each token is of."""
        return np.repeat(np.arange(len(self.lengths)), np.diff(self.offsets))

    @cached_property
    def places(self) -> Integers:
        """(tokens,): `ends` in all documents together, with one byte between documents, so that no two share a place."""
        starts: Integers = np.cumsum(self.lengths + 1) - self.lengths - 1
        places: Integers = self.ends.astype(np.int64) + np.repeat(starts, np.diff(self.offsets))
        return places

    def save(self, folder: Path) -> None:
        """Write all of it."""
        tensors: dict[str, NDArray[Any]] = {
            "ids": self.ids,
            "ends": self.ends,
            "offsets": self.offsets,
            "lengths": self.lengths,
        }
        scratch.save(folder / TOKENS, tensors)

    @classmethod
    def open(cls, folder: Path) -> Tokenised:
        """What `save` wrote. Raises InputError where it is damaged."""
        read = read_tensors(folder / TOKENS)
        return cls(read["ids"], read["ends"], read["offsets"], read["lengths"])


def read_tensors(path: Path) -> dict[str, Any]:
    """The arrays of a file. Raises InputError where it is damaged."""
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise InputError(
            f"cannot be read: {error}", where=str(path), fix="Clear it: `mergeflow cache clear`."
        ) from None


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenised:
    """The tokens of documents, with the bytes that they cover. Raises InputError where a document is read as another text."""
    ids: list[NDArray[np.int32]] = []
    ends: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
        some = texts[start : start + DOCUMENTS_AT_ONCE]
        for text, encoding in zip(some, tokenizer.backend.encode_batch(list(some)), strict=True):
            numbers = np.array(encoding.ids, dtype=np.int32)
            ids.append(numbers)
            ends.append(_ends(tokenizer, text, encoding, numbers).astype(np.int32))
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
    none = np.zeros(0, dtype=np.int32)
    lengths = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    return Tokenised(np.concatenate([none, *ids]), np.concatenate([none, *ends]), offsets, lengths)


def _ends(tokenizer: Tokenizer, text: str, encoding: Any, ids: NDArray[np.int32]) -> Integers:
    """(tokens,): the bytes covered up to each token."""
    before, stop = tokenizer.before, len(ids) - tokenizer.behind
    inside = ids[before:stop]
    whole, read = text.encode(), b"".join([tokenizer.pieces[one] or b"" for one in inside.tolist()])
    extra = len(read) - len(whole)
    if read == whole or (extra == 1 and read == b" " + whole):
        found = np.maximum(np.cumsum(tokenizer.widths[inside]) - extra, 0)
    else:
        if not _keeps(tokenizer.backend, text):
            raise InputError(
                "its tokenizer reads a document as another text",
                where=tokenizer.where,
                fix=f"The document begins with '{text[:40]}'.",
            )
        found = _by_offsets(tokenizer, text, encoding.offsets[before:stop], inside)
    last = found[-1] if len(found) else 0
    return np.concatenate([np.zeros(before, np.int64), found, np.full(tokenizer.behind, last, np.int64)])


def _by_offsets(
    tokenizer: Tokenizer, text: str, offsets: Sequence[tuple[int, int]], ids: NDArray[np.int32]
) -> Integers:
    """Ends by the characters that the tokenizer says; of several tokens for one character all but the last end inside it."""
    whole, points = text.encode(), np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    table = np.concatenate([[0], np.cumsum(sizes)])
    if not len(offsets):
        return np.zeros(0, dtype=np.int64)
    spans = table[np.array(offsets, dtype=np.int64)]
    ends: Integers = np.maximum.accumulate(spans[:, 1])
    for index in np.flatnonzero(spans[1:, 0] < ends[:-1]):  # the next token begins before this one ends
        reached = int(ends[index - 1]) if index else 0
        piece = tokenizer.pieces[ids[index]] or b""
        width = len(piece) - (piece[:1] == b" " and whole[reached : reached + 1] != b" ")  # a space that only it sees
        ends[index] = max(reached, min(reached + width, ends[index] - 1))
    return ends
