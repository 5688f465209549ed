"""How well sources predict documents -> how much each counts as their teacher (MinCE and AvgCE of FuseLLM, arXiv:2401.10491).

Sources with different tokenizers are compared by bits per byte. Per token a finer tokenizer looks better than it is, since each of
its tokens says less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mergeflow.stages.fuse.capturing import Captured

Metric = Literal["bits_per_byte", "token_cross_entropy"]
Function = Literal["min", "max", "avg", "avg_fusellm", "static"]
Floats = NDArray[np.float64]


def score(captured: Captured, metric: Metric = "bits_per_byte") -> tuple[Floats, Floats]:
    """(documents,) each: what a source's prediction costs, and over how much text.

    Bits over bytes, or nats over tokens; the sums of several documents give the rate of a block of them.
    """
    if metric == "bits_per_byte":
        return captured.nll / math.log(2), captured.bytes.astype(np.float64)
    return captured.nll, captured.tokens.astype(np.float64)


def rate(sums: Floats, units: Floats) -> Floats:
    """Cost by unit; inf where nothing was predicted, so that such a source is the last to be chosen."""
    return np.where(units > 0, sums / np.maximum(units, 1), np.inf)


def choose(
    scores: Floats, function: Function, temperature: float = 1.0, weights: Sequence[float] | None = None
) -> Floats:
    """(sources, documents) scores, lower is better -> (sources, documents) shares, which sum to 1 over the sources.

    min: the best source alone, of equal ones the first; max: the worst. avg: softmax(-score / temperature) over sources;
    avg_fusellm: softmax(exp(-score)), as released with the paper, nearly uniform. static: the given weights.
    """
    count = scores.shape[1]
    if function in ("min", "max"):
        best = scores.argmin(axis=0) if function == "min" else scores.argmax(axis=0)
        found = np.zeros_like(scores)
        found[best, np.arange(count)] = 1
        return found
    if function == "static":
        given = np.ones(len(scores)) if weights is None else np.array(weights, dtype=np.float64)
        return np.repeat((given / given.sum())[:, None], count, axis=1)
    # Where no source predicts anything all are alike.
    known = np.where(np.isinf(scores).all(axis=0), 0.0, scores)
    given = np.exp(-known) if function == "avg_fusellm" else -known / temperature
    raised = np.exp(given - given.max(axis=0))
    shares: Floats = raised / raised.sum(axis=0)
    return shares
