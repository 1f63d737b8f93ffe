"""Compiled kernels for merging and for optimizer steps, where the package was built with a C compiler: an option.

``PARETUNE_KERNELS`` chooses, for both: ``eager`` never uses them, ``native`` insists on them, and unset (or ``auto``)
they are used where they are there. Whatever is chosen, the results are the same to the last bit. ``triton`` chooses
`paretune.optim.kernels.triton_step` for optimizer steps; merging has no such kernels and does as for ``auto``.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from ..errors import ArgumentError

VARIABLE = "PARETUNE_KERNELS"
CHOICES = ("auto", "eager", "native", "triton")
_VERSION = 3  # of the functions below; a library that was built from other source is not used
KINDS = {"BF16": 0, "F16": 1, "F32": 2}
ALL, RANDOM, MAGNITUDE = range(3)
TILE, LANES, BLOCK = 512, 64, 1 << 16  # as in numbers.h and vectors.h


class Source(ctypes.Structure):
    """Stored numbers: the address of the first one wanted, and their dtype."""

    _fields_ = [("data", ctypes.c_void_p), ("kind", ctypes.c_int64)]


class Keep(ctypes.Structure):
    """Which entries of a task vector are kept; see ``struct keep``."""

    _fields_ = [
        ("how", ctypes.c_int64),
        ("key", ctypes.c_uint64),
        ("limit", ctypes.c_int64),
        ("threshold", ctypes.c_int64),
        ("tied", ctypes.c_int64),
        ("wanted", ctypes.c_int64),
        ("before", ctypes.c_void_p),
    ]


class Result(ctypes.Structure):
    """How one result is made of the vectors, and where it goes."""

    _fields_ = [
        ("coefficients", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("keep", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("normalize", ctypes.c_int32),
    ]


class Range(ctypes.Structure):
    """What all results of a range have in common."""

    _fields_ = [
        ("sources", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("based", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("election", ctypes.c_int64),
        ("careful", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
    ]


class Adam(ctypes.Structure):
    """The numbers of one group in one optimizer step; see ``struct adam``."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("toward", "keep", "add", "size", "root", "eps")),
        *((name, ctypes.c_float) for name in ("own", "weight", "density", "clip")),
        *((name, ctypes.c_double) for name in ("cautious", "least")),
        ("consensus", ctypes.c_int64),
    ]


class Parameter(ctypes.Structure):
    """A parameter with its state and gradient; see ``struct parameter``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("theta", "low", "mean", "square", "gradient")),
        ("gradient_half", ctypes.c_int64),
        ("n", ctypes.c_int64),
    ]


class Kept(ctypes.Structure):
    """The kept entries of a task vector; see ``struct kept``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("index", "local", "pages", "values")),
        ("count", ctypes.c_int64),
    ]


_POINTER, _NUMBER, _WORD = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32
_FUNCTIONS: dict[str, list[type]] = {
    "paretune_merge": [_POINTER, _POINTER, _NUMBER, _POINTER, _POINTER],
    "paretune_products": [_POINTER, _POINTER],
    "paretune_norms": [_POINTER, _POINTER, _POINTER, _POINTER],
    "paretune_sample": [_POINTER, _POINTER, _NUMBER, _NUMBER, _POINTER],
    "paretune_bracket": [_POINTER, _NUMBER, _WORD, _WORD, _WORD, _POINTER, _POINTER, _NUMBER],
    "paretune_count": [_POINTER, _NUMBER, _WORD, _POINTER],
    "paretune_histogram": [_POINTER, _NUMBER, _NUMBER, _POINTER],
    "paretune_moments": [_POINTER, _POINTER],
    "paretune_add_at": [_POINTER, _POINTER, _POINTER, _NUMBER, _POINTER],
    "paretune_add_masked": [_POINTER, _POINTER, _NUMBER, ctypes.c_uint64, ctypes.c_uint64, _NUMBER, _POINTER],
    "paretune_add_largest": [_POINTER, _POINTER, _NUMBER, _POINTER, _POINTER, _POINTER, _NUMBER],
    "paretune_scale": [_POINTER, ctypes.c_float],
}


def chosen() -> str:
    """What ``PARETUNE_KERNELS`` asks for.

    Raises:
        ArgumentError: it is none of its values.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted == "compile":
        raise ArgumentError(VARIABLE, wanted, "torch.compile was slower than the C kernels here: unset it")
    if wanted not in CHOICES:
        raise ArgumentError(VARIABLE, wanted, f"choose one of {', '.join(CHOICES)}")
    return wanted


def kernels() -> ctypes.CDLL | None:
    """The library, or None where numpy does the work.

    Raises:
        ArgumentError: ``PARETUNE_KERNELS`` is none of its values, or demands a library that is not there.
    """
    wanted = chosen()
    if wanted == "eager":
        return None
    found = _loaded()
    if found is None and wanted == "native":
        raise ArgumentError(
            VARIABLE, wanted, "the kernels were not built: install a C compiler and paretune again, or unset it"
        )
    return found


@cache
def _loaded() -> ctypes.CDLL | None:
    # An extension module by name, so that pip builds and places it; there is nothing in it for Python to import.
    for suffix in EXTENSION_SUFFIXES:
        file = Path(__file__).with_name(f"_kernels{suffix}")
        if not file.is_file():
            continue
        try:
            library = ctypes.CDLL(str(file))
            library.paretune_kernels_version.restype = ctypes.c_int64
            if library.paretune_kernels_version() != _VERSION:
                return None
            for name, arguments in _FUNCTIONS.items():
                if not hasattr(library, name):
                    setattr(library, name, library[f"{name}.ifunc"])  # as clang before 18 calls them
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, None
            library.paretune_bracket.restype = ctypes.c_uint32
            library.paretune_fuses.restype = ctypes.c_int64
        except (OSError, AttributeError):  # built for another machine, or from other source
            return None
        return library
    return None
