"""Merging checkpoints on disk: planned from headers, streamed in bounded memory, written atomically."""

from __future__ import annotations

from .api import MergeReport, merge
from .live import LiveMerge
from .methods import METHODS

__all__ = ["METHODS", "LiveMerge", "MergeReport", "merge"]
