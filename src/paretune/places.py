"""Where a loaded model keeps the tensors of a checkpoint: under the same name, or inside a parameter that fuses many.

transformers stores the experts of a layer as one parameter and saves them one by one. Its own conversion, applied to
the numbers of the elements in place of their values, tells which element goes where: no architecture is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MismatchError, examples
from .layers import in_layer, layer_of
from .task_vector import plain_name

Shape = tuple[int, ...]
Known = dict[tuple[str, Shape], list["Place"]]


@dataclass(frozen=True)
class Place:
    """A checkpoint's tensor inside a parameter; ``stride`` is None where it is the whole parameter."""

    name: str
    shape: Shape
    stride: Shape | None = None
    offset: int = 0

    def of(self, parameter: Tensor) -> Tensor:
        """The tensor as a view of the parameter, or of its gradient."""
        if self.stride is None:
            return parameter
        whole = parameter if parameter.is_contiguous() else parameter.contiguous()
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


def find_places(model: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, list[Place]]:
    """Which tensors of a checkpoint each parameter of a model holds: ``{parameter name: places}``; tied ones once.

    Args:
        model: a loaded model.
        shapes: of the checkpoint's tensors.

    Raises:
        MismatchError: a parameter is in no tensor, or they differ in shape.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, list[Place]] = {}
    missing: list[str] = []
    unequal: list[str] = []
    known: Known = {}
    for name, parameter in model.named_parameters():
        stored = next((plain for plain in map(plain_name, names[id(parameter)]) if plain in shapes), None)
        if stored is not None:
            found[name] = [Place(stored, shapes[stored])]
            if shapes[stored] != tuple(parameter.shape):
                unequal.append(f"{name} {list(parameter.shape)} against {list(shapes[stored])}")
            continue
        places = fused_places(model, name, parameter, known)
        if not places or any(place.name not in shapes or place.shape != shapes[place.name] for place in places):
            missing.append(name)
        found[name] = places
    if missing or unequal:
        what = f"parameters in no tensor: {examples(missing)}" if missing else f"shapes differ: {examples(unequal)}"
        raise MismatchError(f"the model does not fit the checkpoints: {what}: load the model that they belong to")
    return found


def fused_places(model: Any, name: str, parameter: Tensor, known: Known) -> list[Place]:
    """The places inside a parameter that is stored under other names; empty where they are not known.

    Args:
        model: a model as transformers makes it.
        name: of the parameter.
        parameter: itself.
        known: kept between calls, so that layers that are alike are computed once.
    """
    layer = layer_of(name)
    key = in_layer(name, 0), tuple(parameter.shape)
    if key in known and layer is not None:
        return [Place(in_layer(place.name, layer), place.shape, place.stride, place.offset) for place in known[key]]
    if not hasattr(model, "save_pretrained") or not parameter.is_contiguous():
        return []
    from transformers.core_model_loading import revert_weight_conversion

    numbers = torch.arange(parameter.numel()).view(parameter.shape)
    places = []
    for stored, index in revert_weight_conversion(model, {name: numbers}).items():
        place = _strided(stored, index)
        if place is None:
            return []
        places.append(place)
    known[key] = places
    return places


def _strided(name: str, index: Tensor) -> Place | None:
    """The place of a tensor whose elements have these numbers in the parameter; None where no strides give them."""
    if index.dtype != torch.int64 or not index.numel():
        return None
    offset = int(index.flatten()[0])
    stride, expected = [], torch.tensor(offset)
    for axis, size in enumerate(index.shape):
        step = int(index.select(axis, 1).flatten()[0]) - offset if size > 1 else 1
        stride.append(step)
        shape = [1] * index.dim()
        shape[axis] = size
        expected = expected + (torch.arange(size) * step).view(shape)
    if min(stride, default=0) < 0 or not torch.equal(expected.expand(index.shape), index):
        return None
    return Place(name, tuple(index.shape), tuple(stride), offset)
