"""Whether two models' tokenizers mean the same words by the same ids: what merging embeddings row by row takes for granted."""

from __future__ import annotations

import json
from collections.abc import Mapping

from blake3 import blake3

from mergeflow.checkpoint import Checkpoint
from mergeflow.errors import InputError

FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
SHOWN = 5


class Vocabularies:
    """The tokens of models by id, read when two models are compared whose files differ, each file once."""

    def __init__(self, models: Mapping[str, Checkpoint]) -> None:
        self.models = models
        self.files: dict[str, tuple[str, str, bytes]] = {}
        self._known: dict[str, dict[int, str]] = {}
        self.clashes: dict[tuple[str, str], str] = {}

    def clash(self, first: str, second: str) -> str:
        """How two models' tokenizers differ, with the first five ids; empty where they agree or one has no tokenizer."""
        if first == second:
            return ""
        if (first, second) not in self.clashes:
            self.clashes[first, second] = self._clash(first, second)
        return self.clashes[first, second]

    def _clash(self, first: str, second: str) -> str:
        if self._file(first)[0] == self._file(second)[0]:
            return ""
        mine, theirs = self.tokens(first), self.tokens(second)
        differ = sorted(i for i in mine.keys() & theirs.keys() if mine[i] != theirs[i])
        if not differ:
            return ""
        shown = ", ".join(f"{i} is {mine[i]!r} and {theirs[i]!r}" for i in differ[:SHOWN])
        more = f", and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        return f"the tokenizers of '{first}' and '{second}' mean different tokens by {len(differ)} ids: {shown}{more}"

    def _file(self, model: str) -> tuple[str, str, bytes]:
        """Digest, name and content of the file that holds a model's tokens; empty ones where it has none."""
        if model not in self.files:
            folder = self.models[model].folder
            name = next((name for name in FILES if folder.exists(name)), "")
            content = folder.read(name) if name else b""
            self.files[model] = (blake3(content).hexdigest(), name, content)
        return self.files[model]

    def tokens(self, model: str) -> dict[int, str]:
        """The tokens of a model by id; none where it has no tokenizer file that lists them."""
        digest, name, content = self._file(model)
        if digest not in self._known:
            self._known[digest] = _read(name, content, f"{self.models[model].folder.label}/{name}") if name else {}
        return self._known[digest]


def _read(name: str, content: bytes, where: str) -> dict[int, str]:
    """Tokens by id of a tokenizer file."""
    try:
        if name == "vocab.txt":
            return dict(enumerate(content.decode("utf-8").splitlines()))
        data = json.loads(content)
        if name == "vocab.json":
            return {int(i): str(token) for token, i in data.items()}
        known = (data.get("model") or {}).get("vocab") or {}
        if isinstance(known, dict):
            tokens = {int(i): str(token) for token, i in known.items()}
        else:
            tokens = {i: str(item[0]) for i, item in enumerate(known)}
        tokens.update((int(added["id"]), str(added["content"])) for added in data.get("added_tokens") or ())
        return tokens
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(
            f"this is no tokenizer file that can be read ({error})", where=where, fix="Mend or remove it."
        ) from None
