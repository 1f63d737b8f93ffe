"""Which arithmetic an optimizer step uses, chosen by ``PARETUNE_KERNELS`` as for merging (`paretune.native`).

The eager form is always there and is the definition; the compiled one gives its bits and is used where it was built.
"""

from __future__ import annotations

from ...native import kernels
from .step import Compiled

__all__ = ["Compiled", "compiled"]


def compiled() -> Compiled | None:
    """The compiled kernels, or None where torch's operations do the work.

    Raises:
        ArgumentError: ``PARETUNE_KERNELS`` is none of its values, or demands kernels that are not there.
    """
    library = kernels()
    # without the instruction the kernels would be slow, and torch rounds differently there
    return Compiled(library) if library is not None and library.paretune_fuses() else None
