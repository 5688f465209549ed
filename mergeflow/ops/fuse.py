"""`fuse`: what several models predict on a corpus, distilled into one. Parameters only: models run in `mergeflow.stages`.

Which parameters mean something depends on the task, the loss and the fusion function. One that says nothing where it stands is a
problem, never ignored: so an op keeps which of its fields were given (`model_fields_set`), at every depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Space
from mergeflow.ops.statistics import StageOp, Times
from mergeflow.settings import Count, Flag, Fraction, NonNegative, Patterns, Positive, Unit

Task = Literal["causal_lm", "classification"]
Function = Literal["min", "max", "avg", "avg_fusellm", "static", "max_confidence"]
Precision = Literal["float32", "bfloat16"]
Beta = Annotated[float, Strict(), Field(ge=0, lt=1)]


class _Part(BaseModel):
    """Settings that stand together under one key."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Source(_Part):
    """What one source says for itself."""

    weight: NonNegative = Field(default=1.0, description="How much this source counts.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="The dtype in which this source runs."
    )
    batch_tokens: Times | None = Field(
        default=None, description="causal_lm: tokens that run through this source together; default: 8192."
    )
    label_map: dict[Annotated[str, Strict()], Annotated[str, Strict()]] | None = Field(
        default=None, description="classification: this source's labels, each with the target's label that it means."
    )


class Capture(_Part):
    """What is kept of each source."""

    top_k: Annotated[int, Strict(), Field(ge=1, le=2**20)] = Field(
        default=32, description="Log-probabilities kept for each token: those of the likeliest ids."
    )
    min_mass: Fraction | None = Field(
        default=None, description="Keep no more ids than sum to this probability; default: top_k of them."
    )
    dtype: Literal["float16", "float32"] = Field(default="float16", description="The dtype that they are stored in.")


class Align(_Part):
    """How tokens of a source and of the target are paired."""

    method: Literal["bytes", "dtw"] = Field(
        default="bytes",
        description="By the bytes of the text that they cover, or by dynamic time warping over edit distances.",
    )
    valid: Literal["both_ends", "end"] = Field(
        default="both_ends", description="Where a target's token starts at a source's border, or ends at one too."
    )
    unmatched: Literal["gold", "skip"] = Field(
        default="gold", description="Positions without a pair: train on the true next token alone, or not at all."
    )
    vocab: Literal["project", "min_edit"] = Field(
        default="project",
        description="Ids of the source as ids of the target: by bytes, or by the smallest edit distance.",
    )
    chunk_correction: Flag = Field(
        default=True,
        description="Take the probability of a target token that the source spells in several from all of them.",
    )


class Fusion(_Part):
    """How the sources become one teacher."""

    function: Function | None = Field(
        default=None,
        description="min, max: the source with the lowest (highest) score; avg, avg_fusellm: all, by their scores; static: all, "
        "by `weight`; max_confidence (classification): the surest. Default: min for causal_lm, avg for classification.",
    )
    metric: Literal["bits_per_byte", "token_cross_entropy"] = Field(
        default="bits_per_byte", description="causal_lm: the score of a source on a document."
    )
    granularity: Literal["document", "block"] = Field(
        default="document", description="causal_lm: what one choice is made for: a document, or a packed block."
    )
    temperature: Positive = Field(default=1.0, description="causal_lm, avg: divides the scores before their softmax.")
    average: Literal["logits", "probabilities"] = Field(
        default="logits", description="classification, avg: what the mean is of."
    )


class Loss(_Part):
    """What is minimised: clm_weight * L_CLM + (1 - clm_weight) * L_FUSE for causal_lm, L_FUSE alone for classification."""

    kind: Literal["soft_ce", "kl", "alm"] | None = Field(
        default=None,
        description="L_FUSE: cross-entropy with the teacher's probabilities, Kullback-Leibler divergence, or agreement on the "
        "probabilities of stretches of text (alm). Default: soft_ce for causal_lm, kl for classification.",
    )
    clm_weight: Unit = Field(default=0.5, description="causal_lm: the share of the loss on the true next tokens.")
    schedule: Literal["constant", "linear"] = Field(
        default="constant", description="causal_lm: clm_weight stays, or rises to 1 over the training."
    )
    teacher_temperature: Positive = Field(default=1.0, description="Divides the teacher's logits.")
    student_temperature: Positive = Field(default=1.0, description="Divides the logits of the model in training.")
    tail: Literal["bucket", "renormalise"] = Field(
        default="bucket", description="The mass outside the kept ids: one more class, or spread over the kept."
    )
    alm_tau: Positive = Field(default=100.0, description="alm: probabilities are raised to 1 / alm_tau.")


class Train(_Part):
    """How the target is trained, by AdamW."""

    epochs: Times = Field(default=1, description="Times that all data is seen.")
    batch_tokens: Times | None = Field(
        default=None, description="causal_lm: tokens of one optimiser step; default: 262144."
    )
    micro_batch_tokens: Times | None = Field(
        default=None, description="causal_lm: tokens that run through the target together; default: 4096."
    )
    batch_size: Times | None = Field(
        default=None, description="classification: examples of one optimiser step; default: 64."
    )
    lr: Positive = Field(default=1e-5, description="The greatest learning rate.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="AdamW's two decays.")
    weight_decay: NonNegative = Field(default=0.1, description="AdamW's decoupled weight decay, of matrices alone.")
    grad_clip: NonNegative = Field(default=1.0, description="The greatest norm of a gradient; 0 does not clip.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate goes on after the warm-up: down to 0, or not."
    )
    warmup_ratio: Unit = Field(default=0.008, description="Part of the steps over which the learning rate rises.")
    trainable: Literal["all"] | Patterns = Field(
        default="all", description="all, or patterns over the target's tensor names; the others stay as they are."
    )
    gradient_checkpointing: Literal["auto"] | Flag = Field(
        default="auto",
        description="Compute activations twice in place of keeping them; auto: where they would not fit.",
    )
    precision: Precision = Field(default="float32", description="bfloat16: products in bfloat16, weights in float32.")
    seed: Count | None = Field(
        default=None, description="Seed of the order of the data and of dropout; default: the node's, or the recipe's."
    )
    checkpoint_every: Times = Field(default=500, description="Optimiser steps between checkpoints.")


_PARTS: dict[str, type[_Part]] = {"capture": Capture, "align": Align, "fusion": Fusion, "loss": Loss, "train": Train}


def _part(kind: type[_Part], description: str) -> Any:
    """A field of settings, all at their defaults, which are not validated, so that importing stays quick."""
    return Field(default=kind.model_construct(), description=description, validate_default=False)


class Fuse(StageOp):
    """Distil what several models predict on a corpus into one, the target, which keeps its tensors, config and tokenizer.

    The sources run once over the data; what they give is cached, source by source, so that another loss, another fusion or one
    more source runs none of them again. Then the target is trained towards it, with checkpoints: a run that was killed goes on.

    `task: causal_lm`: language models, whatever their tokenizers; L = w L_CLM + (1 - w) L_FUSE (FuseLLM; FuseChat is a `fuse` for
    each source and an `sce` over the results). `task: classification`: models of text, images or numbers over one set of labels, on
    inputs without labels; L = KL(softmax(z / T) || softmax(f(x) / T)) with z the weighted mean of the sources' logits (FedDF,
    arXiv:2006.07242), or `max_confidence`, with `include_self`, the source that is surer than the start (arXiv:2310.17653).

    Raises RecipeError for tokenizers, labels or parameters that do not go together, InputError for bad data, MachineError where
    disk or memory do not suffice, NumericError where over 0.1% of documents give NaN or Inf.
    """

    name = "fuse"
    formula = "argmin_theta w L_CLM(theta) + (1 - w) L_FUSE(theta; sources)"
    paper = "arXiv:2401.10491"
    takes = "sources"

    task: Task = Field(description="What the models are.")
    sources: tuple[Source, ...] = Field(default=(), description="What each source says for itself, in their order.")
    include_self: Flag = Field(default=False, description="The target as it starts is one more source.")
    pack: Flag = Field(
        default=True, description="causal_lm: several documents in one row, without attention from one to another."
    )
    capture: Capture = _part(Capture, "causal_lm: what is kept of each source.")
    align: Align = _part(Align, "causal_lm: how tokens of a source and of the target are paired.")
    fusion: Fusion = _part(Fusion, "How the sources become one teacher.")
    loss: Loss = _part(Loss, "What is minimised.")
    train: Train = _part(Train, "How the target is trained.")
    preset: Literal["fusellm_v1"] | None = Field(
        default=None, description="causal_lm: the published recipe in place of the defaults of what is not given."
    )

    parts: ClassVar[tuple[str, ...]] = tuple(_PARTS)
    """The fields that hold settings of their own."""

    def given(self, path: str) -> bool:
        """Whether a field was written: `pack`, or `loss.clm_weight`."""
        head, _, rest = path.partition(".")
        if head not in self.model_fields_set:
            return False
        return not rest or rest in getattr(self, head).model_fields_set

    @property
    def ready(self) -> Fuse:
        """The same with every default in its place: those of the task, and of the preset."""
        chosen = dict(_PRESETS[self.preset]) if self.preset else {}
        for path, by_task in _BY_TASK.items():
            chosen.setdefault(path, by_task[self.task])
        changed: dict[str, Any] = {}
        for path, value in chosen.items():
            if self.given(path):
                continue
            head, _, rest = path.partition(".")
            part = changed.get(head, getattr(self, head))
            changed[head] = part.model_copy(update={rest: value}) if rest else value
        return self.model_copy(update=changed)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each source, the start's last where it is one."""
        return (*(one.weight for one in self.sources), *([1.0] if self.include_self else []))

    @classmethod
    def defaults(cls, task: Task) -> dict[str, Any]:
        """What a node of a task may write, each field at its default, without those that say nothing there."""
        ready = cls.model_construct(_fields_set={"task"}, task=task, sources=(Source(),)).ready
        found: dict[str, Any] = {name: getattr(ready, name) for name in cls.model_fields if name != "sources"}
        found |= {name: {key: getattr(found[name], key) for key in kind.model_fields} for name, kind in _PARTS.items()}
        while True:
            written = cls(**_without_none(found), sources=(Source(),))
            wrong = {path for path, _, _ in written.problems()}
            if not wrong:
                return _without_none(found)
            for head, *rest in wrong:
                holder = found[str(head)] if rest else found
                del holder[str(rest[0] if rest else head)]

    def check(self) -> None:
        """Raises the first of `problems`."""
        for path, what, fix in self.problems():
            raise RecipeError(what, where=".".join(map(str, path)), fix=fix)

    def problems(self) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
        """What does not go together: the path of a field, what is wrong with it, and what to do."""
        ready = self.ready
        for path in _ONLY_FOR["classification" if self.task == "causal_lm" else "causal_lm"]:
            if self.given(path):
                other = "classification" if self.task == "causal_lm" else "causal_lm"
                yield tuple(path.split(".")), f"`{path}` is of `task: {other}`", _INSTEAD.get(path, "Leave it out.")
        for index, source in enumerate(self.sources):
            for name, task in (("label_map", "classification"), ("batch_tokens", "causal_lm")):
                if getattr(source, name) is not None and task != self.task:
                    yield ("sources", index, name), f"`{name}` is of `task: {task}`", "Leave it out."
        function, kind = ready.fusion.function, ready.loss.kind
        fits = _FUNCTIONS[self.task]
        if function not in fits:
            yield (
                ("fusion", "function"),
                f"`{function}` is no fusion of `task: {self.task}`",
                f"There are {', '.join(fits)}.",
            )
            return
        if self.task == "classification" and kind != "kl":
            yield (
                ("loss", "kind"),
                f"`{kind}` is no loss of `task: classification`",
                "Write `kind: kl`, or leave it out.",
            )
        if not any(self.weights):
            yield ("sources",), "all weights are 0", "Change a weight."
        if function == "max_confidence":
            if any(weight != 1 for weight in self.weights):
                yield (
                    ("sources",),
                    "`max_confidence` compares how sure sources are, and weighs none",
                    "Leave `weight` out.",
                )
            if self.given("fusion.average"):
                yield ("fusion", "average"), "`max_confidence` takes no mean", "Leave it out."
        if self.given("fusion.temperature") and function != "avg" and self.task == "causal_lm":
            yield (
                ("fusion", "temperature"),
                f"`{function}` has no temperature",
                "Leave it out, or write `function: avg`.",
            )
        yield from self._losses(kind)

    def _losses(self, kind: str | None) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
        """What says nothing beside the loss."""
        if self.task != "causal_lm":
            return
        if kind != "alm" and self.given("loss.alm_tau"):
            yield ("loss", "alm_tau"), f"`alm_tau` is of `kind: alm`, and the loss is {kind}", "Leave it out."
        for path in _NOT_FOR_ALM if kind == "alm" else ():
            if self.given(path):
                yield (
                    tuple(path.split(".")),
                    f"`{path}` says nothing with `kind: alm`, which needs the probability of the text alone",
                    "Leave it out.",
                )
        if kind == "alm" and self.preset:
            yield ("preset",), f"the preset {self.preset} has a loss of its own", "Leave out one of the two."
        if self.loss.clm_weight == 1 and self.given("loss.schedule") and self.loss.schedule != "constant":
            yield ("loss", "schedule"), "`clm_weight` is 1 already", "Leave it out."

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """Whole models give a whole model."""
        wrong = [one for one in inputs if one != "weight"]
        if wrong:
            raise RecipeError(
                f"{self.name} runs its models, and one is {wrong[0]}",
                fix="Name entries of `models:`, or nodes that give whole models.",
            )
        return "weight"


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    found = {key: _without_none(value) if isinstance(value, dict) else value for key, value in fields.items()}
    return {key: value for key, value in found.items() if value is not None and value != {}}


_BY_TASK: dict[str, dict[str, Any]] = {
    "fusion.function": {"causal_lm": "min", "classification": "avg"},
    "loss.kind": {"causal_lm": "soft_ce", "classification": "kl"},
    "train.batch_tokens": {"causal_lm": 262144, "classification": None},
    "train.micro_batch_tokens": {"causal_lm": 4096, "classification": None},
    "train.batch_size": {"causal_lm": None, "classification": 64},
}
"""Defaults that depend on the task."""

_PRESETS: dict[str, dict[str, Any]] = {
    "fusellm_v1": {
        "include_self": True,
        "capture.top_k": 10,
        "align.method": "dtw",
        "align.vocab": "min_edit",
        "align.chunk_correction": False,
        "fusion.function": "min",
        "fusion.metric": "token_cross_entropy",
        "fusion.granularity": "block",
        "loss.kind": "soft_ce",
        "loss.clm_weight": 0.9,
        "loss.tail": "renormalise",
    }
}
"""What a preset says in place of the defaults: FuseLLM as published (arXiv:2401.10491 and its code), but for its off-by-one."""

_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "causal_lm": (
        "capture",
        "align",
        "pack",
        "preset",
        "fusion.metric",
        "fusion.granularity",
        "fusion.temperature",
        "loss.clm_weight",
        "loss.schedule",
        "loss.tail",
        "loss.alm_tau",
        "train.batch_tokens",
        "train.micro_batch_tokens",
    ),
    "classification": ("fusion.average", "train.batch_size", "batch_size"),
}
"""Fields that mean something for one task alone."""

_INSTEAD = {
    "train.batch_tokens": "Write `batch_size`, in examples.",
    "train.micro_batch_tokens": "Write `batch_size` on the node: examples that run together.",
    "train.batch_size": "Write `batch_tokens`.",
    "batch_size": "Write `micro_batch_tokens` under `train:`, and `batch_tokens` on a source.",
}

_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("min", "max", "avg", "avg_fusellm", "static"),
    "classification": ("avg", "max_confidence"),
}

_NOT_FOR_ALM = ("capture.top_k", "capture.min_mass", "align.method", "align.valid", "align.unmatched", "align.vocab",
                "align.chunk_correction", "loss.tail")  # fmt: skip
