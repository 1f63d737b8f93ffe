"""Tasks that lm-evaluation-harness lacks, or has only with a hub: what each reads, asks and counts as right."""

from . import numbers, plain, programs, reading, scripts, structured
from .kind import Kind, Row

KINDS: dict[str, Kind] = {
    kind.name: kind for module in (numbers, reading, structured, scripts, programs, plain) for kind in module.KINDS
}

__all__ = ["KINDS", "Kind", "Row"]
