"""paretune: align language models without the alignment tax."""

from __future__ import annotations

from .operators import METHODS, Magnitude, Random, SignElection, WeightedSum
from .optim import OnDARE, OnlineMerging, OnTIES
from .task_vector import TaskVector

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Magnitude",
    "OnDARE",
    "OnTIES",
    "OnlineMerging",
    "Random",
    "SignElection",
    "TaskVector",
    "WeightedSum",
]
