"""The diagonal of a model's Fisher information, from squared gradients of single examples.

    F_i = 1/N sum_x sum_c p(c | x) (d log p(c | x) / d theta_i)^2            (arXiv:2111.09832)

What is squared must be the gradient of one example: squares of gradients that were summed over a batch first are another
quantity, which drifts from the Fisher diagonal the larger the batch is.

All estimators have one shape. The gradient of a log-probability goes through the logits z, d log p(c) / d theta = J^T (e_c - p)
with J = dz / d theta, so an estimator is a set of cotangents v_j of the logits, and an example adds sum_j (J^T v_j)^2. One forward
pass serves all of them. For `expected` any factor V V^T = diag(p) - p p^T does; its Cholesky factor has a closed form with
C - 1 columns, so C classes take C - 1 backward passes, and two classes one.

Gradients of single examples come from `torch.func.vmap`, several examples at once, where the model allows it (control flow that
looks at values does not), the memory has room for more than one gradient, and on a processor these are small enough for its
caches (measured: over some 4 MB a loop is faster); else from a loop over examples. `Diagonal.gradients` says which, and why.
Examples of one length are taken together, and their padding and mask left out: models look into a mask for shortcuts, which vmap
cannot follow, and no work is done on padding. Sums are float64, in an order that the data alone decides.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mergeflow.checkpoint.statistics import PREFIX, STATISTICS, Facts, ModelNote, Statistics
from mergeflow.checkpoint.statistics import StageOp as OpNote
from mergeflow.errors import InputError, MachineError, NumericError, RecipeError
from mergeflow.ops.draws import draw_key, uniform
from mergeflow.ops.statistics import Estimator, FisherDiag, StatisticsOp
from mergeflow.settings import matches, places
from mergeflow.stages import Predicted, StageJob, collecting, data, models, naming, reusing, stopped

if TYPE_CHECKING:
    import threading

    import torch
    from torch import Tensor, nn

Task = Literal["classification", "tokens", "causal", "seq2seq"]
"""What a label belongs to: the example, each token, the next token, or each token of the target."""

Batch = Mapping[str, "Tensor"]
"""What the model's `forward` takes, each with examples along its first axis; `labels` are for the estimator."""

UNLABELLED = -100
"""The label of a position that has none: padding, and a prompt."""

MOST_CLASSES = 32
"""Classes up to which `expected` is done: it takes a backward pass for each but one."""

CACHED = 4 << 20
"""Bytes of a gradient up to which a processor computes several at once faster than one after the other."""

IN_PART = 32
"""Examples whose squares are summed in the model's dtype before they join the sums in float64."""

BY_BATCH = ("batch_hard", "batch_sqrt")
"""Estimators that square the gradients of whole batches."""

UNFOLLOWED = "vmap cannot follow the model"


@dataclass(frozen=True)
class Diagonal:
    """A Fisher diagonal, and how it came about."""

    tensors: dict[str, Tensor]
    """By the name of the parameter, in its shape, float32: the mean over examples, never floored. A tied weight stands once."""
    estimator: Estimator
    examples: int
    """Examples that the mean goes over."""
    tokens: int
    """Their tokens, padding left out; without an attention mask the examples."""
    dropped: int
    """Examples left out for gradients with NaN or infinite elements."""
    gradients: str
    """`vmap`, `loop (REASON)`, or `batches of N`."""


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: Task = "classification",
    estimator: Estimator = "expected",
    samples: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    wanted: Callable[[str], bool] = lambda name: True,
    memory: int = 4 << 30,
    total: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    stop: threading.Event | None = None,
    beside: int = 0,
) -> Diagonal:
    """The Fisher diagonal of a model's parameters over the examples of `batches`, in the model's dtype and on its device.

    `model` gives logits, as a tensor or as `.logits`: (examples, classes) for `classification`, else (examples, positions,
    classes). It is put into `eval` mode, and its parameters are left without gradients. For all but `classification` an example
    is one document, and its gradient that of the summed log-probability of its labelled positions (`labels` other than -100),
    each given what really stands before it. `labels` of `causal` stand where their token does, and are moved here; by default they
    are the tokens. Of `seq2seq` they are what is to come out where `decoder_input_ids` are read.

    `expected`: the expectation over the model's own p(c | x); needs no labels, and at most 32 classes.
    `sampled`: the same by `samples` labels drawn from it for each example (position), by `seed` and the example's number.
    `empirical`: squares at the true labels.

    Two that square the gradient of a whole batch of `batch_size` are no Fisher, since the examples' gradients cancel before they
    are squared, and are here only to compare with published numbers. `batch_hard`: mean over batches of the square of the
    gradient of the batch's mean log-probability of its likeliest labels (the Fisher baseline of arXiv:2212.09849).
    `batch_sqrt`: the square of the gradient of sum_x sum_c sqrt(p(c)) log p(c) over a batch, summed over batches and divided by
    the number of examples (MergeLM, arXiv:2311.03099); squaring the sum leaves cross terms of the classes, too.

    Of each of the `batches`, up to `batch_size` examples of one length run together, as many as have gradients within `memory`
    bytes. `wanted` chooses parameters by name, and `beside` are bytes of others that are known already: how gradients are come by
    is decided by both, so that the result is that of a run over all of them. `total` is the number of examples, where known;
    `progress` is told of examples done. Raises RecipeError for an estimator that does not go with the model, InputError for
    missing or unknown labels and for no examples, NumericError where more than 0.1% of the examples have gradients that are NaN
    or infinite, Interrupted once `stop` is set.
    """
    found = _Run(model, task, estimator, samples, batch_size, seed, wanted, memory, total, progress, stop, beside)
    for piece in found.pieces(batches):
        found.add(*piece)
    return found.result()


def _way(gradient: int, estimator: Estimator, batch_size: int, memory: int, device: str) -> tuple[int, str | None]:
    """How many examples run together, and why one after the other; `gradient` are the bytes of one example's."""
    # Of each example the gradient, its square, and the sum of squares before and after.
    room = memory // (4 * max(gradient, 1))
    at_once = batch_size if estimator in BY_BATCH else max(1, min(batch_size, room))
    if device == "cpu" and gradient > CACHED:
        return at_once, f"gradients of {gradient:,} bytes leave a processor's cache, where it is the faster way"
    if at_once == 1 < batch_size:
        return at_once, f"the memory has room for one gradient of {gradient:,} bytes at a time"
    return at_once, None


@dataclass
class _Run:
    model: nn.Module
    task: Task
    estimator: Estimator
    samples: int
    batch_size: int
    seed: int
    wanted: Callable[[str], bool]
    memory: int
    total: int | None
    progress: Callable[[int], None]
    stop: threading.Event | None
    beside: int
    seen: int = 0
    tokens: int = 0
    dropped: int = 0
    why_loop: str | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    part: dict[str, Tensor] = field(default_factory=dict)
    in_part: int = 0
    batch: _BatchGradient | None = None
    batches: int = 0
    classes: int = 0
    at_once: int = 1

    def __post_init__(self) -> None:
        import torch

        self.model.eval().requires_grad_(False)
        named = dict(self.model.named_parameters())
        self.parameters = {
            name: one.detach() for name, one in named.items() if one.is_floating_point() and self.wanted(name)
        }
        self.sums = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in self.parameters.items()}
        if not any(one.numel() for one in self.parameters.values()):
            raise RecipeError("no parameter of the model is wanted", fix="Look at `only`.")
        gradient = self.beside + sum(one.numel() * one.element_size() for one in self.parameters.values())
        self.at_once, self.why_loop = _way(gradient, self.estimator, self.batch_size, self.memory, self.device.type)

    @property
    def by_batch(self) -> bool:
        """Whether gradients of whole batches are squared."""
        return self.estimator in BY_BATCH

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.parameters.values())).device

    def pieces(self, batches: Iterable[Batch]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Micro-batches: the numbers of their examples in the data, and their tensors on the model's device."""
        given = 0
        for batch in batches:
            count = len(next(iter(batch.values())))
            for rows in self._border(given, count) if self.by_batch else self._alike(batch, count):
                yield [given + row for row in rows], self._trimmed(batch, rows)
            given += count

    def _border(self, given: int, count: int) -> list[list[int]]:
        """Rows in order, cut where a batch to be squared ends."""
        rows: list[list[int]] = []
        for row in range(count):
            if not rows or (given + row) % self.batch_size == 0:
                rows.append([])
            rows[-1].append(row)
        return rows

    def _alike(self, batch: Batch, count: int) -> list[list[int]]:
        """Rows of one length, as many as run together, by where their padding ends and begins."""
        spans = [_span(batch[name]) for name in _MASKS if name in batch]
        groups: dict[tuple[int, ...], list[list[int]]] = {}
        for row in range(count):
            group = groups.setdefault(tuple(number for one in spans for number in one[row]), [[]])
            if len(group[-1]) == self.at_once:
                group.append([])
            group[-1].append(row)
        return [rows for group in groups.values() for rows in group]

    def _trimmed(self, batch: Batch, rows: list[int]) -> dict[str, Tensor]:
        """Some examples without what is padding in all of them; a mask that then hides nothing is left out."""
        import torch

        at = torch.tensor(rows)
        piece = {name: one[at.to(one.device)].to(self.device) for name, one in batch.items()}
        for name, beside in _MASKS.items():
            mask = piece.get(name)
            if mask is None or not bool(mask.any()):
                continue
            starts, stops = zip(*_span(mask), strict=True)
            labelled = self.task == "seq2seq" if name == "decoder_attention_mask" else self.task in ("tokens", "causal")
            for other in (name, *beside, *(("labels",) if labelled else ())):
                if other in piece:
                    piece[other] = piece[other][:, min(starts) : max(stops)]
            if bool(piece[name].all()):
                del piece[name]
        return piece

    def add(self, numbers: list[int], piece: dict[str, Tensor]) -> None:
        """One micro-batch more: the numbers of its examples in the data, and what the model takes."""
        if self.stop is not None and self.stop.is_set():
            raise stopped()
        inputs, targets = self._inputs(piece)
        if self.seen == 0:
            self._choose(inputs, targets)
        self.seen += len(numbers)
        mask, ids = piece.get("attention_mask"), piece.get("input_ids")
        self.tokens += len(numbers) if ids is None else ids.numel() if mask is None else int(mask.sum())
        if targets is not None and self.estimator == "empirical":
            self._check_labels(targets, numbers)
        if self.by_batch:
            self._add_to_batch(inputs, targets, len(numbers))
        else:
            self._add_squares({**inputs, **self._own(targets, numbers)}, len(numbers))
        self.progress(len(numbers))
        self._refuse_dropped(self.total)

    def result(self) -> Diagonal:
        """The mean over what was added."""
        import torch

        if self.batch is not None:
            self._square_batch()
        self._close_part()
        if self.seen == 0:
            raise InputError(
                "there is no example to compute gradients of", fix="Look at the data, its split and limit."
            )
        self._refuse_dropped(self.seen)
        kept = self.seen - self.dropped
        over = self.batches if self.estimator == "batch_hard" else kept
        how = "vmap" if self.why_loop is None else f"loop ({self.why_loop})"
        return Diagonal(
            {name: one.div_(max(over, 1)).to(torch.float32) for name, one in self.sums.items()},
            self.estimator,
            kept,
            self.tokens,
            self.dropped,
            f"batches of {self.batch_size}" if self.by_batch else how,
        )

    def _refuse_dropped(self, of: int | None) -> None:
        if of is not None and self.dropped > collecting.MOST_DROPPED * of:
            raise NumericError(
                f"the gradients of {self.dropped} of {self.seen} examples are NaN or infinite",
                fix="At most 0.1% may be: look at the model's weights, and whether it runs in float32.",
            )

    def _inputs(self, piece: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the model takes, and the label of each logit."""
        import torch

        inputs = dict(piece)
        targets = inputs.pop("labels", None)
        if self.task == "causal" and targets is None:
            targets = inputs["input_ids"]
        mask = inputs.get("decoder_attention_mask" if self.task == "seq2seq" else "attention_mask")
        if targets is not None and mask is not None and self.task != "classification":
            targets = targets.masked_fill(mask == 0, UNLABELLED)
        if targets is not None and self.task == "causal":
            ends = torch.full_like(targets[:, :1], UNLABELLED)
            targets = torch.cat([targets[:, 1:], ends], 1)
        return inputs, targets

    def _choose(self, inputs: Batch, targets: Tensor | None) -> None:
        """Hold the estimator against the shape of the logits, and the labels. Raises RecipeError, InputError."""
        import torch

        with torch.no_grad():
            shape = self._logits(self.parameters, {name: one[:1] for name, one in inputs.items()}).shape
        self.classes = shape[-1]
        if len(shape) != (2 if self.task == "classification" else 3):
            raise RecipeError(f"the model's logits have the shape {tuple(shape)}, which is not that of {self.task}")
        if self.classes < 2:
            raise RecipeError(
                "the model gives one number, and no probability of classes",
                fix="Fisher information is for classifiers and language models here.",
            )
        if self.estimator == "expected":
            _refuse(self.task, self.classes, shape[1] if len(shape) > 2 else None)
        if self.task != "classification" and targets is None:
            raise InputError("the examples have no labels, which say the tokens that count")
        if self.estimator == "empirical" and targets is None:
            raise InputError(
                "`estimator: empirical` takes the gradients at the labels, and the data has none",
                fix="Name the column of the `label`, or use `estimator: sampled`.",
            )

    def _check_labels(self, targets: Tensor, numbers: list[int]) -> None:
        """Raises InputError for a label that is no class of the model."""
        wrong = (targets < 0) | (targets >= self.classes)
        if self.task != "classification":
            wrong &= targets != UNLABELLED
        if bool(wrong.any()):
            row, label = int(wrong.nonzero()[0, 0]), int(targets[wrong][0])
            raise InputError(
                f"example {numbers[row] + 1} has {'no label' if label == UNLABELLED else f'the label {label}'}, "
                f"and the model knows 0 to {self.classes - 1}",
                fix="Labels are the model's own class numbers, or the names of its config's `label2id`.",
            )

    def _own(self, targets: Tensor | None, numbers: list[int]) -> dict[str, Tensor]:
        """What the estimator takes for each example, under names that no model has: labels, and draws."""
        import torch

        own = {} if targets is None else {_TARGETS: targets}
        if self.estimator == "sampled":
            places = torch.ones(len(numbers), dtype=torch.bool)
            if targets is not None and self.task != "classification":
                places = (targets != UNLABELLED).cpu()
            draws = torch.zeros(*places.shape, self.samples, dtype=torch.float32)
            # Drawn for what is labelled alone, so that padding, and with it the micro-batch, changes no draw.
            for row, number in enumerate(numbers):
                drawn = torch.empty(int(places[row].sum()), self.samples)
                key = draw_key((str(self.seed),), "fisher_diag", number, "")
                draws[row][places[row]] = uniform(key, 0, drawn).view_as(drawn)
            own[_DRAWS] = draws
        return {name: one.to(self.device) for name, one in own.items()}

    def _logits(self, parameters: Mapping[str, Tensor], inputs: Batch) -> Tensor:
        import torch

        given: dict[str, object] = dict(inputs)
        if self.task in ("causal", "seq2seq") and hasattr(self.model, "config"):
            given["use_cache"] = False
        output = torch.func.functional_call(self.model, dict(parameters), (), given)
        logits: Tensor = output if isinstance(output, torch.Tensor) else output.logits
        return logits

    def _cotangents(self, logits: Tensor, given: Batch) -> Iterator[Tensor]:
        """The v_j of one example: `logits` is (1, classes) or (1, positions, classes), and so is each."""
        import torch

        wide = logits.detach()
        # The logits of an example are few: in float64 1 - p keeps its digits where p is nearly 1.
        p = torch.softmax(wide.double() if self.task == "classification" else wide, -1)
        if self.estimator == "expected":
            for column in _factor(p):
                yield column.to(wide.dtype)
            return
        if self.estimator == "empirical":
            yield self._towards(p, given[_TARGETS], given.get(_TARGETS)).to(wide.dtype)
            return
        below = p.cumsum(-1)
        below = below / below[..., -1:]
        for sample in range(self.samples):
            drawn = (below <= given[_DRAWS][..., sample, None]).sum(-1).clamp(max=self.classes - 1)
            towards = self._towards(p, drawn, given.get(_TARGETS))
            yield (towards * self.samples**-0.5).to(wide.dtype)

    def _towards(self, p: Tensor, label: Tensor, targets: Tensor | None) -> Tensor:
        """e_label - p, and 0 where a document has no label."""
        import torch

        towards = (torch.arange(self.classes, device=p.device) == label[..., None]).to(p.dtype) - p
        if self.task == "classification" or targets is None:
            return towards
        return torch.where((targets != UNLABELLED)[..., None], towards, towards.new_zeros(()))

    def _add_squares(self, given: dict[str, Tensor], count: int) -> None:
        if self.why_loop is None:
            try:
                squares = self._vmapped(given)
            except Exception as error:  # whatever a model does that vmap cannot follow
                reason = str(error).strip().splitlines() or [type(error).__name__]
                self.why_loop = f"{UNFOLLOWED}: {reason[0][:200]}"
            else:
                self._keep(squares, count)
                return
        with _sparse(self.model):
            for row in range(count):
                self._add_one({name: one[row : row + 1] for name, one in given.items()})

    def _vmapped(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """sum_j (J^T v_j)^2 of each example, along a first axis."""
        import torch

        def one(example: dict[str, Tensor]) -> dict[str, Tensor]:
            example = {name: value[None] for name, value in example.items()}
            inputs = {name: value for name, value in example.items() if name not in _OWN}
            outcome: Any = torch.func.vjp(lambda parameters: self._logits(parameters, inputs), self.parameters)
            logits, pull = outcome
            squares: dict[str, Tensor] = {}
            for column in self._cotangents(logits, example):
                for name, gradient in pull(column)[0].items():
                    square = gradient.square()
                    squares[name] = squares[name] + square if name in squares else square
            return squares

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found: dict[str, Tensor] = torch.func.vmap(one)(given)
        return found

    def _add_one(self, given: dict[str, Tensor]) -> None:
        """Add sum_j (J^T v_j)^2 of one example, in one pass over each gradient where there is one column only."""
        import torch

        leaves = self._leaves()
        with torch.enable_grad():
            logits = self._logits(leaves, {name: one for name, one in given.items() if name not in _OWN})
        columns = list(self._cotangents(logits, given))
        squares: dict[str, Tensor] = {}
        for column in columns:
            found = torch.autograd.grad(
                logits, list(leaves.values()), column, retain_graph=column is not columns[-1], allow_unused=True
            )
            gradients = {
                name: gradient.coalesce() if gradient.is_sparse else gradient
                for name, gradient in zip(leaves, found, strict=True)
                if gradient is not None
            }
            # Infinite, too, where a square overflows.
            if not all(bool(_values(gradient).norm().isfinite()) for gradient in gradients.values()):
                self.dropped += 1
                return
            for name, gradient in gradients.items():
                _add_square(self.part if len(columns) == 1 else squares, name, gradient)
        for name, square in squares.items():
            self.part[name] = self.part[name].add_(square) if name in self.part else square
        self.in_part += 1
        if self.in_part == IN_PART:
            self._close_part()

    def _close_part(self) -> None:
        for name, one in self.part.items():
            self.sums[name] += one
        self.part, self.in_part = {}, 0

    def _leaves(self) -> dict[str, Tensor]:
        """The parameters as leaves of a graph of their own, in the same memory."""
        return {name: one.detach().requires_grad_() for name, one in self.parameters.items()}

    def _keep(self, squares: Mapping[str, Tensor], count: int) -> None:
        """Add the squares of examples (first axis) whose elements are all finite; count the others."""
        import torch

        finite = torch.ones(count, dtype=torch.bool, device=self.device)
        for one in squares.values():
            if one.numel():
                finite &= one.reshape(count, -1).amax(1).isfinite()
        whole = bool(finite.all())
        if not whole:
            self.dropped += count - int(finite.sum())
        for name, one in squares.items():
            self.sums[name] += (one if whole else one[finite]).sum(0, dtype=torch.float64)

    def _add_to_batch(self, inputs: Batch, targets: Tensor | None, count: int) -> None:
        """Add the gradient of a micro-batch to that of its batch, which is squared once it is full."""
        import torch

        leaves = self._leaves()
        with torch.enable_grad():
            logits = self._logits(leaves, inputs)
        p = torch.softmax(logits.detach(), -1)
        if self.estimator == "batch_hard":
            cotangent = self._towards(p, p.argmax(-1), targets)
        else:
            root = p.sqrt()
            cotangent = root - root.sum(-1, keepdim=True) * p
            if self.task != "classification" and targets is not None:
                cotangent = torch.where((targets != UNLABELLED)[..., None], cotangent, cotangent.new_zeros(()))
        gradients = torch.autograd.grad(logits, list(leaves.values()), cotangent, allow_unused=True)
        labelled = count if self.task == "classification" or targets is None else int((targets != UNLABELLED).sum())
        if self.batch is None:
            self.batch = _BatchGradient()
        self.batch.add(zip(leaves, gradients, strict=True), count, labelled)
        if self.batch.examples == self.batch_size:
            self._square_batch()

    def _square_batch(self) -> None:
        batch, self.batch = self.batch, None
        if batch is None or not batch.labelled:
            return
        if not all(bool(one.isfinite().all()) for one in batch.sums.values()):
            self.dropped += batch.examples
            return
        self.batches += 1
        share = batch.labelled if self.estimator == "batch_hard" else 1
        for name, one in batch.sums.items():
            self.sums[name] += (one / share).square()


_TARGETS, _DRAWS = " targets", " draws"
_OWN = (_TARGETS, _DRAWS)
_MASKS: Mapping[str, tuple[str, ...]] = {
    "attention_mask": ("input_ids", "token_type_ids", "position_ids"),
    "decoder_attention_mask": ("decoder_input_ids",),
}
"""Masks, and what else has their positions."""


def _span(mask: Tensor) -> list[tuple[int, int]]:
    """Of each row, the first position that is not masked and the one after the last."""
    used = mask.bool()
    ahead, behind = used.int().argmax(1), used.flip(1).int().argmax(1)
    return list(zip(ahead.tolist(), (mask.shape[1] - behind).tolist(), strict=True))


@contextlib.contextmanager
def _sparse(model: nn.Module) -> Iterator[None]:
    """With gradients of embeddings that hold the rows of the example's tokens alone: the others are 0, and many."""
    import torch

    dense = [one for one in model.modules() if isinstance(one, torch.nn.Embedding) and not one.sparse]
    for one in dense:
        one.sparse = True
    try:
        yield
    finally:
        for one in dense:
            one.sparse = False


def _values(gradient: Tensor) -> Tensor:
    return gradient.values() if gradient.is_sparse else gradient


def _add_square(sums: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    """Add the square of a gradient, dense or of some rows, to the sum under its name."""
    import torch

    if name not in sums:
        sums[name] = torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    if gradient.is_sparse:
        sums[name].index_add_(0, gradient.indices()[0], gradient.values().square())
    else:
        sums[name].addcmul_(gradient, gradient)


@dataclass
class _BatchGradient:
    """The gradient of a batch in the making."""

    examples: int = 0
    labelled: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, gradients: Iterable[tuple[str, Tensor | None]], examples: int, labelled: int) -> None:
        """The gradients of some of its examples, and how many log-probabilities they are the sum of."""
        self.examples += examples
        self.labelled += labelled
        for name, gradient in gradients:
            if gradient is not None:
                self.sums[name] = self.sums[name].add_(gradient) if name in self.sums else gradient.double()


def _factor(p: Tensor) -> Iterator[Tensor]:
    """The columns of the Cholesky factor of diag(p) - p p^T, p along the last axis: one fewer than it has elements.

    With the tails s_j = p_j + .. + p_C, column j has sqrt(p_j s_{j+1} / s_j) at j and -p_k sqrt(p_j / (s_j s_{j+1})) at each
    k > j. Sums of positive numbers only, so small probabilities keep their digits; a column of a p_j or a tail that is 0 is 0.
    """
    import torch

    tails = p.flip(-1).cumsum(-1).flip(-1)
    classes = p.shape[-1]
    for j in range(classes - 1):
        here, tail, rest = p[..., j : j + 1], tails[..., j : j + 1], tails[..., j + 1 : j + 2]
        none = rest <= 0
        below = -p * (here / (tail * rest).masked_fill(none, 1)).sqrt()
        at = torch.arange(classes, device=p.device)
        column = torch.where(at > j, below, torch.where(at == j, (here * rest / tail.masked_fill(none, 1)).sqrt(), 0))
        yield column.masked_fill(none, 0)


def _refuse(task: Task, classes: int, tokens: int | None = None) -> None:
    """Raises RecipeError, with the numbers, where the expectation over the classes takes too many backward passes."""
    instead = "Use `estimator: sampled` (any number of `samples`) or, with labels, `estimator: empirical`."
    if task != "classification":
        first = f": {(classes - 1) * tokens:,} for the first example of {tokens:,} tokens" if tokens else ""
        raise RecipeError(
            f"the expectation over {classes:,} classes at each token takes {classes - 1:,} backward passes a token{first}",
            fix=instead,
        )
    if classes > MOST_CLASSES:
        raise RecipeError(
            f"the expectation over {classes:,} classes takes {classes - 1:,} backward passes an example, "
            f"and is done for at most {MOST_CLASSES} classes",
            fix=instead,
        )


# The stage

_TASKS: Mapping[models.Task, Task] = {
    "features": "classification",
    "images": "classification",
    "classifier": "classification",
    "tokens": "tokens",
    "causal": "causal",
    "seq2seq": "seq2seq",
}
_WINDOW: Mapping[models.Task, int] = {"images": 64}
"""Examples that are read together, to find those of one length; texts are small, and so 512."""


def run(job: StageJob) -> None:
    """Compute what a job's `fisher_diag` asks for, and write it. Raises InputError, RecipeError, NumericError, MachineError."""
    op = _checked(job.op)
    if job.data is None:
        raise RecipeError(f"{op.name} runs on data, and its node names none", fix="Add `data: NAME`.")
    folder = models.open_folder(job.model)
    task = _task(op, folder)
    source = job.data
    job = replace(job, known=reusing.usable(job, collecting.software()))
    if _write_part(job, op, folder):
        return
    examples = data.read_examples(source, job.folder, folder, op.max_length)
    collecting.say(job, examples.counts)
    with collecting.threads(job.threads):
        model = models.load_model(folder, job.device)
        collecting.settle(model, examples)
        names = naming.checked(naming.names_of(model, naming.shapes(folder.checkpoint)), model, folder.checkpoint)
        placed = _place(model, names, folder, job.only)
        homes = _known(job, placed, model, _room(model, job.memory))
        missing = {parameter for name, parts in placed.tensors.items() if name not in homes for parameter, _ in parts}
        wanted = frozenset(missing or placed.parameters)
        if not missing:
            homes = {}
        found = _in_passes(job, op, task, examples, model, placed.parameters, wanted)
        if found.dropped and homes:  # what is left out of one mean is left out of all
            run(replace(job, known=()))
            return
        if homes:
            job.progress(f"taken from the cache: {len(homes)} of {len(placed.tensors)} tensors", 0, 0)
        if found.dropped:
            job.progress(f"examples left out for NaN or infinite gradients: {found.dropped}", 0, 0)
        if UNFOLLOWED in found.gradients:
            job.progress(f"gradients of one example at a time, which is slow: {found.gradients}", 0, 0)
        _write(job, op, examples, found, placed, homes)


def _in_passes(
    job: StageJob,
    op: FisherDiag,
    task: Task,
    examples: data.Examples,
    model: nn.Module,
    parameters: frozenset[str],
    wanted: frozenset[str],
) -> Diagonal:
    """The diagonals of the parameters that are wanted, of those that are asked for, in as many passes as the memory takes."""
    passes = _passes(job, model, wanted)
    results = []
    for part in passes:
        results.append(
            fisher_diagonal(
                model,
                _batches(examples, op.batch_size, job.device),
                task=task,
                estimator=op.estimator,
                samples=op.samples,
                batch_size=op.batch_size,
                seed=job.seed,
                wanted=part.__contains__,
                memory=_room(model, job.memory),
                total=len(examples.examples),
                progress=lambda done: job.progress("examples", done, len(examples.examples) * len(passes)),
                stop=job.stop,
                beside=_gradient(model, parameters - part),
            )
        )
        if len(passes) > 1 and results[-1].dropped:
            raise MachineError(
                "an example has NaN or infinite gradients, and the memory has no room for those of all parameters at once, "
                "which would tell what to leave out",
                fix="Give it more --memory, or leave the example out.",
            )
    return replace(results[0], tensors={name: one for found in results for name, one in found.tensors.items()})


def bytes_beside(width: int) -> int:
    """Bytes for each element of a parameter whose diagonal is computed: its sum in float64, its gradient, and squares."""
    return 8 + 2 * width


def _passes(job: StageJob, model: nn.Module, wanted: frozenset[str]) -> list[frozenset[str]]:
    """Parameters cut into runs that fit the memory beside the weights. Raises MachineError where one does not fit."""
    named = {name: one for name, one in model.named_parameters()}
    if job.device != "cpu":
        return [wanted]
    weights = sum(one.nbytes for one in named.values())
    room = job.memory - weights
    parts: list[set[str]] = []
    held = room + 1
    for name, one in named.items():
        if name not in wanted:
            continue
        size = one.numel() * bytes_beside(one.element_size())
        if size > room:
            raise MachineError(
                f"takes {weights:,} bytes for the weights and {size:,} for the squares of {name}, and may take {job.memory:,}",
                fix="Give it more --memory: gradients need all weights at once.",
            )
        if held + size > room:
            parts.append(set())
            held = 0
        parts[-1].add(name)
        held += size
    return [frozenset(part) for part in parts]


def _room(model: nn.Module, memory: int) -> int:
    """Bytes for gradients beside the weights and the sums of squares."""
    return max(memory - sum(one.numel() * (one.element_size() + 8) for one in model.parameters()), 0)


def _gradient(model: nn.Module, parameters: Set[str]) -> int:
    """Bytes of one example's gradient of these parameters."""
    return sum(one.numel() * one.element_size() for name, one in model.named_parameters() if name in parameters)


def _why_loop(job: StageJob, placed: _Placed, model: nn.Module, room: int) -> str | None:
    """Why a run over all these parameters would take one example after the other."""
    op, gradient = _checked(job.op), _gradient(model, placed.parameters)
    return _way(gradient, op.estimator, op.batch_size, room, job.device.partition(":")[0])[1]


def _known(job: StageJob, placed: _Placed, model: nn.Module, room: int) -> dict[str, Statistics]:
    """The artifacts in the cache that have some of the diagonals, come by in the way in which this run would come by them."""
    by_batch, why_loop = _checked(job.op).estimator in BY_BATCH, _why_loop(job, placed, model, room)
    found: dict[str, Statistics] = {}
    for one in job.known:
        told = one.facts.data["gradients"]
        if by_batch or told.startswith("vmap" if why_loop is None else "loop"):
            found = {name: one for name in placed.tensors if _name(name) in one.tensors} | found
    return found


def _write_part(job: StageJob, op: FisherDiag, folder: models.Folder) -> bool:
    """Write what is asked for out of an artifact in the cache that has it all; false where none has."""
    whole = reusing.covering(job.known, list(folder.checkpoint.tensors), job.only)
    if whole is None:
        return False
    empty = models.empty_model(folder)
    placed = _place(empty, naming.names_of(empty, naming.shapes(folder.checkpoint)), folder, job.only)
    placed = replace(
        placed, tensors={name: parts for name, parts in placed.tensors.items() if _name(name) in whole.tensors}
    )
    placed = replace(placed, parameters=frozenset(one for parts in placed.tensors.values() for one, _ in parts))
    room = _room(empty, job.memory)
    homes = _known(replace(job, known=(whole,)), placed, empty, room)
    if not homes:
        return False
    why_loop = _why_loop(job, placed, empty, room)
    facts = whole.facts
    told = facts.data["gradients"] if why_loop is None or op.estimator in BY_BATCH else f"loop ({why_loop})"
    part = facts.model_copy(
        update={
            "model": ModelNote.model_validate(dict(job.source)),
            "only": job.only,
            "data": {**facts.data, "source": collecting.data_label(job), "gradients": told},
            "skipped": collecting.skipped(facts.skipped, job.only),
        }
    )
    job.progress(f"taken from the cache: {len(homes)} of {len(homes)} tensors", 0, 0)
    tensors = reusing.Taken({_name(name): whole for name in homes})
    job.write(tensors, {STATISTICS: part.encoded()}, collecting.metadata(op))
    return True


def predict(op: StatisticsOp, folder: models.Folder, only: tuple[str, ...] | None = None) -> Predicted:
    """What a run would write, from config.json and headers: a tensor in the shape of each parameter that is stored."""
    _task(_checked(op), folder)
    empty = models.empty_model(folder)
    placed = _place(empty, naming.names_of(empty, naming.shapes(folder.checkpoint)), folder, only)
    tensors = {_name(name): ("float32", folder.checkpoint.tensors[name].shape) for name in sorted(placed.tensors)}
    return Predicted(tensors, {}, placed.skipped)


@dataclass(frozen=True)
class _Placed:
    """Where the checkpoint's tensors lie: their pieces, in order; the parameters of these; why other tensors have none."""

    tensors: Mapping[str, tuple[tuple[str, naming.Piece], ...]]
    parameters: frozenset[str]
    skipped: Mapping[str, str]


def _place(model: nn.Module, names: naming.Names, folder: models.Folder, only: tuple[str, ...] | None) -> _Placed:
    """The tensors that `only` allows, each with its pieces in parameters; of tied ones the first name in the model counts."""
    first: dict[int, str] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(one), name)
    own = {
        name: first[id(one)] for name, one in model.named_parameters(remove_duplicate=False) if one.is_floating_point()
    }
    tensors: dict[str, list[tuple[str, naming.Piece]]] = {}
    skipped = dict(names.lost)
    for parameter, pieces in names.pieces.items():
        for piece in pieces:
            if parameter in own:
                tensors.setdefault(piece.tensor, []).append((own[parameter], piece))
            else:
                skipped[piece.tensor] = "it is no parameter, and has no gradient"
    for name, parts in list(tensors.items()):
        rows = sum(piece.rows for _, piece in parts)
        if rows != (folder.checkpoint.tensors[name].shape or (0,))[0]:
            skipped[name] = "part of it is in no parameter"
            del tensors[name]
    at = places(folder.checkpoint.tensors)
    kept = {
        name: tuple(sorted(parts, key=lambda part: part[1].start))
        for name, parts in tensors.items()
        if only is None or matches(only, at[name])
    }
    if not kept:
        raise RecipeError(
            f"`only: {', '.join(only or ('*',))}` names no parameter of the model",
            fix=f"Some that it has: {', '.join(sorted(tensors)[:3])}.",
        )
    parameters = frozenset(parameter for parts in kept.values() for parameter, _ in parts)
    return _Placed(kept, parameters, collecting.skipped(skipped, only))


def _checked(op: StatisticsOp) -> FisherDiag:
    if not isinstance(op, FisherDiag):
        raise TypeError(f"{op.name} is not run here")
    return op


def _task(op: FisherDiag, folder: models.Folder) -> Task:
    """What a label belongs to. Raises RecipeError for a model or an estimator that cannot be, before any weight is read."""
    task = _TASKS.get(folder.task)
    if task is None:
        raise RecipeError(
            f"{folder.architecture} gives vectors, and no probabilities to take gradients of",
            fix="Use a model with a head: a classifier or a language model.",
        )
    if op.estimator == "expected":
        text = folder.config.get("text_config")
        vocabulary = folder.config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
        classes = vocabulary if task in ("causal", "seq2seq") else folder.n_labels
        if isinstance(classes, int):
            _refuse(task, classes)
    return task


def _batches(examples: data.Examples, size: int, device: str) -> Iterator[Batch]:
    """Examples as the estimators take them."""
    for batch in examples.batches(max(_WINDOW.get(examples.task, 512) // size, 1) * size, device):
        labels = {} if batch.labels is None else {"labels": batch.labels}
        yield {**batch.inputs, **labels}


def _name(tensor: str) -> str:
    return f"{PREFIX['fisher_diag']}.{tensor}"


def _assembled(parts: tuple[tuple[str, naming.Piece], ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """The diagonal of a checkpoint's tensor out of those of the parameters that hold it."""
    import torch

    cut = []
    for parameter, piece in parts:
        whole = tensors[parameter] if piece.expert is None else tensors[parameter][piece.expert]
        cut.append(whole[piece.at : piece.at + piece.rows] if whole.dim() else whole)
    return (cut[0] if len(cut) == 1 else torch.cat(cut)).cpu().contiguous()


def _write(
    job: StageJob,
    op: FisherDiag,
    examples: data.Examples,
    found: Diagonal,
    placed: _Placed,
    homes: Mapping[str, Statistics],
) -> None:
    """statistics.json, and the artifact."""
    where = job.data.path if job.data else ""
    if found.tokens < op.min_tokens:
        raise InputError(
            f"has {found.tokens} tokens, and `min_tokens` asks for {op.min_tokens}",
            where=where,
            fix="Use more data: statistics of few tokens show what the tokens were.",
        )
    facts = Facts(
        kind="fisher_diag",
        op=OpNote.model_validate({"name": op.name, "version": op.version, **op.model_dump(mode="json")}),
        model=ModelNote.model_validate(dict(job.source)),
        only=job.only,
        data={
            "source": collecting.data_label(job),
            "rows_left_out": examples.counts.unusable,
            "texts_cut": examples.counts.cut,
            "examples_dropped": found.dropped,
            "gradients": found.gradients,
        },
        n_examples=found.examples,
        n_tokens=found.tokens,
        seed=job.seed,
        skipped=dict(placed.skipped),
        software=collecting.software(),
    )
    tensors = {
        _name(name): naming.read_tensor(homes[name], _name(name))
        if name in homes
        else _assembled(placed.tensors[name], found.tensors)
        for name in sorted(placed.tensors)
    }
    job.write(tensors, {STATISTICS: facts.encoded()}, collecting.metadata(op))
