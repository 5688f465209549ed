"""`fuse`: what several models predict on data, distilled into one. Parameters only: models run in `mergeflow.stages`.

Which parameters mean something depends on the task and on the others. One that says nothing where it stands is a problem, never
ignored: settings that stand together keep which of them were given (`model_fields_set`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Space
from mergeflow.ops.statistics import StageOp, Times
from mergeflow.settings import Count, Flag, NonNegative, Patterns, Positive, Unit

Beta = Annotated[float, Strict(), Field(ge=0, lt=1)]
Label = Annotated[str, Strict()]


class _Part(BaseModel):
    """Settings that stand together under one key."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Source(_Part):
    """What one source says for itself."""

    weight: NonNegative = Field(default=1.0, description="How much this source counts in a mean.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="The dtype in which this source runs."
    )
    label_map: dict[Label, Label] | None = Field(
        default=None,
        description="This source's labels, each with the target's label that it means; default: those of the same name.",
    )
    batch_tokens: Times = Field(
        default=4096, description="causal_lm: tokens that run through this source together, padding counted."
    )


class Capture(_Part):
    """What is kept of a language model's predictions."""

    top_k: Times = Field(default=32, description="How many of the likeliest next tokens are kept at each position.")
    min_mass: Annotated[float, Strict(), Field(gt=0, le=1)] | None = Field(
        default=None, description="Keep no more of them than have this much probability together."
    )
    dtype: Literal["float16", "float32"] = Field(default="float16", description="The dtype of log-probabilities.")


class Align(_Part):
    """How tokens of a source are paired with those of the target."""

    method: Literal["bytes", "dtw"] = Field(
        default="bytes",
        description="By the bytes of the text that they have read, or by dynamic time warping over edit distances.",
    )
    valid: Literal["both_ends", "end"] = Field(
        default="both_ends",
        description="bytes: whether the source must also have a border behind the target's next token.",
    )
    unmatched: Literal["gold", "skip"] = Field(
        default="gold", description="Elsewhere the true next token alone is taught, or nothing."
    )
    vocab: Literal["project", "min_edit", "exact"] = Field(
        default="project",
        description="A source's id counts for the target's of the same bytes, else of the longest beginning of them; for the "
        "nearest in edit distance; or only for that of the same bytes.",
    )
    chunk_correction: Flag = Field(
        default=True,
        description="The true next token has exactly the probability of the source's tokens that spell it.",
    )


class Fusion(_Part):
    """How the sources become one teacher."""

    function: Literal["avg", "max_confidence", "min", "max", "avg_fusellm", "static"] | None = Field(
        default=None,
        description="Classifiers: avg, the weighted mean of all (default), or max_confidence, for each input the source whose best "
        "class is the likeliest. Language models, for each document: min, the source that predicts it best (default), max, the worst, "
        "avg, softmax(-score / temperature) over sources, avg_fusellm, softmax(exp(-score)), or static, by `weight`.",
    )
    average: Literal["logits", "probabilities"] = Field(default="logits", description="avg of classifiers: of what.")
    metric: Literal["bits_per_byte", "token_cross_entropy"] = Field(
        default="bits_per_byte", description="What a source's prediction of a document is scored by."
    )
    granularity: Literal["document", "block"] = Field(
        default="document", description="Scores are of documents, or of the rows into which they are packed."
    )
    temperature: Positive = Field(default=1.0, description="avg of language models: divides scores.")


class Loss(_Part):
    """What is minimised."""

    teacher_temperature: Positive = Field(default=1.0, description="Divides the teacher's logits.")
    student_temperature: Positive = Field(default=1.0, description="Divides the logits of the model in training.")
    kind: Literal["soft_ce", "kl", "alm"] = Field(
        default="soft_ce",
        description="causal_lm: cross-entropy with the teacher, its divergence, or the probabilities of stretches of text (ALM), "
        "for which nothing but the true tokens' log-probabilities is kept.",
    )
    clm_weight: Unit = Field(
        default=0.5, description="causal_lm: share of plain next-token training; 1 runs no source."
    )
    schedule: Literal["constant"] = Field(default="constant", description="causal_lm: how `clm_weight` goes on.")
    tail: Literal["bucket", "renormalise"] = Field(
        default="bucket", description="causal_lm: what is not kept is one class more, or what is kept is taken for all."
    )
    alm_tau: Positive = Field(default=100.0, description="alm: the temperature of stretches' probabilities.")


class Train(_Part):
    """How the target is trained, by AdamW."""

    epochs: Times = Field(default=1, description="Times that all data is seen.")
    batch_size: Times = Field(default=64, description="Examples of one optimiser step.")
    batch_tokens: Times = Field(default=262144, description="causal_lm: tokens of one optimiser step, at least.")
    micro_batch_tokens: Times = Field(
        default=4096, description="causal_lm: tokens that run through the target together, padding counted."
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
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: products in bfloat16, weights in float32."
    )
    seed: Count | None = Field(
        default=None, description="Seed of the order of the data and of dropout; default: the node's, or the recipe's."
    )
    checkpoint_every: Times = Field(default=500, description="Optimiser steps between checkpoints.")


def _part(kind: type[_Part], description: str) -> Any:
    """A field of settings, all at their defaults, which are not validated, so that importing stays quick."""
    return Field(default=kind.model_construct(), description=description, validate_default=False)


SILENT: dict[str, dict[str, tuple[str, ...]]] = {
    "classification": {
        "": ("pack", "capture", "align", "preset"),
        "fusion": ("metric", "granularity", "temperature"),
        "loss": ("kind", "clm_weight", "schedule", "tail", "alm_tau"),
        "train": ("batch_tokens", "micro_batch_tokens"),
        "sources": ("batch_tokens",),
    },
    "causal_lm": {
        "": ("batch_size",),
        "fusion": ("average",),
        "train": ("batch_size",),
        "sources": ("label_map",),
    },
}
"""What says nothing for a task: of the op itself (""), and of each of its parts."""


def _given(part: BaseModel, name: str) -> bool:
    """Whether a field was written in a recipe, and not as it is anyway."""
    value = getattr(part, name)
    if isinstance(value, _Part):
        return bool(value.model_fields_set)
    return name in part.model_fields_set and (
        not isinstance(part, StageOp) or value != type(part).model_fields[name].default
    )


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fusellm_v1": {
        "capture": {"top_k": 10},
        "align": {"method": "dtw", "vocab": "min_edit", "chunk_correction": False},
        "fusion": {"function": "min", "metric": "token_cross_entropy", "granularity": "block"},
        "loss": {"kind": "soft_ce", "clm_weight": 0.9, "tail": "renormalise"},
    }
}


class Fuse(StageOp):
    """Distil what several models say of data into one, which keeps its tensors, config and tokenizer.

    `sources` run once over the data; what they give is cached, source by source, so that another fusion, another training or one
    more source runs none of them again. Then `target` is trained towards it. A training that was killed goes on from its last
    checkpoint.

    `task: classification`: L = KL(softmax(z / T) || softmax(f(x) / T)) on inputs without labels, with z the weighted mean of the
    sources' logits (FedDF), or with `max_confidence` and `include_self` the source that is surer than the start (arXiv:2310.17653).
    Sources and target may be of any class that tells apart the same labels: texts, images, or rows of numbers, each with its own
    tokenizer or processor.

    `task: causal_lm`: L = w L_CLM + (1 - w) L_FUSE, w = `clm_weight`, with models of different tokenizers (FuseLLM,
    arXiv:2401.10491). Tokens are paired by the bytes of the text that they cover, a source's likeliest next tokens brought to the
    target's vocabulary, and for each document the source counts that predicts it best. With `loss: {kind: alm}` the probabilities of
    stretches of text are taught instead (arXiv:2503.20083). `preset: fusellm_v1` is FuseLLM as published, but for the position that
    it pairs wrongly; what is given beside it wins.

    Raises RecipeError for labels or parameters that do not go together, InputError for bad data or a tokenizer that changes the text,
    MachineError where disk or memory do not suffice, NumericError where over 0.1% of the inputs give NaN or Inf.
    """

    name = "fuse"
    formula = "argmin_theta E_x KL(softmax(sum_i w_i f_i(x) / T) || softmax(f_theta(x) / T))"
    paper = "arXiv:2401.10491"
    takes = "sources"

    task: Literal["classification", "causal_lm"] = Field(description="What the models are.")
    sources: tuple[Source, ...] = Field(default=(), description="What each source says for itself, in their order.")
    include_self: Flag | None = Field(
        default=None, description="The target as it starts is one more source; default: false, and true with a preset."
    )
    pack: Flag = Field(
        default=True,
        description="causal_lm: several documents in one row in training, none of which sees another; else one a row, filled up.",
    )
    capture: Capture = _part(Capture, "causal_lm: what is kept of a source's predictions.")
    align: Align = _part(Align, "causal_lm: how tokens of a source are paired with those of the target.")
    fusion: Fusion = _part(Fusion, "How the sources become one teacher.")
    loss: Loss = _part(Loss, "What is minimised.")
    train: Train = _part(Train, "How the target is trained.")
    preset: Literal["fusellm_v1"] | None = Field(
        default=None, description="causal_lm: settings of a published recipe for all that is not given."
    )

    @property
    def teaches(self) -> bool:
        """Whether sources teach at all."""
        return self.task == "classification" or self.settled.loss.clm_weight < 1

    @property
    def self_too(self) -> bool:
        """Whether the target as it starts is one more source."""
        return self.preset is not None if self.include_self is None else self.include_self

    @property
    def settled(self) -> Fuse:
        """The same with what its preset says put in."""
        parts = {
            part: getattr(self, part).model_copy(
                update={key: one for key, one in values.items() if key not in getattr(self, part).model_fields_set}
            )
            for part, values in PRESETS.get(self.preset or "", {}).items()
        }
        return self.model_copy(update={**parts, "include_self": self.self_too, "preset": None})

    @property
    def deciding(self) -> dict[str, Any]:
        """What its preset says put in: what is written beside one may be a default, and wins."""
        return self.settled.model_dump(mode="json")

    @property
    def function(self) -> str:
        """How the sources become one teacher, the default put in."""
        given = self.settled.fusion.function
        return given or ("avg" if self.task == "classification" else "min")

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each source, the start's last where it is one."""
        return (*(one.weight for one in self.sources), *([1.0] if self.self_too else []))

    def check(self) -> None:
        """Raises RecipeError for the first of `problems`."""
        for path, what, fix in self.problems():
            raise RecipeError(what, where=".".join(path), fix=fix)

    def problems(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        """What does not go together: the path of a field, what is wrong with it, and what to do."""
        language = self.task == "causal_lm"
        for part, names in SILENT[self.task].items():
            given = enumerate(self.sources) if part == "sources" else [(None, getattr(self, part) if part else self)]
            for index, one in given:
                for name in names:
                    if _given(one, name):
                        at = tuple(key for key in (part, None if index is None else str(index), name) if key)
                        yield at, f"`{name}` says nothing for `task: {self.task}`", "Leave it out."
        allowed = ("min", "max", "avg", "avg_fusellm", "static") if language else ("avg", "max_confidence")
        if self.function not in allowed:
            fix = f"Those of `task: {self.task}`: {', '.join(allowed)}."
            yield ("fusion", "function"), f"`{self.function}` is not for `task: {self.task}`", fix
            return
        if not any(self.weights):
            yield ("sources",), "all weights are 0", "Change a weight."
        yield from self._language_problems() if language else self._class_problems()

    def _class_problems(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        if self.function != "max_confidence":
            return
        if any(weight != 1 for weight in self.weights):
            yield ("sources",), "`max_confidence` compares how sure sources are, and weighs none", "Leave `weight` out."
        if "average" in self.fusion.model_fields_set:
            yield ("fusion", "average"), "`max_confidence` takes no mean", "Leave it out."

    def _language_problems(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        settled = self.settled
        if self.function != "static" and any("weight" in one.model_fields_set for one in self.sources):
            fix = "Write `fusion: {function: static}`, or leave `weight` out."
            yield ("sources",), f"`{self.function}` goes by how well sources predict, and weighs none", fix
        if "temperature" in self.fusion.model_fields_set and self.function != "avg":
            yield (
                ("fusion", "temperature"),
                f"`temperature` says nothing for `function: {self.function}`",
                "Leave it out.",
            )
        if self.function == "static":
            for name in ("metric", "granularity"):
                if name in self.fusion.model_fields_set:
                    yield ("fusion", name), f"`{name}` says nothing for `function: static`", "Leave it out."
        silent = {"loss": (), "align": (), "capture": ()} | (
            {
                "loss": ("tail", "teacher_temperature", "student_temperature"),
                "align": tuple(Align.model_fields),
                "capture": tuple(Capture.model_fields),
            }
            if settled.loss.kind == "alm"
            else {"loss": ("alm_tau",), "align": ("valid",) if settled.align.method == "dtw" else ()}
        )
        for part, names in silent.items():
            for name in names:
                if name in getattr(self, part).model_fields_set:
                    warped = part == "align" and settled.loss.kind != "alm"
                    about = "align: {method: dtw}" if warped else f"loss: {{kind: {settled.loss.kind}}}"
                    yield (part, name), f"`{name}` says nothing for `{about}`", "Leave it out."

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """Whole models give a whole model."""
        wrong = [one for one in inputs if one != "weight"]
        if wrong:
            raise RecipeError(
                f"{self.name} runs its models, and one is {wrong[0]}",
                fix="Name entries of `models:`, or nodes that give whole models.",
            )
        return "weight"
