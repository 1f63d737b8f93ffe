"""Averages of aligned and reference model: part-wise and adaptive ratios, the Fisher gate, the dial."""

from __future__ import annotations

from .collect import collect_best_of_n
from .learn import learn_ratios
from .ratios import Block, Ratios

__all__ = ["Block", "Ratios", "collect_best_of_n", "learn_ratios"]
