"""PEFT's LoRA adapters: a folder of `adapter_config.json` and `adapter_model.safetensors` -> what it does to its base.

Read here, without peft, from headers and the config alone: which tensors of the base change, each by scaling * B A or by a
whole weight that stands in its place (`modules_to_save`, biases, a resized embedding). The rules are peft's own: alpha / r, or
alpha / sqrt(r) with `use_rslora`; ranks and alphas by pattern, the first that fits.

An adapter that would be applied wrong is worse than one that is refused. So every tensor of the file must be understood, every
rank be what the config says, and a key of the config that this module does not know must be off (null, false, empty): what is
known to change nothing is listed, everything else that is set is refused by name.

Patterns come from strangers. Plain ones go to `re`; others to the regular expressions of pydantic's core, which take linear time
whatever the pattern.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from blake3 import blake3

from mergeflow.checkpoint import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, Checkpoint, open_checkpoint, read_json
from mergeflow.checkpoint.safetensors import StoredTensor
from mergeflow.checkpoint.sources import LowRank
from mergeflow.dtypes import BY_NAME, DType
from mergeflow.errors import InputError, MergeflowError, raise_all
from mergeflow.hub import Folder, place_of

MERGE = "Merge it into its base with peft (`merge_and_unload`), save that model, and name its folder under `path:`."
CONVERT = (
    "Save it again with peft's `save_pretrained(..., path_initial_model_for_weight_conversion=...)`, "
    "which makes it an adapter of the base as it was."
)
SAVE_AGAIN = (
    "Save it again with peft's `save_pretrained`, which writes safetensors. "
    "If you know whom it is from, give --allow-pickle, by which only tensors are read."
)
PREFIX = "base_model.model."
MOST_TRIALS = 10_000_000
"""Patterns times modules that are tried at most: a real adapter has hundreds of each at worst."""

HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ephemeral_gpu_offload",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config", "ensure_weight_tying",
}  # fmt: skip
"""Keys that are read here, or say only how the adapter was made: with these, the tensors are all that counts."""

REFUSED = {
    "use_dora": ("is a DoRA adapter, whose update depends on the norms of the base's weights", MERGE),
    "lora_bias": ("trains a bias of its own beside lora_B (lora_bias)", MERGE),
    "layer_replication": ("copies layers of its base (layer_replication)", MERGE),
    "trainable_token_indices": ("trains single rows of the embedding (trainable_token_indices)", MERGE),
    "target_parameters": ("changes parameters that are no layer's weight (target_parameters)", MERGE),
    "alora_invocation_tokens": (
        "is an activated LoRA (aLoRA), which works only after certain tokens, so that no weights do what it does",
        "It cannot be merged: use it through peft.",
    ),
    "use_qalora": ("is a QALoRA adapter, which pools the inputs of its layers", MERGE),
    "use_bdlora": ("is block-diagonal (use_bdlora)", MERGE),
    "kasa_config": ("is a KaSA adapter, which truncates the base's weights", MERGE),
    "monteclora_config": ("samples its update (monteclora_config)", MERGE),
    "arrow_config": ("routes between other adapters (arrow_config)", "Merge those adapters themselves."),
}
"""Keys that change what the tensors do, when they are on."""

SOUND_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Words of `init_lora_weights` that leave the base as it is."""

_PAIR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
_PLAIN_PATTERN = re.compile(r"[\w.\-^\\]*")
_SET_OPERATION = re.compile(r"\[[^\]]*(\[|&&|--|~~)")
_FOREIGN = ("lora_", "token_adapter", "trainable_tokens")


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter does to one tensor of its base.

    `up` (out, rank) and `down` (rank, in) are lora_B and lora_A, `embedding` says that they are an embedding's; `saved` is a
    whole weight that stands in the place of the base's. A tensor may have both.
    """

    name: str
    up: StoredTensor | None = None
    down: StoredTensor | None = None
    rank: int = 0
    scaling: float = 0.0
    embedding: bool = False
    saved: StoredTensor | None = None

    @property
    def dtype(self) -> DType:
        """The dtype that it is computed in, or that a weight is saved in."""
        parts = [part for part in (self.up, self.down, self.saved) if part is not None]
        if self.up is None and self.saved is not None:
            return self.saved.dtype
        return BY_NAME["float64" if any(part.dtype.name == "float64" for part in parts) else "float32"]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that the base's tensor may have: of a matrix both ways round, if they differ, as a Linear has it first."""
        if self.up is None or self.down is None:
            return (self.saved.shape,) if self.saved is not None else ()
        shape = (self.up.shape[0], *self.down.shape[1:])
        if self.embedding:
            return ((shape[1], shape[0]),)
        return (shape,) if len(shape) > 2 or shape[0] == shape[1] else (shape, (shape[1], shape[0]))

    @property
    def turns(self) -> bool:
        """Whether a Linear and a Conv1D, which stores (in, out), would take it differently."""
        return self.up is not None and not self.embedding and len(self.up.shape) == 2

    def source(self, *, transposed: bool) -> LowRank:
        """What makes the low-rank part out of `up` and `down`."""
        return LowRank(self.rank, self.scaling, transposed or self.embedding)


@dataclass(frozen=True, eq=False)
class Adapter(Checkpoint):
    """A LoRA adapter as its config and header tell it.

    `updates` by the names of the base's tensors; `lora` is adapter_config.json; `transposed` what it says of matrices as
    Conv1D stores them (fan_in_fan_out).
    """

    updates: Mapping[str, Update]
    lora: Mapping[str, Any]
    config_digest: str

    @property
    def transposed(self) -> bool:
        return self.lora.get("fan_in_fan_out") is True

    @property
    def deciding(self) -> Mapping[str, str]:
        return {ADAPTER_CONFIG: self.config_digest}

    @property
    def facts(self) -> dict[str, Any]:
        """What it is, JSON-ready: ranks and scalings that occur, targets, whole weights, and the base it was trained on."""
        pairs = [one for one in self.updates.values() if one.up is not None]
        targets = {one.name.rpartition(".")[0].rpartition(".")[2] for one in pairs}
        return {
            "rank": sorted({one.rank for one in pairs}),
            "alpha": self.lora["lora_alpha"],
            "scaling": sorted({one.scaling for one in pairs}),
            "rslora": self.lora.get("use_rslora") is True,
            "targets": sorted(targets),
            "changes": len(self.updates),
            "saved": [one.name for one in self.updates.values() if one.saved is not None],
            "base": self.lora.get("base_model_name_or_path"),
        }


def open_adapter(folder: Folder, *, allow_pickle: bool = False) -> Adapter:
    """The adapter in a folder, by its config and header alone; a pickled one only with `allow_pickle`.

    Raises InputError for what is no LoRA adapter of peft's, and for one whose effect would not be exactly that of its tensors.
    """
    file = _weights_file(folder, allow_pickle)
    config, digest = _read_config(folder)
    where = place_of(folder, ADAPTER_CONFIG)
    raise_all([InputError(what, where=where, fix=fix) for what, fix in _refusals(config)])
    weights = open_checkpoint(folder, file=file, allow_pickle=allow_pickle)
    updates = _Reader(config, where, place_of(folder, file)).read(weights.tensors.values())
    kept = {one.name: getattr(weights, one.name) for one in fields(weights)} | {"config": None}
    return Adapter(**kept, updates=updates, lora=config, config_digest=digest)


def _weights_file(folder: Folder, allow_pickle: bool) -> str:
    """The file of the weights; it and the config must be there."""
    names = folder.names()
    if ADAPTER_CONFIG not in names:
        below = sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{ADAPTER_CONFIG}"))
        raise InputError(
            f"holds no {ADAPTER_CONFIG}, so it is no adapter of peft's",
            where=folder.label,
            fix=f"There is one in {', '.join(below[:5])}: name it with `subfolder:`."
            if below
            else "A model is named with `path:`.",
        )
    if ADAPTER_WEIGHTS not in names and ADAPTER_PICKLE in names:
        if allow_pickle:
            return ADAPTER_PICKLE
        raise InputError(
            "is a pickle, which can run code when it is opened", where=place_of(folder, ADAPTER_PICKLE), fix=SAVE_AGAIN
        )
    if ADAPTER_WEIGHTS not in names:
        raise InputError(f"holds no {ADAPTER_WEIGHTS}", where=folder.label, fix="Fetch the whole adapter.")
    return ADAPTER_WEIGHTS


def _read_config(folder: Folder) -> tuple[dict[str, Any], str]:
    """The config, and the digest of its bytes."""
    config = read_json(folder, ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise InputError(
            "is not a JSON object", where=place_of(folder, ADAPTER_CONFIG), fix="Fetch or copy the file again."
        )
    return config, blake3(folder.read(ADAPTER_CONFIG)).hexdigest()


def _refusals(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Why an adapter of this config is not applied, each with what to do."""
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"is an adapter of the kind {_shown(kind)}, and only LORA is read", MERGE
        return
    yield from (REFUSED[key] for key in REFUSED if config.get(key))
    start = config.get("init_lora_weights", True)
    if start == "loftq":
        yield "was started by LoftQ, on a base that was quantised for it", MERGE
    elif isinstance(start, str) and re.fullmatch("pissa.*|olora|corda|lora_ga", start):
        yield f"was started by {start}, which changed the base's weights", CONVERT
    elif not isinstance(start, bool) and start not in SOUND_STARTS:
        yield f"was started in a way that is not known here (init_lora_weights: {_shown(start)})", MERGE
    for key in config:
        if key not in HARMLESS and key not in REFUSED and config[key]:
            yield (
                f"says `{key}: {_shown(config[key])}`, and what that does to the weights is not known here",
                f"{MERGE[:-1]}, or a newer mergeflow may know it.",
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_rank(rank):
        yield f"has no rank: `r` is {_shown(rank)}", "It is a whole number from 1 on."
    if not _is_number(alpha):
        yield f"has no scale: `lora_alpha` is {_shown(alpha)}", "It is a number."
    for key, fits, what in (("rank_pattern", _is_rank, "ranks"), ("alpha_pattern", _is_number, "numbers")):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
            yield f"has a `{key}` that is no mapping of patterns to {what}", "Fetch or copy the file again."


class _Reader:
    """One adapter's tensors, each given its meaning by name; what has none is a problem, and all are reported together."""

    def __init__(self, config: Mapping[str, Any], where: str, weights: str) -> None:
        self.config, self.where, self.weights = config, where, weights
        self.errors: list[MergeflowError] = []
        self.updates: dict[str, Update] = {}

    def problem(self, names: Iterable[str], what: str, fix: str) -> None:
        """`what` (`{names}` stands for them) is wrong with these tensors, if there are any."""
        listed = list(names)
        if listed:
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            shown = ", ".join(f"'{name}'" for name in listed[:3]) + more
            self.errors.append(InputError(what.replace("{names}", shown), where=self.weights, fix=fix))

    def read(self, tensors: Iterable[StoredTensor]) -> dict[str, Update]:
        """What the adapter does, by the names of the base's tensors. Raises InputError, or Problems with several."""
        pairs: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
        whole: list[StoredTensor] = []
        strange, names = [], dict[str | None, None]()
        for tensor in tensors:
            found = _PAIR.fullmatch(tensor.name) or _EMBEDDING.fullmatch(tensor.name)
            if found is None:
                whole.append(tensor)
                continue
            halves = pairs.setdefault((_base_name(found[1]), found.re is _EMBEDDING), {})
            if found[2] in halves:
                strange.append(tensor.name)
            halves[found[2]] = tensor
            names[found[3]] = None
        if len(names) > 1:
            listed = ", ".join("one without a name" if name is None else f"'{name}'" for name in names)
            self.errors.append(
                InputError(
                    f"holds several adapters: {listed}",
                    where=self.weights,
                    fix="Save each in a folder of its own: `save_pretrained(..., selected_adapters=[NAME])`.",
                )
            )
        raise_all(self.errors)
        self._read_whole(whole, next(iter(names), None), strange)
        self.problem(
            strange, "holds {names}, which are not understood, so that part of what it does would be lost", MERGE
        )
        self._read_pairs(pairs)
        raise_all(self.errors)
        if not self.updates:
            raise InputError("holds no tensor", where=self.weights, fix="Fetch the adapter again.")
        return self.updates

    def _read_whole(self, tensors: Iterable[StoredTensor], adapter: str | None, strange: list[str]) -> None:
        """Weights that stand in the place of the base's.

        With `bias: all` peft writes some tensors again under the names of its wrappers, which it does not read back:
        `X.original_module.bias` is the base's, `X.modules_to_save.bias` is `X.bias` once more.
        """
        wrapped: list[tuple[str, bool, StoredTensor]] = []
        for tensor in tensors:
            parts = tensor.name.removeprefix(PREFIX).split(".")
            wrapper = next((word for word in ("original_module", "modules_to_save") if word in parts), None)
            if wrapper is not None:
                at = parts.index(wrapper)
                named = wrapper == "modules_to_save" and len(parts) > at + 2 and parts[at + 1] == (adapter or "default")
                del parts[at : at + 1 + named]
                wrapped.append((_base_name(".".join(parts)), wrapper == "modules_to_save", tensor))
                continue
            name = _base_name(".".join(parts))
            if name in self.updates or any(word.startswith(_FOREIGN) for word in name.split(".")):
                strange.append(tensor.name)
            else:
                self.updates[name] = Update(name, saved=tensor)
        for name, is_copy, tensor in wrapped:
            if is_copy:
                self.updates.setdefault(name, Update(name, saved=tensor))
        strange += [tensor.name for name, _, tensor in wrapped if name not in self.updates]

    def _read_pairs(self, pairs: Mapping[tuple[str, bool], Mapping[str, StoredTensor]]) -> None:
        modules = [module for module, _ in pairs]
        ranks = self._by_pattern("rank_pattern", "r", modules)
        alphas = self._by_pattern("alpha_pattern", "lora_alpha", modules)
        outside = self._untargeted(modules)
        alone, unlike, broken, twice = [], [], [], []
        ranked: dict[tuple[int, int], list[str]] = {}
        for (module, embedding), halves in pairs.items():
            if len(halves) < 2:
                alone += [half.name for half in halves.values()]
                continue
            down, up = halves["A"], halves["B"]
            if {down.dtype.kind, up.dtype.kind} != {"float"}:
                broken.append(up.name)
            elif not _fits(down, up, embedding):
                unlike.append(up.name)
            elif down.shape[0] != ranks[module]:
                ranked.setdefault((down.shape[0], int(ranks[module])), []).append(up.name)
            else:
                name, rank = f"{module}.weight", down.shape[0]
                before = self.updates.get(name, Update(name))
                scaling = alphas[module] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
                self.updates[name] = Update(name, up, down, rank, scaling, embedding, before.saved)
                twice += [up.name] if before.up is not None else []
        again = "Fetch or save the adapter again."
        self.problem(alone, "holds {names} without the other half (lora_A and lora_B come in pairs)", again)
        self.problem(broken, "holds {names} in a dtype that is no float's", again)
        self.problem(unlike, "holds {names} of a shape that does not go with its lora_A", again)
        self.problem(twice, "holds {names} beside another update of the same weight", again)
        for (rank, wanted), names in ranked.items():
            self.problem(
                names,
                f"holds {{names}} of rank {rank}, which is {wanted} by its config",
                "Config and weights are not of one adapter: fetch or save it again.",
            )
        self.problem(outside, "holds updates of {names}, which `target_modules` of its config does not name", MERGE)

    def _by_pattern(self, key: str, default: str, modules: Iterable[str]) -> dict[str, float]:
        """Each module's number: that of the first pattern which fits the end of its name, as peft looks it up."""
        patterns: Mapping[str, float] = self.config.get(key) or {}
        found = {module: float(self.config[default]) for module in modules}
        if len(patterns) * len(found) > MOST_TRIALS:
            raise InputError(f"has {len(patterns)} patterns in `{key}`", where=self.where, fix=MERGE)
        fitting = [
            (self._fitting(rf"^(.*\.)?({pattern})$", key, pattern), value) for pattern, value in patterns.items()
        ]
        for module in found:
            for fits, value in fitting:
                if fits(module):
                    found[module] = float(value)
                    break
        return found

    def _untargeted(self, modules: Iterable[str]) -> list[str]:
        """Modules that `target_modules` does not name: peft would not read their tensors."""
        targets = self.config.get("target_modules")
        if isinstance(targets, str) and targets != "all-linear":
            fits = self._fitting(f"^({targets})$", "target_modules", targets)
            return [module for module in modules if not fits(module)]
        if isinstance(targets, list) and all(isinstance(one, str) for one in targets):
            ends = tuple(f".{one}" for one in targets)
            return [module for module in modules if not f".{module}".endswith(ends)]
        return []

    def _fitting(self, regex: str, key: str, pattern: str) -> Callable[[str], bool]:
        """Whether a name fits a regular expression. Raises InputError for one that cannot be read."""
        from pydantic import StringConstraints, TypeAdapter, ValidationError
        from pydantic_core import SchemaError

        try:
            if _PLAIN_PATTERN.fullmatch(pattern):
                plain = re.compile(regex)
                return lambda name: plain.match(name) is not None
            if _SET_OPERATION.search(pattern):  # which the two kinds of expressions read differently
                raise re.error("set operation")
            checker: TypeAdapter[str] = TypeAdapter(_constrained(StringConstraints(pattern=regex)))
        except (re.error, SchemaError):
            raise InputError(
                f"has the pattern {_shown(pattern)} in `{key}`, which cannot be read", where=self.where, fix=MERGE
            ) from None

        def fits(name: str) -> bool:
            try:
                checker.validate_python(name)
            except ValidationError:
                return False
            return True

        return fits


def _constrained(constraints: Any) -> Any:
    from typing import Annotated

    return Annotated[str, constraints]


def _base_name(name: str) -> str:
    """A module's or tensor's name in the base: without peft's prefix and the wrappers' `base_layer`."""
    return ".".join(part for part in name.removeprefix(PREFIX).split(".") if part != "base_layer")


def _fits(down: StoredTensor, up: StoredTensor, embedding: bool) -> bool:
    """Whether lora_A (rank, in, kernel...) and lora_B (out, rank, 1...) go together."""
    axes = len(down.shape)
    return (
        axes == len(up.shape)
        and (axes == 2 or (axes > 2 and not embedding))
        and all(down.shape)
        and all(up.shape)
        and up.shape[1] == down.shape[0]
        and all(length == 1 for length in up.shape[2:])
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
