"""Stage ops, and those that collect statistics of a model on data: their parameters, and no mathematics.

What they name is done by the runners in `mergeflow.stages`, since it needs a model that runs; recipes, plans and cache keys
need only what stands here. A later merge reads the statistics without the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import Field, Strict

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Block, Op, Space
from mergeflow.settings import Count

if TYPE_CHECKING:
    from torch import Tensor

Times = Annotated[int, Strict(), Field(ge=1, le=2**31 - 1)]

GramCodec = Literal["correlation16", "correlation8", "packed32", "float32", "diagonal"]
Accumulate = Literal["float32", "float64"]
Estimator = Literal["expected", "empirical", "sampled", "batch_hard", "batch_sqrt"]


def collector_of(key: str) -> str:
    """The name of the op that collects what an input names by this key."""
    return "fisher_diag" if key == "fisher" else key


class StageOp(Op):
    """An op that runs models on data before any tensor is merged; its result lies in the cache."""

    portable = False
    needs_data: ClassVar[bool] = True
    """Whether each model must have an entry of `data:` beside it."""
    seeded: ClassVar[bool] = True
    """Whether a seed may change the result."""

    batch_size: Times = Field(default=8, description="Examples that run through the model together.")
    max_length: Times | None = Field(
        default=None,
        description="Tokens of a text that count; the rest is cut, and in `fuse` with `task: causal_lm` a document of its own. "
        "Default: the model's whole context.",
    )

    @property
    def deciding(self) -> dict[str, Any]:
        """All parameters that decide the result, as plain data."""
        return self.model_dump(mode="json")

    def compute(self, inputs: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: a stage runs models, not tensors."""
        raise TypeError(f"{self.name} is a stage, run by mergeflow.stages")


class StatisticsOp(StageOp):
    """A stage that collects statistics of one model, which are an artifact."""

    takes = "model"
    most = 1

    kind: ClassVar[Literal["gram", "gram_diag", "input_mean", "act_absmean", "fisher_diag"]]
    """What `statistics.json` calls the result."""

    min_tokens: Count = Field(
        default=0,
        description="Refuse to write statistics of fewer tokens (for images and features: rows) than this.",
    )

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """A model's weights give statistics."""
        if tuple(inputs) != ("weight",):
            raise RecipeError(
                f"{self.name} runs a model, and got {', '.join(inputs) or 'nothing'}",
                fix="Name an entry of `models:`, or a node that gives a whole model.",
            )
        return "statistics"


class _OfInputs(StatisticsOp):
    """A statistic of what the linear layers read."""

    accumulate: Accumulate = Field(
        default="float32", description="The dtype in which the running mean over tokens is kept; stored as float32."
    )


class Gram(_OfInputs):
    """Collect the second moments of what each linear layer reads.

    G = E[x x^T] over tokens, a (d, d) matrix for an input of d channels, as a running mean in a fixed order of batches; padding
    never counts. Layers that read the same tensor share one matrix, named after the first of them. For `nn.Linear`, GPT-2's
    `Conv1D`, `nn.Conv2d` (over its unfolded patches: d = channels x kernel height x kernel width), and each expert of a mixture
    over the tokens routed to it.

    With fewer tokens than dimensions a Gram exposes the space that the inputs span: `min_tokens` refuses to write it.
    Raises InputError for data or a model that cannot be used, NumericError where over 0.1% of batches have a NaN or Inf.
    """

    name = "gram"
    formula = "E[x x^T]"
    paper = "arXiv:2212.09849"
    kind = "gram"

    codec: GramCodec = Field(
        default="correlation16",
        description="How a matrix is stored: float16 or int8 correlations with a float32 diagonal, the packed triangle in "
        "float32, all of it in float32, or the diagonal alone.",
    )


class GramDiag(_OfInputs):
    """Collect the mean square of each channel that a linear layer reads.

    E[x_c^2] over tokens, a vector of d for each distinct input, as the diagonal of what `gram` collects.
    """

    name = "gram_diag"
    formula = "E[x_c^2]"
    paper = "arXiv:2212.09849"
    kind = "gram_diag"


class InputMean(_OfInputs):
    """Collect the mean of what each linear layer reads.

    E[x_c] over tokens, a vector of d for each distinct input, under the same rules as `gram`.
    """

    name = "input_mean"
    formula = "E[x_c]"
    kind = "input_mean"


class ActAbsmean(_OfInputs):
    """Collect the mean absolute value of each channel that a linear layer reads.

    E[abs(x_c)] over tokens, a vector of d for each distinct input, under the same rules as `gram`.
    """

    name = "act_absmean"
    formula = "E[abs(x_c)]"
    paper = "arXiv:2502.02421"
    kind = "act_absmean"


class FisherDiag(StatisticsOp):
    """Collect the diagonal of the Fisher information of each parameter.

    F = 1/N sum_x sum_c p(c|x) (d log p(c|x) / d theta)^2 over the N examples x and all classes c with `expected`; over the labels
    of the data alone with `empirical`; over `samples` labels drawn from p(c|x) with `sampled`. Squares are of each example's own
    gradient; an example is one document, and its log-probability the sum over its tokens. One tensor in the shape of each
    floating parameter, stored as the raw mean in float32.

    `batch_hard` and `batch_sqrt` square a gradient summed over a batch, which is no Fisher information; they are here to
    compare with papers that used them. `expected` needs a pass for each class, and is refused for more than 32.
    """

    name = "fisher_diag"
    formula = "E_x E_{c ~ p(c|x)} [(d log p(c|x) / d theta)^2]"
    paper = "arXiv:2111.09832"
    kind = "fisher_diag"

    estimator: Estimator = Field(default="expected", description="Which labels the gradient is of.")
    samples: Times = Field(default=1, description="Labels drawn for each example (or token), with `sampled`.")
