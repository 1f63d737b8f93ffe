"""Optimizers: online merging (OnDARE, OnTIES, OnlineMerging) and the baselines they are judged against."""

from .merging import OnlineMerging
from .online import OnDARE, OnTIES

__all__ = ["OnDARE", "OnTIES", "OnlineMerging"]
