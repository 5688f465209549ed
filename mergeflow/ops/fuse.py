"""`fuse`: what several models predict on data, distilled into one. Parameters only: models run in `mergeflow.stages`.

Which parameters mean something depends on the others. One that says nothing where it stands is a problem, never ignored: settings
that stand together keep which of them were given (`model_fields_set`).
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


class Fusion(_Part):
    """How the sources become one teacher."""

    function: Literal["avg", "max_confidence"] = Field(
        default="avg",
        description="The weighted mean of all, or for each input the source whose best class is the likeliest.",
    )
    average: Literal["logits", "probabilities"] = Field(default="logits", description="avg: what the mean is of.")


class Loss(_Part):
    """What is minimised."""

    teacher_temperature: Positive = Field(default=1.0, description="Divides the teacher's logits.")
    student_temperature: Positive = Field(default=1.0, description="Divides the logits of the model in training.")


class Train(_Part):
    """How the target is trained, by AdamW."""

    epochs: Times = Field(default=1, description="Times that all data is seen.")
    batch_size: Times = Field(default=64, description="Examples of one optimiser step.")
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


class Fuse(StageOp):
    """Distil what several classifiers say of inputs without labels into one, which keeps its tensors and config.

    `sources` run once over the data; what they give is cached, source by source, so that another fusion, another training or one
    more source runs none of them again. Then `target` is trained towards it: L = KL(softmax(z / T) || softmax(f(x) / T)), with z the
    weighted mean of the sources' logits (FedDF), or with `max_confidence` and `include_self` the source that is surer than the start
    (arXiv:2310.17653). A training that was killed goes on from its last checkpoint. Sources and target may be of any class that tells
    apart the same labels: texts, images, or rows of numbers, each with its own tokenizer or processor.

    Raises RecipeError for labels or parameters that do not go together, InputError for bad data, MachineError where disk or memory
    do not suffice, NumericError where over 0.1% of the inputs give NaN or Inf.
    """

    name = "fuse"
    formula = "argmin_theta E_x KL(softmax(sum_i w_i f_i(x) / T) || softmax(f_theta(x) / T))"
    paper = "arXiv:2006.07242"
    takes = "sources"

    task: Literal["classification"] = Field(description="What the models are.")
    sources: tuple[Source, ...] = Field(default=(), description="What each source says for itself, in their order.")
    include_self: Flag = Field(default=False, description="The target as it starts is one more source.")
    fusion: Fusion = _part(Fusion, "How the sources become one teacher.")
    loss: Loss = _part(Loss, "What is minimised.")
    train: Train = _part(Train, "How the target is trained.")

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each source, the start's last where it is one."""
        return (*(one.weight for one in self.sources), *([1.0] if self.include_self else []))

    def check(self) -> None:
        """Raises RecipeError for the first of `problems`."""
        for path, what, fix in self.problems():
            raise RecipeError(what, where=".".join(path), fix=fix)

    def problems(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        """What does not go together: the path of a field, what is wrong with it, and what to do."""
        if not any(self.weights):
            yield ("sources",), "all weights are 0", "Change a weight."
        if self.fusion.function != "max_confidence":
            return
        if any(weight != 1 for weight in self.weights):
            yield ("sources",), "`max_confidence` compares how sure sources are, and weighs none", "Leave `weight` out."
        if "average" in self.fusion.model_fields_set:
            yield ("fusion", "average"), "`max_confidence` takes no mean", "Leave it out."

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """Whole models give a whole model."""
        wrong = [one for one in inputs if one != "weight"]
        if wrong:
            raise RecipeError(
                f"{self.name} runs its models, and one is {wrong[0]}",
                fix="Name entries of `models:`, or nodes that give whole models.",
            )
        return "weight"
