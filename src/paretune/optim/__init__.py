"""Optimizers: online merging (OnDARE, OnTIES, OnlineMerging) and the baselines they are judged against."""

from .anchor import Anchor
from .child_tuning import ChildTuning
from .ema import EMA
from .fisher import fisher_information
from .galore import GaLoreAdamW
from .loading import load_sharded
from .lora import LoRAMerging
from .merging import OnlineMerging
from .online import OnDARE, OnTIES

__all__ = [
    "EMA",
    "Anchor",
    "ChildTuning",
    "GaLoreAdamW",
    "LoRAMerging",
    "OnDARE",
    "OnTIES",
    "OnlineMerging",
    "fisher_information",
    "load_sharded",
]
