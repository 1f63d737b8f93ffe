"""paretune: align language models without the alignment tax.

Three points in weight space (base, reference, policy), task vectors between them, and two operators (sparsify,
consensus) that serve offline merging and online optimizers alike.

Every name is imported when it is first used: ``import paretune`` costs nothing, the optimizers cost torch, and only
``attach`` and the callbacks cost transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .errors import (
        ArgumentError,
        CheckpointError,
        DataError,
        MismatchError,
        MissingExtraError,
        PareTuneError,
        StateError,
    )
    from .merging import LiveMerge, MergeReport, merge
    from .operators import METHODS, Magnitude, Random, SignElection, WeightedSum
    from .optim import EMA, Anchor, ChildTuning, OnDARE, OnlineMerging, OnTIES, fisher_information
    from .task_vector import TaskVector
    from .training.callbacks import EMACallback
    from .training.trainer import attach

__version__ = "0.1.0"

_HOMES = {
    "checkpoint": ("Checkpoint",),
    "errors": (
        "ArgumentError",
        "CheckpointError",
        "DataError",
        "MismatchError",
        "MissingExtraError",
        "PareTuneError",
        "StateError",
    ),
    "merging": ("LiveMerge", "MergeReport", "merge"),
    "operators": ("METHODS", "Magnitude", "Random", "SignElection", "WeightedSum"),
    "optim": ("Anchor", "ChildTuning", "EMA", "OnDARE", "OnTIES", "OnlineMerging", "fisher_information"),
    "task_vector": ("TaskVector",),
    "training.callbacks": ("EMACallback",),
    "training.trainer": ("attach",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Anchor",
    "ArgumentError",
    "Checkpoint",
    "CheckpointError",
    "ChildTuning",
    "DataError",
    "EMA",
    "EMACallback",
    "LiveMerge",
    "METHODS",
    "Magnitude",
    "MergeReport",
    "MismatchError",
    "MissingExtraError",
    "OnDARE",
    "OnTIES",
    "OnlineMerging",
    "PareTuneError",
    "Random",
    "SignElection",
    "StateError",
    "TaskVector",
    "WeightedSum",
    "attach",
    "fisher_information",
    "merge",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
