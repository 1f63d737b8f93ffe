"""A parameter as flat float32 numbers, whatever its dtype: where updates are added.

float32 and float64 parameters are written in place. A bfloat16 parameter keeps the 16 bits that bfloat16 lacks in an
int16 tensor beside it (a split float32 master, 2 bytes a parameter): an update far below half an ulp is not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import ArgumentError
from .parts import local

At: TypeAlias = "slice | Tensor"
MASTER = "master_low"  # the state's key of the low halves
CHUNK = 1 << 19  # elements handled at a time in dense passes: bounds the scratch memory


class Weights:
    """The elements of one parameter, read and written as float32 (float64 for float64 parameters).

    Args:
        parameter: float32, float64 or bfloat16.
        low: the low halves of the float32 master of a bfloat16 parameter (int16, flat); None for others.
    """

    def __init__(self, parameter: Tensor, low: Tensor | None = None) -> None:
        self.parameter = parameter
        self.contiguous = parameter.is_contiguous()
        self.flat = parameter.detach().reshape(-1)  # a copy where not contiguous: see `finish`
        self.low = low
        self.n = self.flat.numel()

    def get(self, at: At) -> Tensor:
        """The values at a slice or at positions. May share memory with the parameter."""
        if self.low is None:
            return self.flat[at]
        return join(self.flat[at], self.low[at])

    def put(self, at: At, values: Tensor) -> None:
        """Set the values at a slice or at positions."""
        if self.low is None:
            self.flat[at] = values
        else:
            self.flat[at], self.low[at] = split(values)

    def add_at(self, index: Tensor, values: Tensor) -> None:
        """θ_i ← θ_i + x_i at unique positions."""
        if self.low is None:
            self.flat.index_add_(0, index, values)
        else:
            self.put(index, self.get(index) + values)

    def add(self, values: Tensor, start: int = 0) -> None:
        """θ ← θ + x for the elements from ``start`` on."""
        self._blockwise(start, start + values.numel(), lambda block, i, j: block.add_(values[i - start : j - start]))

    def scale(self, factor: float) -> None:
        """θ ← factor·θ."""
        self._blockwise(0, self.n, lambda block, i, j: block.mul_(factor))

    def finish(self) -> None:
        """Write a copy back; nothing to do where the parameter is contiguous."""
        if not self.contiguous:
            self.parameter.copy_(self.flat.view(self.parameter.shape))

    def _blockwise(self, start: int, stop: int, change: Callable[[Tensor, int, int], object]) -> None:
        if self.low is None:
            change(self.flat[start:stop], start, stop)
            return
        for i in range(start, stop, CHUNK):
            at = slice(i, min(stop, i + CHUNK))
            block = self.get(at)
            change(block, at.start, at.stop)
            self.put(at, block)


def weights_of(parameter: Tensor, low: Tensor | None) -> Weights:
    """This rank's elements of a parameter; ``low`` in the parameter's shape, or None."""
    return Weights(local(parameter.detach()), None if low is None else local(low).view(-1))


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers whose upper halves are bfloat16 ``high`` and whose lower halves are int16 ``low``."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 (rounded to nearest, halves away from zero) and the int16 rest: ``join`` gives the numbers back exactly.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0000001, -3.14159])
        >>> torch.equal(join(*split(x)), x)
        True
    """
    # a NaN with a full payload would round over into -0
    bits = torch.where(values.isnan(), torch.nan, values).view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as state dicts hold it: the low halves under bfloat16's name, bit for bit.

    No backend gathers 16-bit integers, as a whole (not sharded) state dict of sharded parameters must; bfloat16 numbers
    are gathered and copied without being looked at. And torch, which casts state to its parameter's dtype when it
    loads, has nothing to cast.
    """
    return {key: _seen_as(value, torch.bfloat16) if key == MASTER else value for key, value in state.items()}


def loaded(key: str, value: Tensor) -> Tensor:
    """The reverse of `saved` for one entry."""
    return _seen_as(value, torch.int16) if key == MASTER else value


def _seen_as(value: Tensor, dtype: torch.dtype) -> Tensor:
    if not hasattr(value, "device_mesh"):
        return value.view(dtype)
    from torch.distributed.tensor import DTensor

    whole: Any = value
    return DTensor.from_local(
        whole.to_local().view(dtype), whole.device_mesh, whole.placements, run_check=False, shape=whole.shape,
        stride=whole.stride(),
    )  # fmt: skip


def require_supported(name: str, parameter: Tensor) -> None:
    """Refuse parameters that cannot be updated exactly.

    Raises:
        ArgumentError: float16 (its master would not split in halves), complex or integer parameters; ZeRO-3's.
    """
    if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ArgumentError(
            name, parameter.dtype, "parameters must be float32, bfloat16 or float64: load the model with dtype=bfloat16"
        )
    if hasattr(parameter, "ds_id"):
        raise ArgumentError(name, "DeepSpeed ZeRO-3", "its parameters cannot be updated from outside: use FSDP2")
