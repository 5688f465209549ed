"""config.json of a model whose layers were stacked: the count of layers, and what the config says of each by its number.

Families name the count differently, and few configs say which key is which, so a key counts the layers of a stack when it
is one of the words for that, stands in the section for that part of the model, and holds the number of layers that the
model has there. What could not be mended is a warning that says what to write, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergeflow.graph import Stacked

Path = tuple[str, ...]
Config = Mapping[str, Any]

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks", "n_blocks")
PART_COUNTS = {
    "encoder": ("num_encoder_layers", "encoder_layers", "encoder_num_hidden_layers", "encoder_num_layers"),
    "decoder": ("num_decoder_layers", "decoder_layers", "decoder_num_hidden_layers", "decoder_num_layers"),
}
LIMITS = ("max_window_layers", "first_k_dense_replace", "num_kv_shared_layers", "moe_layer_end_index")
"""Numbers of layers that are at most the count."""
INDICES = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "cross_attention_layers",
    "global_attn_indexes",
    "hybrid_layer_ids",
    "full_attn_idxs",
    "full_attn_layers",
    "fullatt_block_indexes",
    "deepstack_visual_indexes",
)
"""Lists of the numbers of some layers, not of one value for each."""
PERIODS = (
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "global_attn_every_n_layers",
    "full_attention_interval",
    "attn_layer_period",
    "no_rope_layer_interval",
    "cross_attn_every_n_layers",
    "expert_layer_period",
    "decoder_sparse_step",
    "encoder_sparse_step",
    "moe_layer_freq",
    "moe_every_n_layers",
    "interleave_moe_layer_step",
)
"""Numbers that make each n-th layer another kind."""
_NOT_LAYERS = re.compile(
    r"architectures|token|label|lang|stage|feature|mean$|std$|_ids?$|^(image|patch|window|crop|kernel|conv|video)_|(^|_)stride"
    r"|^(depths|hidden_sizes|dims?|size)$|section"
)
_TOWERS = {
    "vision": re.compile(r"vision|visual|image"),
    "audio": re.compile(r"audio|speech"),
}
_TEXT = ("text_config", "llm_config", "language_config")


def restacked(
    config: Config, stacks: Sequence[Stacked], sources: Mapping[str, Config], overrides: Config
) -> tuple[dict[str, Any], list[str]]:
    """A config with the layers of each stack that was made, and warnings about what it could not be made to say.

    `sources` are the configs of the models that layers come from; what `overrides` (the output's own `config`) says itself
    is no warning.
    """
    made: dict[str, Any] = dict(config)
    warnings: list[str] = []
    said = set(_keys(overrides))
    for stacked in stacks:
        made = _Restacking(stacked, sources, said, warnings).of(made)
    return made, warnings


class _Restacking:
    """One stack's part in a config."""

    def __init__(self, stacked: Stacked, sources: Mapping[str, Config], said: set[str], warnings: list[str]) -> None:
        self.stacked, self.sources, self.said, self.warnings = stacked, sources, said, warnings
        self.before, self.after = stacked.like.get(stacked.blocks, 0), len(stacked.layers)
        self.part = _part(stacked.blocks)
        other = {"encoder": "decoder", "decoder": "encoder"}.get(self.part or "")
        siblings = [count for prefix, count in stacked.like.items() if other is not None and _part(prefix) == other]
        self.sibling = siblings[0] if siblings else None
        """The number of layers of the decoder beside an encoder, or the encoder beside a decoder."""

    def of(self, config: Config) -> dict[str, Any]:
        made, counted = dict(config), False
        for path in self._sections(config):
            section = dict(_at(made, path) or {})
            counted |= self._count(section, alone=self.sibling is None or path[:1] == (self.part,))
            self._limits(section)
            self._lists(section, path)
            made = _put(made, path, section)
        if not counted and self.said.isdisjoint((*COUNTS, *PART_COUNTS["encoder"], *PART_COUNTS["decoder"])):
            self.warnings.append(
                f"no key of config.json says that '{self.stacked.blocks}' has {self.before} layers, so none was changed. "
                f"Set the one that counts them to {self.after} under `config:`"
            )
        return made

    def _sections(self, config: Config) -> Iterator[Path]:
        """The sections of a config that speak of this stack's part of the model."""
        first = self.stacked.blocks.split(".")[0]
        if first in ("encoder", "decoder") and isinstance(config.get(first), Mapping):
            yield (first,)
            return
        for words in _TOWERS.values():
            if words.search(self.stacked.blocks):
                own = [key for key, value in config.items() if words.search(key) and isinstance(value, Mapping)]
                named: list[Path] = [(key,) for key in own if key.endswith("_config")]
                yield from named or [()]
                return
        yield ()
        yield from ((key,) for key in _TEXT if isinstance(config.get(key), Mapping))

    def _count(self, section: dict[str, Any], *, alone: bool) -> bool:
        """Set the keys that count the layers; whether there was one. `alone`: the section speaks of no other stack."""
        if self.part is None:
            keys: tuple[str, ...] = COUNTS
        elif alone:
            keys = (*PART_COUNTS[self.part], *COUNTS)
        else:
            # T5's `num_layers` counts the encoder's, and the decoder's too where nothing else does.
            if "num_layers" in section and section.get("num_decoder_layers") is None:
                section["num_decoder_layers"] = section["num_layers"]
            keys = PART_COUNTS[self.part] if self.part == "decoder" else (*PART_COUNTS["encoder"], *COUNTS)
        found = [key for key in keys if section.get(key) == self.before and not isinstance(section[key], bool)]
        section.update(dict.fromkeys(found, self.after))
        return bool(found)

    def _limits(self, section: dict[str, Any]) -> None:
        for key in LIMITS:
            value = section.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and (value > self.after or value == self.before):
                section[key] = self.after

    def _lists(self, section: dict[str, Any], path: Path) -> None:
        """Let what is said of each layer follow it, from the config of the model that it comes from."""
        followed = False
        for key, value in section.items():
            if not isinstance(value, list) or key in self.said:
                continue
            if key in INDICES:
                own = [(one, self._said_of(one.model, path, key)) for one in self.stacked.layers]
                section[key] = [
                    n for n, (one, theirs) in enumerate(own) if one.model_layer in (value if theirs is None else theirs)
                ]
            elif key == "attention_types":
                section[key] = self._types(value, path)
            elif len(value) == self.before and self._speaks_of_layers(key):
                section[key] = self._followed(key, value, path)
                followed = True
        periods = [key for key in PERIODS if isinstance(section.get(key), int) and section[key] > 1]
        for key in periods:
            moved = any((n - one.model_layer) % section[key] for n, one in enumerate(self.stacked.layers))
            if moved and key not in self.said and not (followed and re.search("sliding|atten|attn|rope", key)):
                self.warnings.append(
                    f"`{key}: {section[key]}` of config.json gives layers their kind by their number, and in "
                    f"'{self.stacked.blocks}' layers have moved. Take whole periods, or set the kinds under `config:`"
                )

    def _types(self, value: list[Any], path: Path) -> list[Any]:
        """GPT-Neo's way to say it, which must agree with its list: `[[["global", "local"], 12]]`."""

        def spelt(given: list[Any] | None) -> list[Any] | None:
            try:
                return (
                    None if given is None else [kind for kinds, times in given for _ in range(times) for kind in kinds]
                )
            except (TypeError, ValueError):
                return None

        own = spelt(value)
        if own is None or len(own) != self.before:
            return value
        found = []
        for one in self.stacked.layers:
            theirs = spelt(self._said_of(one.model, path, "attention_types")) or own
            found.append(theirs[min(one.model_layer, len(theirs) - 1)])
        return value if found == own else [[found, 1]]

    def _speaks_of_layers(self, key: str) -> bool:
        if _NOT_LAYERS.search(key):
            return False
        return self.sibling != self.before or self.part is None or self.part in key

    def _followed(self, key: str, value: list[Any], path: Path) -> list[Any]:
        lacking: dict[str, None] = {}
        found = []
        for one in self.stacked.layers:
            theirs = self._said_of(one.model, path, key)
            if theirs is None or one.model_layer >= len(theirs):
                lacking[one.model] = None
                theirs = value
            found.append(theirs[min(one.model_layer, len(theirs) - 1)])
        if lacking:
            names = ", ".join(f"'{name}'" for name in lacking)
            self.warnings.append(
                f"`{key}` of config.json is not said of the layers of {names}, so they take what it says of the layers of "
                f"these numbers. Look at it, and set `{key}` under `config:`"
            )
        return found

    def _said_of(self, model: str, path: Path, key: str) -> list[Any] | None:
        """What a model's config says of its layers by this key: in the same section, at its top, or in its text section."""
        config = self.sources.get(model, {})
        for section in (_at(config, path), config, *(_at(config, (name,)) for name in _TEXT)):
            value = section.get(key) if section is not None else None
            if isinstance(value, list):
                return value
        return None


def _part(prefix: str) -> str | None:
    """Whether a stack is an encoder's or a decoder's, by its prefix."""
    return next((word for part in prefix.split(".") for word in PART_COUNTS if word in part), None)


def _at(config: Config, path: Path) -> Config | None:
    for key in path:
        inner = config.get(key)
        if not isinstance(inner, Mapping):
            return None
        config = inner
    return config


def _put(config: dict[str, Any], path: Path, section: dict[str, Any]) -> dict[str, Any]:
    if not path:
        return section
    return {**config, path[0]: _put(dict(config[path[0]]), path[1:], section)}


def _keys(config: Config) -> Iterator[str]:
    for key, value in config.items():
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value)
