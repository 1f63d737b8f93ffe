"""accelerate's own FSDP2 on the CPU, for the rank processes of tests.

accelerate ignores FSDP there, so its state is told to be in FSDP; what it then does is its own code.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn


def shard_on_the_cpu(**options: Any) -> None:
    """From now on every ``Accelerator`` of this process shards, layer by layer."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    initialise = AcceleratorState.__init__
    policy = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}

    def sharding(self: Any, *given: Any, **more: Any) -> None:
        initialise(self, *given, **more)  # of state that all of them share
        if getattr(self, "fsdp_plugin", None) is None:
            self.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **{**policy, **options})
        self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = sharding


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters, gathered; all of them must be sharded."""
    from torch.distributed.tensor import DTensor

    parameters = dict(model.named_parameters())
    assert parameters
    assert all(isinstance(p, DTensor) for p in parameters.values())
    return {name: p.full_tensor().detach().clone() for name, p in parameters.items()}  # type: ignore[attr-defined]
