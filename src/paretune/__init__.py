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
    from .averaging import Ratios, collect_best_of_n, learn_ratios
    from .averaging.dial import dial
    from .averaging.fisher_gate import Gate, fisher_gate
    from .averaging.own_samples import own_samples
    from .checkpoint import Checkpoint
    from .errors import (
        ArgumentError,
        CheckpointError,
        DataError,
        EndpointError,
        MismatchError,
        MissingExtraError,
        PareTuneError,
        StateError,
    )
    from .evaluation.frontier import Frontier
    from .evaluation.points import Measurement, read_points, write_points
    from .generation import Decoding, Endpoint, Generation, generate
    from .merging import LiveMerge, MergeReport, merge
    from .operators import METHODS, Magnitude, Random, SignElection, WeightedSum
    from .optim import (
        EMA,
        Anchor,
        ChildTuning,
        GaLoreAdamW,
        LoRAMerging,
        OnDARE,
        OnlineMerging,
        OnTIES,
        fisher_information,
        load_sharded,
    )
    from .task_vector import TaskVector
    from .training.callbacks import EMACallback
    from .training.distill import Distill
    from .training.joint import JointTrainer
    from .training.objectives import DPO, KTO, SFT, Objective, Setup
    from .training.rehearsal import Leakage, SelfPrompts, self_answers, self_prompts
    from .training.schedules import Alright, MaxRight, Mix, Schedule, Sequential
    from .training.stall import StallWarning
    from .training.tax_probe import TaxProbe
    from .training.trainer import attach

__version__ = "0.1.0"

_HOMES = {
    "averaging": ("Ratios", "collect_best_of_n", "learn_ratios"),
    "averaging.dial": ("dial",),
    "averaging.fisher_gate": ("Gate", "fisher_gate"),
    "averaging.own_samples": ("own_samples",),
    "checkpoint": ("Checkpoint",),
    "errors": (
        "ArgumentError",
        "CheckpointError",
        "DataError",
        "EndpointError",
        "MismatchError",
        "MissingExtraError",
        "PareTuneError",
        "StateError",
    ),
    "evaluation.frontier": ("Frontier",),
    "evaluation.points": ("Measurement", "read_points", "write_points"),
    "generation": ("Decoding", "Endpoint", "Generation", "generate"),
    "merging": ("LiveMerge", "MergeReport", "merge"),
    "operators": ("METHODS", "Magnitude", "Random", "SignElection", "WeightedSum"),
    "optim": (
        "Anchor",
        "ChildTuning",
        "EMA",
        "GaLoreAdamW",
        "LoRAMerging",
        "OnDARE",
        "OnTIES",
        "OnlineMerging",
        "fisher_information",
        "load_sharded",
    ),
    "task_vector": ("TaskVector",),
    "training.callbacks": ("EMACallback",),
    "training.distill": ("Distill",),
    "training.joint": ("JointTrainer",),
    "training.objectives": ("DPO", "KTO", "Objective", "SFT", "Setup"),
    "training.rehearsal": ("Leakage", "SelfPrompts", "self_answers", "self_prompts"),
    "training.schedules": ("Alright", "MaxRight", "Mix", "Schedule", "Sequential"),
    "training.stall": ("StallWarning",),
    "training.tax_probe": ("TaxProbe",),
    "training.trainer": ("attach",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Alright",
    "Anchor",
    "ArgumentError",
    "Checkpoint",
    "CheckpointError",
    "ChildTuning",
    "DPO",
    "DataError",
    "Decoding",
    "Distill",
    "EMA",
    "EMACallback",
    "Endpoint",
    "EndpointError",
    "Frontier",
    "GaLoreAdamW",
    "Gate",
    "Generation",
    "JointTrainer",
    "KTO",
    "Leakage",
    "LiveMerge",
    "LoRAMerging",
    "METHODS",
    "Magnitude",
    "MaxRight",
    "Measurement",
    "MergeReport",
    "MismatchError",
    "MissingExtraError",
    "Mix",
    "Objective",
    "OnDARE",
    "OnTIES",
    "OnlineMerging",
    "PareTuneError",
    "Random",
    "Ratios",
    "SFT",
    "Schedule",
    "SelfPrompts",
    "Sequential",
    "Setup",
    "SignElection",
    "StallWarning",
    "StateError",
    "TaskVector",
    "TaxProbe",
    "WeightedSum",
    "attach",
    "collect_best_of_n",
    "dial",
    "fisher_gate",
    "fisher_information",
    "generate",
    "learn_ratios",
    "load_sharded",
    "merge",
    "own_samples",
    "read_points",
    "self_answers",
    "self_prompts",
    "write_points",
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
