"""What ranks must agree on: sums and means of a few numbers. In one process all of it is free."""

from __future__ import annotations

import torch
from torch import Tensor


def world_size() -> int:
    """How many ranks train together."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """This process among them."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without a gradient; the tensor itself where there is one rank."""
    if world_size() == 1:
        return value.detach()
    # NCCL reduces tensors of its own devices only.
    on_device = torch.distributed.get_backend() == "nccl" and not value.is_cuda
    total = value.detach().cuda() if on_device else value.detach().clone()
    torch.distributed.all_reduce(total)
    return total.to(value.device)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, without a gradient."""
    return sum_over_ranks(value) / world_size() if world_size() > 1 else value.detach()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
