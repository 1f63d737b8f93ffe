"""Several ranks on one machine: gloo over loopback."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(function: Callable[..., None], ranks: int, *args: Any) -> None:
    """Runs ``function(rank, *args)`` on each rank; an error on any rank is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(ranks, port, function, args), nprocs=ranks)


def _rank(rank: int, ranks: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    # torch's own threads may outlive its static objects at exit, which then aborts a process that has succeeded.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
