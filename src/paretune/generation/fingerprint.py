"""What identifies a model in memory, so that no file of answers confuses two."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from .draws import mix64

_PIECE = 1 << 17  # 8-byte words: stays in the cache
# How a model was made or stored, not what it computes.
_NOT_CONTENT = ("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype")


def model_fingerprint(model: Any) -> str:
    """A hash of every weight, of their names, of the configuration, and of which adapters are on and how strongly.

    All bytes are read, because a sparse optimizer may have moved a few entries in a million.

    Args:
        model: any module; its ``config``, where it has one, enters without its path and versions.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = model_fingerprint(layer)
        >>> layer.weight.data[0, 0] += 1
        >>> before == model_fingerprint(layer)
        False
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        content = {k: v for k, v in config.to_dict().items() if k not in _NOT_CONTENT}
        digest.update(json.dumps(content, sort_keys=True, default=repr).encode())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_sums(tensor.detach()).numpy().tobytes())
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):  # PEFT's layers: what is switched on
            digest.update(f"{name} {module.active_adapters} {module.disable_adapters} {module.scaling}".encode())
    return digest.hexdigest()[:32]


def _sums(tensor: Tensor) -> Tensor:
    """Σ wᵢ·xᵢ modulo 2^64 of each piece, with x the content as 8-byte words and w fixed odd pseudo-random numbers.

    A universal hash: a change goes unseen with a chance of about 2^-60. It runs where the tensor is, several times as
    fast as a cryptographic one.
    """
    content = tensor.reshape(-1).contiguous().view(torch.uint8)
    rest = -len(content) % 8
    if rest or content.data_ptr() % 8:
        content = torch.cat([content, content.new_zeros(rest)])
    words = content.view(torch.int64)
    weights = mix64(torch.arange(min(_PIECE, len(words)), device=words.device)) | 1
    pieces = [words[start : start + _PIECE] for start in range(0, len(words), _PIECE)]
    sums = [(piece * weights[: len(piece)]).sum() for piece in pieces]
    return torch.stack(sums).cpu() if sums else torch.empty(0, dtype=torch.int64)
