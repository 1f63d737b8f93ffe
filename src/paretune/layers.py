"""Where a tensor belongs in a model, read off its name: layer, stack and part, for any architecture."""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_FIRST_WORDS = ("emb", "wte", "wpe")  # in the names of tensors that come before the layers


def layer_of(name: str) -> int | None:
    """The layer that a tensor's name counts: its first whole number.

    Example:
        >>> layer_of("model.layers.3.mlp.experts.5.w1.weight"), layer_of("lm_head.weight")
        (3, None)
    """
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def stack_of(name: str) -> str | None:
    """What comes before a name's layer number: the encoder's layers and the decoder's are different stacks."""
    found = _LAYER.search(name)
    return name[: found.start(1)] if found else None


def in_layer(name: str, layer: int) -> str:
    """The same tensor's name in another layer."""
    found = _LAYER.search(name)
    return name if found is None else f"{name[: found.start(1)]}{layer}{name[found.end(1) :]}"


def module_of(name: str) -> str:
    """A tensor's module: its name behind the layer's number, further numbers (experts) as ``*``.

    Example:
        >>> module_of("model.layers.3.mlp.experts.5.up_proj.weight")
        'mlp.experts.*.up_proj'
    """
    found = _LAYER.search(name)
    inner = name if found is None else name[found.end(1) :].removeprefix(".")
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", inner).removesuffix(".weight")


def is_first(name: str) -> bool:
    """Whether a tensor outside the layers comes before them."""
    return any(word in name.lower() for word in _FIRST_WORDS)


def part_of(name: str) -> str:
    """``head``, ``embeddings``, ``norms`` or ``layers``: the part of the model for which a ratio can be given.

    Example:
        >>> part_of("model.layers.0.input_layernorm.weight"), part_of("lm_head.weight")
        ('norms', 'head')
    """
    words = name.lower()
    if re.search(r"norm|\bln_|\bln\d|layer_?norm", words):
        return "norms"
    if layer_of(name) is not None:
        return "layers"
    return "embeddings" if is_first(name) else "head"
