"""Sparsify and consensus: the two operators that offline merging and online optimizers share."""

from .consensus import Consensus, SignElection, WeightedSum
from .masks import SPARSE_LIMIT, bernoulli_mask, mask_key, sampled_indices
from .methods import METHODS, Method
from .sparsify import Magnitude, Random, Sparsify, kept, largest, largest_streamed

__all__ = [
    "METHODS",
    "SPARSE_LIMIT",
    "Consensus",
    "Magnitude",
    "Method",
    "Random",
    "SignElection",
    "Sparsify",
    "WeightedSum",
    "bernoulli_mask",
    "kept",
    "largest",
    "largest_streamed",
    "mask_key",
    "sampled_indices",
]
