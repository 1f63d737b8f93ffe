"""DeepSpeed's ZeRO-1 and 2 (experimental): which elements of which parameters a flat partition holds.

ZeRO lays the parameters of a group end to end, pads them, cuts the line into one float32 partition for each rank, and
gives the optimizer that partition in place of its parameters. The map back is what its own checkpoints use: each
parameter's ``_hp_mapping``, which says where the partition's elements are in the parameter and in the partition. The
parameters themselves stay the model's; the optimizer remembers them without keeping them alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..task_vector import plain_name
from .parts import Part

_FSDP2 = "shard with FSDP2 (accelerate's fsdp_version: 2)"

Pieces = tuple[list[tuple[str, Tensor]], list[dict[str, Tensor]]]


class Fragment(NamedTuple):
    """Some elements of one parameter.

    Args:
        name: plain name of the parameter.
        part: which of its elements; none where the partition holds nothing of it.
        offset: where they begin in the partition.
    """

    name: str
    part: Part
    offset: int


class Partitions:
    """ZeRO's partitions by parameter.

    Args:
        parameters: the model's own, by plain name, before ZeRO; not kept alive.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._originals = {name: weakref.ref(p) for name, p in parameters.items()}
        self._found: dict[Tensor, list[Fragment]] = {}

    def replaced(self, group: Mapping[str, Any]) -> bool:
        """Whether ZeRO's partition has come in place of a group's parameters."""
        if len(group["params"]) != len(group["param_names"]):
            return True
        # a group of one parameter: FSDP2 replaces it too, by a DTensor, and lets the original go
        only = self._originals[plain_name(group["param_names"][0])]() if len(group["params"]) == 1 else None
        return only is not None and only is not group["params"][0] and hasattr(only, "_hp_mapping")

    def pieces(self, group: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> Pieces:
        """Each fragment as a parameter of its own, with its gradient: plain names and views of the partition.

        Args:
            group: an optimizer's group whose parameters ZeRO has replaced.
            state: the partition's; its counter of steps is copied, the caller counts the partition's own.

        Returns:
            Names and views, and for each the views of the state.

        Raises:
            ArgumentError: ZeRO-3; no map, or one that contradicts the parameters' values.
        """
        named, states = [], []
        for name, part, offset in self._fragments(group):
            partition, at = group["params"][0], slice(offset, offset + part.n)
            view = partition.detach()[at]
            view.paretune_part = part  # read by `part_of`
            if partition.grad is not None:
                view.grad = partition.grad[at]
            named.append((name, view))
            state_items = {} if state is None else state
            states.append({key: value[at] if value.dim() else value.clone() for key, value in state_items.items()})
        return named, states

    def _fragments(self, group: Mapping[str, Any]) -> list[Fragment]:
        """One for each trained parameter in the group's order, so that all ranks have as many."""
        if len(group["params"]) == 1 and group["params"][0] in self._found:
            return self._found[group["params"][0]]
        found = []
        for name in map(plain_name, group["param_names"]):
            parameter: Any = self._originals[name]()
            if hasattr(parameter, "ds_id"):
                mend = f"its parameters are not whole on any rank: take ZeRO-2, or {_FSDP2}"
                raise ArgumentError("params", "DeepSpeed ZeRO-3", mend)
            if parameter is not None and not parameter.requires_grad:
                continue
            if len(group["params"]) != 1 or not hasattr(parameter, "_hp_mapping"):
                mend = f"they were {len(group['param_names'])}, and nothing says where {name} is now: {_FSDP2}"
                raise ArgumentError("params", f"{len(group['params'])} replaced parameters", mend)
            fragment = _fragment(name, parameter, group["params"][0])
            found.append(fragment)
        self._found[group["params"][0]] = found
        return found


def _fragment(name: str, parameter: Any, partition: Tensor) -> Fragment:
    whole, mapping, process_group = parameter.numel(), parameter._hp_mapping, parameter._dp_group
    groups = (process_group,) if process_group.size() > 1 else ()
    device = partition.device.type
    if mapping is None:
        return Fragment(name, Part(whole, whole, (0, 0), (0, 0), groups, device), 0)
    begin, count, offset = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel, _offset(mapping)
    mine = parameter.detach().reshape(-1)[begin : begin + count]
    held = partition.detach()[offset : offset + count]
    # With round_robin_gradients the partition has another order than the map says (0.19.8).
    if held.numel() != count or not torch.equal(held.to(mine.device, mine.dtype), mine):
        mend = f"DeepSpeed's own map of it is wrong for {name}: set round_robin_gradients to false, or {_FSDP2}"
        raise ArgumentError("params", "DeepSpeed ZeRO's partition", mend)
    return Fragment(name, Part(whole, whole, (0, 1), (begin, begin + count), groups, device), offset)


def _offset(mapping: Any) -> int:
    return int(mapping.hp_fragment_address.start)
