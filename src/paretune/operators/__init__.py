"""Sparsify and consensus: the two operators that offline merging and online optimizers share."""

from .consensus import Consensus, SignElection, WeightedSum
from .masks import SPARSE_LIMIT, bernoulli_mask, mask_key, sampled_indices, sampled_indices_of
from .methods import METHODS, Method
from .sparsify import Magnitude, Random, Source, Sparsify, above, kept, largest, largest_streamed, magnitude_keys

__all__ = [
    "METHODS",
    "SPARSE_LIMIT",
    "Consensus",
    "Magnitude",
    "Method",
    "Random",
    "SignElection",
    "Source",
    "Sparsify",
    "WeightedSum",
    "above",
    "bernoulli_mask",
    "kept",
    "largest",
    "largest_streamed",
    "magnitude_keys",
    "mask_key",
    "sampled_indices",
    "sampled_indices_of",
]
