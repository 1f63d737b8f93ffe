"""paretune: align language models without the alignment tax.

Every name is imported when it is first used: ``import paretune`` costs nothing, the optimizers cost torch, and only
``attach`` and the callbacks cost transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        ArgumentError,
        CheckpointError,
        DataError,
        MismatchError,
        MissingExtraError,
        PareTuneError,
        StateError,
    )
    from .operators import METHODS, Magnitude, Random, SignElection, WeightedSum
    from .optim import OnDARE, OnlineMerging, OnTIES
    from .optim.anchor import Anchor
    from .optim.child_tuning import ChildTuning
    from .optim.ema import EMA
    from .optim.fisher import fisher_information
    from .task_vector import TaskVector
    from .training.callbacks import EMACallback
    from .training.trainer import attach

__version__ = "0.1.0"

_HOMES = {
    "errors": (
        "ArgumentError",
        "CheckpointError",
        "DataError",
        "MismatchError",
        "MissingExtraError",
        "PareTuneError",
        "StateError",
    ),
    "operators": ("METHODS", "Magnitude", "Random", "SignElection", "WeightedSum"),
    "optim": ("OnDARE", "OnTIES", "OnlineMerging"),
    "optim.anchor": ("Anchor",),
    "optim.child_tuning": ("ChildTuning",),
    "optim.ema": ("EMA",),
    "optim.fisher": ("fisher_information",),
    "task_vector": ("TaskVector",),
    "training.callbacks": ("EMACallback",),
    "training.trainer": ("attach",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Anchor",
    "ArgumentError",
    "CheckpointError",
    "ChildTuning",
    "DataError",
    "EMA",
    "EMACallback",
    "METHODS",
    "Magnitude",
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
