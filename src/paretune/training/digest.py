"""What identifies a model's weights, wherever they lie."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from paretune.checkpoint import Checkpoint

_SAMPLES = 256  # elements of each tensor


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of names, shapes, dtypes and up to 256 evenly spread values of each tensor.

    Args:
        checkpoint: opened; only the sampled places are read.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> from paretune.checkpoint import Checkpoint
        >>> folder = tempfile.mkdtemp()
        >>> safetensors.torch.save_file({"w": torch.ones(2)}, f"{folder}/model.safetensors")
        >>> len(checkpoint_fingerprint(Checkpoint(folder)))
        32
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint):
        info = checkpoint[name]
        flat = checkpoint.flat(name)
        count = min(_SAMPLES, flat.numel())
        places = torch.arange(count) * flat.numel() // max(1, count)
        digest.update(f"{name}{tuple(info.shape)}{info.dtype}".encode())
        digest.update(flat[places].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
