"""Which arithmetic an optimizer step uses, chosen by ``PARETUNE_KERNELS`` as for merging (`paretune.native`).

The eager form is always there and is the definition. The compiled one gives its bits and is used where it was built, on
the CPU. Triton's is used where ``PARETUNE_KERNELS=triton`` asks for it: it was checked in Triton's interpreter only.
"""

from __future__ import annotations

import os

from ...errors import ArgumentError
from ...native import VARIABLE, chosen, kernels
from .base import Kernels
from .step import Compiled

__all__ = ["Compiled", "Kernels", "compiled"]


def compiled() -> Kernels | None:
    """The compiled kernels, or None where torch's operations do the work.

    Raises:
        ArgumentError: ``PARETUNE_KERNELS`` is none of its values, or demands kernels that are not there.
    """
    if chosen() == "triton":
        return _triton()
    library = kernels()
    # without the instruction the kernels would be slow, and torch rounds differently there
    return Compiled(library) if library is not None and library.paretune_fuses() else None


def _triton() -> Kernels:
    import torch

    try:
        from .triton_step import Triton
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        mend = "Triton is not installed: pip install triton (torch's CUDA builds bring it), or unset it"
        raise ArgumentError(VARIABLE, "triton", mend) from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Triton("cpu")
    if not torch.cuda.is_available():
        raise ArgumentError(VARIABLE, "triton", "there is no CUDA device: unset it")
    return Triton("cuda")
