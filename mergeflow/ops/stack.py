"""`stack`: a model whose layers come from several, renumbered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from pydantic import Field

from mergeflow.ops.base import Block, Op
from mergeflow.settings import Number, PerInput, setting

if TYPE_CHECKING:
    from torch import Tensor


class Stack(Op):
    """Stack layers of several models into one, renumbered from 0.

    `layers` says which layers come from which model or node, in order, both ends included: `{model: a, take: "0-15"}`. A
    model may come twice. Every tensor of a taken layer comes along as it is, bit for bit and whatever its dtype, or times
    the entry's `scale`. Names are those of the output, so rules and gradients see its numbers. config.json's layer count
    and per-layer lists follow the layers.

    What is outside the blocks: what stands before them comes from the first entry's model, what stands after them from the
    last's, or all of it from `rest: {model: a}`. Names say which is which, since files keep no order: before the blocks are
    embeddings, position, patch and class tokens, what is called a stem or a norm before the layers, the encoder where the
    decoder is stacked, and towers of images or sound where the language model is. After them is everything else: the last
    norm, heads, poolers, and the decoder where the encoder is stacked. Where a model has several numbered stacks, `blocks`
    names the one to stack by its prefix (`encoder.block`), and the others belong to what is outside. A tied head is the
    embedding, and so the first's.

    A tensor that the first layer of a stack has beyond all others (T5's relative positions) speaks for the whole stack: it
    stands in layer 0 of the output, and is left out where its layer goes elsewhere; it is the first layer's own, or else
    comes from where the embeddings do.

    Layers that do not exist, that lack or add tensors, or have other shapes are errors, and so is a `scale` other than 1
    on integer and boolean tensors.
    """

    name = "stack"
    formula = "theta_i(layer), renumbered"
    takes = "layers"

    scale: PerInput[Number] = setting(1.0, "Multiplies an entry's tensors.")
    blocks: str | None = Field(
        default=None, description="The prefix of the stack, where a model has several: encoder.block."
    )

    def compute(self, inputs: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: planning puts the tensors of the taken layers in the place of the op."""
        raise TypeError("stack chooses tensors when it is planned and computes nothing")
