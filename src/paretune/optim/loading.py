"""Filling a sharded model from a checkpoint: every rank reads its own rows."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..errors import MismatchError, examples
from ..task_vector import plain_name
from .parts import local, part_of


@torch.no_grad()
def load_sharded(
    model: nn.Module, source: str | os.PathLike[str], device: torch.device | str | None = None
) -> nn.Module:
    """Give a model's parameters the values of a checkpoint, of which each rank reads its own part only.

    Made for a model that was built on the meta device and sharded (FSDP2's ``fully_shard``, tensor parallelism): no
    rank ever holds more than its share. A model that is whole, or has memory already, is filled as well.

    Args:
        model: parameters on the meta device get memory; buffers that have values keep them, so build the model with
            ``accelerate.init_empty_weights(include_buffers=False)``.
        source: a directory or file of safetensors, or a hub id; values are cast to the parameters' dtypes.
        device: for parameters on the meta device; the mesh's by default, else the CPU.

    Returns:
        The model.

    Raises:
        MismatchError: the checkpoint lacks a parameter or has another shape of it.

    Example:
        >>> import tempfile, safetensors.torch
        >>> folder = tempfile.mkdtemp()
        >>> safetensors.torch.save_file({"weight": torch.ones(2, 3)}, f"{folder}/model.safetensors")
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(3, 2, bias=False)
        >>> load_sharded(model, folder).weight.sum().item()
        6.0
    """
    checkpoint = Checkpoint(source)
    shapes = {name: (plain_name(name), tuple(p.shape)) for name, p in model.named_parameters()}
    wrong = [key for key, shape in shapes.values() if key not in checkpoint or checkpoint[key].shape != shape]
    if wrong:
        raise MismatchError(f"{source} lacks these parameters or has other shapes of them: {examples(wrong)}")
    if any(p.is_meta for p in model.parameters()):
        mesh = next((getattr(p, "device_mesh", None) for p in model.parameters()), None)
        place = device if device is not None else "cpu" if mesh is None else mesh.device_type
        kept = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
        model.to_empty(device=place)
        for name, buffer in model.named_buffers():
            if name in kept:
                buffer.copy_(kept[name])
    for name, p in model.named_parameters():
        flat, mine = checkpoint.flat(shapes[name][0]), local(p.detach())
        mine.copy_(part_of(name, p).cut(lambda i, j, flat=flat: flat[i:j]).view(mine.shape))  # type: ignore[misc]
    return model
