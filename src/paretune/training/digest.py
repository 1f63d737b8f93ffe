"""What identifies a model's weights, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from paretune.checkpoint import Checkpoint

_SAMPLES = 256  # elements of each tensor
_WITHOUT_INFLUENCE = ("_name_or_path", "name_or_path", "transformers_version", "use_cache", "architectures", "dtype")


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


def model_fingerprint(model: nn.Module, *, leave_out: str | None = None) -> str:
    """A hash of every bit of a model's parameters and buffers, with their names, and of its configuration.

    Args:
        model: in memory; only its own names count, not where it came from.
        leave_out: tensors with this text in their name are not part of it.

    Example:
        >>> one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> model_fingerprint(one) == model_fingerprint(other)
        False
    """
    digest = hashlib.sha256(config_text(getattr(model, "config", None)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if leave_out is not None and leave_out in name:
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def config_text(config: Any) -> str:
    """A model's configuration without what has no influence on its numbers."""
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {name: value for name, value in values.items() if name not in _WITHOUT_INFLUENCE}
    return json.dumps(kept, sort_keys=True, default=str)
