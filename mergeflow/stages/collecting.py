"""`gram`, `gram_diag`, `input_mean`, `act_absmean`: means over tokens of what linear layers read, by hooks.

Which layers read the same tensor is found at the hook, by the tensor's identity, on one example before all else; their group
has one statistic, named after the first weight in the order of the calls. Orientation comes from the module: a `Conv1D` is
`Linear` with its weight stored (in, out), square or not. Padded rows never count: the shape of an input tells whether its rows
are tokens, and where it does not, and something is padded, that is an error and no guess. Weights that several modules share
take in what each of them reads. A weight that is also the embedding has none.

A value that is NaN or Inf makes the input of that layer and batch count for nothing; over 0.1% of batches it is an error.

Means are kept in the op's dtype, one update a batch, in the order of the batches; what does not fit the memory at once is
collected in several passes over the data, with the same result.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mergeflow import __version__
from mergeflow.checkpoint.statistics import STATISTICS, Codec, Facts, Kind, ModelNote, Statistics, encode, stored
from mergeflow.checkpoint.statistics import StageOp as OpNote
from mergeflow.errors import InputError, NumericError, RecipeError
from mergeflow.ops.statistics import Gram, StatisticsOp
from mergeflow.settings import matches, places
from mergeflow.stages import Predicted, StageJob, data, models, naming, reusing, scratch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mergeflow.stages.data import Batch

MOST_DROPPED = 1e-3
"""The part of batches, examples, rows or documents that may have a NaN or Inf in what a model gives for them."""

Site = tuple[str, int | None]
"""A parameter that multiplies an input, by its first name in the model; with the number of the expert, if it has many."""


@dataclass(frozen=True)
class Group:
    """What reads one input: `site` is where it is measured, `weights` the checkpoint tensors that read it."""

    name: str
    site: Site
    size: int
    weights: tuple[str, ...]


@dataclass
class Moments:
    """A running mean over rows: x x^T, x^2, x, or abs(x)."""

    kind: Kind
    mean: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, kind: Kind, size: int, dtype: torch.dtype, device: str) -> Moments:
        """Of no rows yet."""
        import torch

        shape = (size, size) if kind == "gram" else (size,)
        return cls(kind, torch.zeros(shape, dtype=dtype, device=device))

    def add(self, x: Tensor) -> None:
        """Take in rows (n, size)."""
        if not len(x):
            return
        total = self.rows + len(x)
        self.mean.mul_(self.rows / total)
        if self.kind == "gram":
            self.mean.addmm_(x.T, x, alpha=1 / total)
        elif self.kind == "gram_diag":
            self.mean.add_(x.square().sum(0), alpha=1 / total)
        elif self.kind == "input_mean":
            self.mean.add_(x.sum(0), alpha=1 / total)
        else:
            self.mean.add_(x.abs().sum(0), alpha=1 / total)
        self.rows = total


class _Identities:
    """Numbers of tensors by identity: the same object, not written to in between, has the same number as long as it lives."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self.count = 0

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor."""
        found = self.known.get(id(tensor))
        if found is not None and found[0]() is tensor and found[1] == tensor._version:
            return found[2]
        self.count += 1
        self.known[id(tensor)] = (weakref.ref(tensor), tensor._version, self.count)
        return self.count


@dataclass
class Collector:
    """Hooks on a model's linear layers."""

    model: nn.Module
    names: naming.Names
    kind: Kind
    dtype: torch.dtype
    device: str = "cpu"
    lost: dict[str, str] = field(init=False)
    dropped: set[int] = field(default_factory=set)
    _modules: dict[str, list[nn.Module]] = field(init=False)
    _experts: dict[str, nn.Module] = field(init=False)
    _aliases: dict[str, list[str]] = field(init=False)
    _called: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.lost = dict(self.names.lost)
        self._aliases = {}
        self._modules, self._experts = self._sites()

    def _sites(self) -> tuple[dict[str, list[nn.Module]], dict[str, nn.Module]]:
        """The modules that multiply by each parameter, and the mixtures whose experts are fused, by the name of each."""
        from torch import nn

        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            self._aliases.setdefault(first.setdefault(id(parameter), name), []).append(name)
        embeddings = {
            id(module.weight): name for name, module in self.model.named_modules() if isinstance(module, nn.Embedding)
        }
        modules: dict[str, list[nn.Module]] = {}
        experts: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            if _is_fused_mixture(module):
                experts[name] = module
                continue
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
                continue
            own = f"{name}.weight" if name else "weight"
            if isinstance(module, nn.Embedding):
                self._lose(own, "an embedding")
            elif id(weight) in embeddings:
                self._lose(own, f"tied to the embedding {embeddings[id(weight)]}")
            elif isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
                self._lose(own, "a convolution in groups, or padded with other than zeros")
            elif isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
                self._lose(own, "a convolution whose padding is not told in numbers")
            elif isinstance(module, nn.Linear | nn.Conv2d) or _is_conv1d(module):
                modules.setdefault(first[id(weight)], []).append(module)
            else:
                self._lose(own, f"its module, {type(module).__name__}, is no linear layer")
        return modules, experts

    def _pieces(self, parameter: str) -> list[naming.Piece]:
        """The checkpoint tensors in a parameter, under whatever name the model has for it."""
        names = self._aliases.get(parameter, [parameter])
        return [piece for name in names for piece in self.names.pieces.get(name, ())]

    def _lose(self, parameter: str, why: str) -> None:
        for piece in self._pieces(parameter):
            self.lost[piece.tensor] = why

    @property
    def transposed(self) -> tuple[str, ...]:
        """Weights that are stored (in, out), as their modules say."""
        return tuple(
            sorted(
                piece.tensor
                for parameter, modules in self._modules.items()
                if _is_conv1d(modules[0])
                for piece in self._pieces(parameter)
            )
        )

    def _weights(self, site: Site) -> list[str]:
        pieces = self._pieces(site[0])
        return [piece.tensor for piece in pieces if piece.expert == site[1] and piece.tensor not in self.lost]

    def learn(self, run: Callable[[], object]) -> tuple[Group, ...]:
        """The groups, in the order of the calls, from one run of the model."""
        seen: dict[Site, list[int]] = {}
        sizes: dict[Site, int] = {}
        identities = _Identities()

        def look(site: Site, x: Tensor, module: nn.Module | None, tokens: Tensor | None) -> None:
            seen.setdefault(site, []).append(identities.number(x))
            sizes[site] = _size(module, x)

        with self._hooked(look, checking=True):
            run()
        readers: dict[tuple[int, ...], list[Site]] = {}
        for site, inputs in seen.items():
            readers.setdefault(tuple(inputs), []).append(site)
        groups = []
        for sites in readers.values():
            weights = [weight for site in sites for weight in self._weights(site)]
            if weights:
                groups.append(Group(weights[0], sites[0], sizes[sites[0]], tuple(weights)))
        self._called |= {parameter for parameter, _ in seen}
        return tuple(groups)

    def finish(self) -> None:
        """Say of layers that no `learn` has seen that they have no statistics."""
        for parameter in self._modules.keys() - self._called:
            self._lose(parameter, "its layer was not called")

    def wanted(self, only: tuple[str, ...] | None) -> list[str]:
        """The parameters that have weights which the patterns name. Raises RecipeError where there are none."""
        mixtures = {
            f"{name}.{matrix}" if name else matrix for name in self._experts for matrix in ("gate_up_proj", "down_proj")
        }
        weights = {
            parameter: [piece.tensor for piece in self._pieces(parameter) if piece.tensor not in self.lost]
            for parameter in [*self._modules, *sorted(mixtures)]
        }
        at = places(weight for own in weights.values() for weight in own)
        found = [
            parameter
            for parameter, own in weights.items()
            if any(only is None or matches(only, at[weight]) for weight in own)
        ]
        if not found:
            raise none_chosen(list(at), only)
        return found

    def measure(
        self, groups: Sequence[Group], batches: Iterator[Batch], run: Callable[[Batch], object]
    ) -> dict[str, Moments]:
        """The running means of groups over batches."""
        import torch

        found = {group.name: Moments.zeros(self.kind, group.size, self.dtype, self.device) for group in groups}
        wanted = {group.site: group.name for group in groups}
        sight: list[_Sight] = []

        def look(site: Site, x: Tensor, module: nn.Module | None, tokens: Tensor | None) -> None:
            name = wanted.get(site)
            if name is None:
                return
            rows = sight[0].rows(x, tokens, name) if not isinstance(module, torch.nn.Conv2d) else _unfolded(module, x)
            rows = rows.to(self.dtype)
            if not bool(torch.isfinite(rows).all()):
                self.dropped.add(sight[0].number)
                return
            found[name].add(rows)

        with self._hooked(look):
            for batch in batches:
                sight[:] = [_Sight(batch, self.model)]
                run(batch)
        return found

    @contextlib.contextmanager
    def _hooked(self, look: _Look, *, checking: bool = False) -> Iterator[None]:
        """While this holds, `look` is shown each input of a linear layer before the layer runs."""
        handles = []
        try:
            for parameter, modules in self._modules.items():
                for module in modules:

                    def hook(
                        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site = (parameter, None)
                    ) -> None:
                        look(site, args[0] if args else kwargs["input"], module, None)

                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for name, mixture in self._experts.items():
                self._hook_experts(name, mixture, look, checking)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for mixture in self._experts.values():
                mixture.__dict__.pop("forward", None)

    def _hook_experts(self, name: str, mixture: nn.Module, look: _Look, checking: bool) -> None:
        own = mixture.forward
        prefix = f"{name}." if name else ""
        sites = (f"{prefix}gate_up_proj", f"{prefix}down_proj")
        if any(piece.tensor in self.lost for site in sites for piece in self._pieces(site)):
            return  # found before to be of another layout

        def forward(hidden: Tensor, index: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
            import torch

            if hidden.is_meta:
                for expert in range(len(mixture.gate_up_proj)):  # type: ignore[arg-type]
                    for site, width in zip(sites, _widths(mixture), strict=True):
                        look((site, expert), hidden.new_empty((0, width)), None, index[:0, 0])
                return torch.empty_like(hidden)
            made = _routed(mixture, hidden, index, weights, sites, look)
            if checking:
                told = own(hidden, index, weights, **kwargs)
                if not torch.allclose(made, told, rtol=1e-3, atol=1e-5, equal_nan=True):
                    for site in sites:
                        self._lose(site, f"its mixture, {type(mixture).__name__}, is of a layout that is not known")
                return cast("Tensor", told)
            return made

        mixture.forward = forward


_Look = Callable[[Site, "Tensor", "nn.Module | None", "Tensor | None"], None]
"""`look(site, input, module, tokens)`: `tokens` are the flat token numbers of the input's rows, where the rows are not all."""


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, whose weight is (in, out); also one that is derived from it."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__
    )


def _is_fused_mixture(module: nn.Module) -> bool:
    """Whether a module holds the matrices of all experts in two tensors."""
    both = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(getattr(one, "ndim", 0) == 3 for one in both) and hasattr(module, "act_fn")


def _widths(mixture: Any) -> tuple[int, int]:
    """The number of channels that the first and second matrix of an expert read."""
    axis = 1 if getattr(mixture, "is_transposed", False) else 2
    return mixture.gate_up_proj.shape[axis], mixture.down_proj.shape[axis]


def _routed(
    mixture: Any, hidden: Tensor, index: Tensor, weights: Tensor, sites: tuple[str, str], look: _Look
) -> Tensor:
    """A mixture's result, expert after expert, each over the tokens that are routed to it."""
    import torch

    total = torch.zeros_like(hidden)
    for expert in range(len(mixture.gate_up_proj)):
        tokens, slots = torch.where(index == expert)
        rows = hidden[tokens]
        look((sites[0], expert), rows, None, tokens)
        inner = _times(mixture, "gate_up_proj", expert, rows)
        if hasattr(mixture, "_apply_gate"):
            inner = mixture._apply_gate(inner)
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = mixture.act_fn(gate) * up
        look((sites[1], expert), inner, None, tokens)
        made = _times(mixture, "down_proj", expert, inner) * weights[tokens, slots, None]
        total.index_add_(0, tokens, made.to(total.dtype))
    return total


def _times(mixture: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(mixture, name)[expert]
    bias = getattr(mixture, f"{name}_bias", None)
    made: Tensor = rows @ (weight if getattr(mixture, "is_transposed", False) else weight.T)
    return made if bias is None else made + bias[expert]


def _size(module: nn.Module | None, x: Tensor) -> int:
    """How many channels the statistic of an input has."""
    kernel = getattr(module, "kernel_size", None)
    return int(x.shape[1] * kernel[0] * kernel[1]) if kernel is not None else int(x.shape[-1])


def _unfolded(module: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution multiplies by its kernel at each place: (places, channels * height * width)."""
    from torch.nn import functional

    x = x if x.ndim == 4 else x[None]
    patches = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


PADDED_LEFT = ("xlnet",)
"""Model types that take padding on the left alone, since they answer at the last token; their layers see (tokens, examples, channels),
which are (examples, tokens, channels) to look at where there are as many of both."""


class _Sight:
    """Which rows of an input count, in one batch."""

    def __init__(self, batch: Batch, model: nn.Module) -> None:
        self.number = batch.number
        self.padded_left = getattr(getattr(model, "config", None), "model_type", None) in PADDED_LEFT
        self.masks = [mask for mask in (batch.mask, batch.decoder_mask) if mask is not None]
        self.padded = any(not bool(mask.all()) for mask in self.masks)

    def rows(self, x: Tensor, tokens: Tensor | None, name: str) -> Tensor:
        """The rows of an input that count, (n, channels)."""
        flat = x.reshape(-1, x.shape[-1])
        if not self.padded:
            return flat
        if self.padded_left:
            return self._unknown(x, name)
        if tokens is not None:
            return flat[self.masks[0].reshape(-1)[tokens]] if len(self.masks) == 1 else self._unknown(x, name)
        lead = x.shape[:-1]
        for mask in self.masks:
            if lead == mask.shape or lead == (mask.numel(),):
                return flat[mask.reshape(-1)]
        for mask in self.masks:
            if lead in ((len(mask),), (len(mask), 1)):  # one row an example: a pooled one, or the first token
                return flat
            if len(lead) > 2 and lead[:2] == mask.shape:
                return x[mask].reshape(-1, x.shape[-1])
            if lead[0] == 1 < len(mask):  # the same for all examples, such as vectors of relative positions
                return flat
        return self._unknown(x, name)

    def _unknown(self, x: Tensor, name: str) -> Tensor:
        raise InputError(
            f"which rows of the input of '{name}' are padding cannot be told from its shape {list(x.shape)}",
            fix="Set `batch_size: 1`, which pads nothing, or leave the weight out by `only:`.",
        )


# Running


def forward(model: nn.Module, batch: Batch) -> object:
    """One run over a batch, for what the hooks see."""
    more = {} if "features" in batch.inputs or "pixel_values" in batch.inputs else {"use_cache": False}
    if more and not hasattr(getattr(model, "config", None), "use_cache"):
        more = {}
    return model(**batch.inputs, **more)


def settle(model: nn.Module, examples: data.Examples) -> None:
    """Tell a classifier which token pads, where its config does not: it looks for the last token that does not."""
    config = getattr(model, "config", None)
    if config is not None and examples.task == "classifier" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = examples.pad


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """With this many threads in torch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(job: StageJob) -> None:
    """Collect what a job's op asks for, and write it. Raises InputError, RecipeError, NumericError, MachineError."""
    import torch

    from mergeflow.stages import walking

    if job.data is None:
        raise RecipeError(f"{job.op.name} runs on data, and its node names none", fix="Add `data: NAME`.")
    folder, source = models.open_folder(job.model), job.data
    job = replace(job, known=reusing.usable(job, software()))
    whole = reusing.covering(job.known, list(folder.checkpoint.tensors), job.only)
    if whole is not None and _write_part(job, whole):
        return
    examples = data.read_examples(source, job.folder, folder, job.op.max_length)
    say(job, examples.counts)
    with threads(job.threads), torch.no_grad():
        way = walking.collect if walking.too_large(folder, job.memory) else _collect
        collected = way(job, folder, examples)
        job.check_stop()
        if collected.dropped:
            job.progress(f"batches left out for NaN or Inf: {collected.dropped}", 0, 0)
        _write(job, examples, collected)


@dataclass
class Collected:
    """What has been collected: groups, their rows, and the tensors, kept on disk until they are written."""

    groups: tuple[Group, ...]
    rows: dict[str, int]
    lost: dict[str, str]
    transposed: tuple[str, ...]
    dropped: int
    tokens: int
    kept: Kept


class Kept(Mapping[str, "Tensor"]):
    """Encoded statistics, each group a file in the scratch folder: they can be more than memory holds."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self.files: dict[str, Path] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of one group."""
        path = self.folder / f"{len(self.files):06}.safetensors"
        scratch.save(path, tensors)
        self.files |= dict.fromkeys(tensors, path)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def __len__(self) -> int:
        return len(self.files)


def codec_of(op: StatisticsOp) -> Codec:
    """How an op's statistics are stored."""
    return op.codec if isinstance(op, Gram) else "float32"


def accumulator(op: StatisticsOp) -> torch.dtype:
    """The dtype of an op's running means."""
    import torch

    return torch.float64 if getattr(op, "accumulate", "float32") == "float64" else torch.float32


def chosen(groups: Sequence[Group], only: tuple[str, ...] | None) -> tuple[Group, ...]:
    """The groups of weights that the patterns name, with those weights alone; a group keeps its name."""
    if only is None:
        return tuple(groups)
    at = places(weight for group in groups for weight in group.weights)
    found = [
        Group(
            group.name, group.site, group.size, tuple(weight for weight in group.weights if matches(only, at[weight]))
        )
        for group in groups
    ]
    return tuple(group for group in found if group.weights)


def none_chosen(weights: Sequence[str], only: tuple[str, ...] | None) -> RecipeError:
    """The error for patterns that name no weight with statistics."""
    some = ", ".join(weights[:3])
    return RecipeError(
        f"`only: {', '.join(only or ('*',))}` names no weight that a linear layer multiplies by",
        fix=f"Some that are: {some}.",
    )


def passes(groups: Sequence[Group], kind: Kind, dtype: torch.dtype, memory: int) -> Iterator[tuple[Group, ...]]:
    """The groups cut into runs whose running means fit half the memory; a group alone always does."""
    part: list[Group] = []
    held = 0
    for group in groups:
        size = group.size * (group.size if kind == "gram" else 1) * dtype.itemsize
        if part and held + size > memory // 2:
            yield tuple(part)
            part, held = [], 0
        part.append(group)
        held += size
    if part:
        yield tuple(part)


def _collect(job: StageJob, folder: models.Folder, examples: data.Examples) -> Collected:
    """Collect with the whole model in memory."""
    model = models.load_model(folder, job.device)
    settle(model, examples)
    names = naming.checked(naming.names_of(model, naming.shapes(folder.checkpoint)), model, folder.checkpoint)
    return collect_with(job, examples, model, names)


def collect_with(job: StageJob, examples: data.Examples, model: nn.Module, names: naming.Names) -> Collected:
    """Collect with a model that can be run whole."""
    op, size = job.op, job.op.batch_size
    collector = Collector(model, names, kind_of(op), accumulator(op), job.device)
    first = next(iter(examples.batches(size, job.device)))
    everything = collector.learn(lambda: forward(model, data.first_rows(first, 1, examples)))
    collector.finish()
    groups = chosen(everything, job.only)
    if not groups:
        raise none_chosen([group.name for group in everything], job.only)
    kept = Kept(job.work / "groups")
    rows: dict[str, int] = {}
    tokens = 0
    parts = list(passes(taken(job, groups, kept, rows), kind_of(op), accumulator(op), job.memory))
    count = data.batches_of(len(examples.examples), size)

    def told() -> Iterator[Batch]:
        nonlocal tokens
        tokens = 0
        for batch in examples.batches(size, job.device):
            job.check_stop()
            yield batch
            tokens += batch.tokens
            check_dropped(collector.dropped, count)
            job.progress("batches", 1, count * len(parts))

    for part in parts:
        for name, moments in collector.measure(part, told(), lambda batch: forward(model, batch)).items():
            keep(kept, job.op, name, moments, rows)
    if not parts:
        tokens = data.tokens_in(examples.batches(size))
    return Collected(groups, rows, collector.lost, collector.transposed, len(collector.dropped), tokens, kept)


def keep(kept: Kept, op: StatisticsOp, name: str, moments: Moments, rows: dict[str, int]) -> None:
    """Put away what has been collected of a group."""
    kept.add(encode(kind_of(op), codec_of(op), name, moments.mean))
    rows[name] = moments.rows


def taken(job: StageJob, groups: Sequence[Group], kept: Kept, rows: dict[str, int]) -> tuple[Group, ...]:
    """Put away what the cache has of these groups; those that it has not."""
    homes = {name: one for one in reversed(job.known) for name in one.facts.groups.values()}
    for name in (group.name for group in groups if group.name in homes):
        one = homes[name]
        kept.add({tensor: naming.read_tensor(one, tensor) for tensor in one.names(name)})
        rows[name] = one.facts.tokens.get(name, one.facts.n_tokens)
    left = tuple(group for group in groups if group.name not in homes)
    if len(left) < len(groups):
        job.progress(f"taken from the cache: {len(groups) - len(left)} of {len(groups)} inputs", 0, 0)
    return left


def kind_of(op: StatisticsOp) -> Kind:
    """What an op collects."""
    return op.kind


def check_dropped(dropped: set[int], batches: int) -> None:
    """Raises NumericError where more batches than may be had a NaN or Inf."""
    if len(dropped) > MOST_DROPPED * batches:
        raise NumericError(
            f"the activations of batch {min(dropped)} have NaN or Inf ({len(dropped)} of {batches} batches so far)",
            fix="Look at the model's weights and that part of the data; at most 0.1% of batches are left out.",
        )


def say(job: StageJob, counts: data.Counts) -> None:
    """Tell what was cut, and what was left out."""
    if counts.cut:
        job.progress(f"texts longer than the context, cut: {counts.cut}", 0, 0)
    if counts.unusable:
        job.progress(f"rows left out: {counts.unusable} (first: {counts.first_unusable})", 0, 0)


def _write(job: StageJob, examples: data.Examples, collected: Collected) -> None:
    """statistics.json, and the artifact."""
    counts = examples.counts
    op = job.op
    if collected.tokens < op.min_tokens:
        raise InputError(
            f"has {collected.tokens} tokens, and `min_tokens` asks for {op.min_tokens}",
            where=job.data.path if job.data else "",
            fix="Use more data: statistics of few tokens show what the tokens were.",
        )
    note = {
        "source": data_label(job),
        "rows_left_out": counts.unusable,
        "texts_cut": counts.cut,
        "batches_dropped": collected.dropped,
    }
    kind = kind_of(op)
    facts = Facts(
        kind=kind,
        codec=codec_of(op),
        dtype=getattr(op, "accumulate", "float32"),
        op=OpNote.model_validate({"name": op.name, "version": op.version, **op.model_dump(mode="json")}),
        model=ModelNote.model_validate(dict(job.source)),
        only=job.only,
        data=note,
        n_examples=len(examples.examples),
        n_tokens=collected.tokens,
        seed=job.seed,
        groups={weight: group.name for group in collected.groups for weight in group.weights},
        tokens={name: count for name, count in sorted(collected.rows.items()) if count != collected.tokens},
        transposed=tuple(name for name in collected.transposed if any(name in g.weights for g in collected.groups)),
        skipped=skipped(collected.lost, job.only),
        software=software(),
    )
    job.write(collected.kept, {STATISTICS: facts.encoded()}, metadata(op))
    shutil.rmtree(collected.kept.folder, ignore_errors=True)


def data_label(job: StageJob) -> str:
    """What statistics.json calls the data: a path as it was written, but for those of one machine alone."""
    path = job.data.path if job.data else ""
    return Path(path).name if Path(path).is_absolute() else path


def _write_part(job: StageJob, whole: Statistics) -> bool:
    """Write what is asked for out of an artifact that has it all; false where no layer is asked for, which a run can say."""
    facts = whole.facts
    weights = reusing.chosen(list(facts.groups), job.only)
    if not weights:
        return False
    groups = {weight: group for weight, group in facts.groups.items() if weight in weights}
    names = set(groups.values())
    part = facts.model_copy(
        update={
            "model": ModelNote.model_validate(dict(job.source)),
            "only": job.only,
            "data": {**facts.data, "source": data_label(job)},
            "groups": groups,
            "tokens": {name: count for name, count in facts.tokens.items() if name in names},
            "transposed": tuple(weight for weight in facts.transposed if weight in weights),
            "skipped": skipped(facts.skipped, job.only),
        }
    )
    job.progress(f"taken from the cache: {len(names)} of {len(names)} inputs", 0, 0)
    tensors = reusing.Taken({tensor: whole for name in names for tensor in whole.names(name)})
    job.write(tensors, {STATISTICS: part.encoded()}, metadata(job.op))
    return True


def metadata(op: StatisticsOp) -> dict[str, str]:
    """What the headers of a statistics folder say."""
    import json

    return {"format": "pt", "mergeflow.space": "statistics", "mergeflow.artifact": json.dumps({"kind": op.kind})}


def skipped(lost: Mapping[str, str], only: tuple[str, ...] | None) -> dict[str, str]:
    """Why weights that were asked for have no statistics."""
    at = places(lost)
    return {name: why for name, why in sorted(lost.items()) if only is None or matches(only, at[name])}


def software() -> dict[str, str]:
    """The versions that the numbers depend on."""
    import torch

    found = {"mergeflow": __version__, "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(ImportError):
        import transformers

        found["transformers"] = transformers.__version__
    return found


# Predicting


def predict(op: StatisticsOp, folder: models.Folder, only: tuple[str, ...] | None = None) -> Predicted:
    """What a run would write, from a run of the model on the meta device: no weight is read and no data."""
    import torch

    empty = models.empty_model(folder)
    names = naming.names_of(empty, naming.shapes(folder.checkpoint))
    collector = Collector(empty, names, kind_of(op), torch.float32, "meta")
    try:
        with torch.no_grad(), _answering():
            everything = collector.learn(lambda: empty(**_placeholder(folder)))
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"which layers of {folder.architecture} read what cannot be told from headers: {str(error)[:200]}",
            where=str(folder.path),
        ) from error
    collector.finish()
    groups = chosen(everything, only)
    if not groups:
        raise none_chosen([group.name for group in everything], only)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for group in groups:
        shape = (group.size, group.size) if op.kind == "gram" else (group.size,)
        tensors |= stored(kind_of(op), codec_of(op), group.name, shape)
    return Predicted(
        dict(sorted(tensors.items())),
        {weight: group.name for group in groups for weight in group.weights},
        skipped(collector.lost, only),
        tuple(name for name in collector.transposed if any(name in group.weights for group in groups)),
    )


def _answering() -> Any:
    """While this holds, a tensor without values answers 1, or true, where the model asks for a number: nothing is padded."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Answering(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
                return torch.ones((), dtype=args[0].dtype).item()
            return func(*args, **(kwargs or {}))

    return Answering()  # type: ignore[no-untyped-call]


def _placeholder(folder: models.Folder) -> dict[str, Tensor]:
    """Inputs of the shape that a model reads, without values."""
    import torch

    if folder.task == "features":
        return {"features": torch.empty((1, folder.config["input_size"]), device="meta")}
    if folder.task == "images":
        side = folder.image_size
        height, width = side if isinstance(side, list) else (side, side)
        shape = (1, folder.config.get("num_channels", 3), height, width)
        return {"pixel_values": torch.empty(shape, device="meta", dtype=models.compute_dtype(folder))}
    ids = torch.empty((1, 4), dtype=torch.long, device="meta")
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :3]} if folder.task == "seq2seq" else {})}
