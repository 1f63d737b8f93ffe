"""Which tensors share a ratio: blocks of layers, module kinds, and the parts outside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import ArgumentError
from ..layers import layer_of, module_of, part_of

Blocks = int | Literal["layer", "module"]
Shape = tuple[int, ...]
PARTS = ("head", "embeddings", "norms")


@dataclass(frozen=True)
class Group:
    """What shares a ratio: layers, and of these one kind of module or (None) all."""

    layers: tuple[int, ...]
    kind: str | None = None


@dataclass(frozen=True)
class Module:
    """A linear module: its layer (None for the head) and the number of its block."""

    layer: int | None
    block: int


@dataclass(frozen=True)
class Layout:
    """Every tensor's place.

    Args:
        groups: the blocks.
        block: each tensor's block by number; tensors with their part's own ratio are not in it.
        part: ``head``, ``embeddings`` or ``norms``, of all other tensors.
        tied: the head that is a copy of an embedding: ``{head: embedding}``; it shares the embedding's ratio.
        shapes: of all tensors.
        layers: how many there are.
    """

    groups: tuple[Group, ...]
    block: Mapping[str, int]
    part: Mapping[str, str]
    tied: Mapping[str, str]
    shapes: Mapping[str, Shape]
    layers: int

    def of_tensors(self, ratios: Sequence[float], own: Mapping[str, float]) -> dict[str, float]:
        """Every tensor's ratio.

        Args:
            ratios: one a block.
            own: one a part.
        """
        return {
            name: float(ratios[self.block[name]]) if name in self.block else float(own[self.part[name]])
            for name in self.shapes
        }

    def linear_modules(self) -> list[Module]:
        """The matrices in the blocks; experts that are stored together count one by one."""
        found = []
        for name, block in self.block.items():
            shape = self.shapes[name]
            if len(shape) >= 2:
                found += [Module(layer_of(name), block)] * (shape[0] if len(shape) == 3 else 1)
        return found


def lay_out(
    shapes: Mapping[str, Shape],
    blocks: Blocks = 3,
    pivots: Sequence[int] | None = None,
    *,
    tied: Mapping[str, str] | None = None,
    head: str | float | None = None,
) -> Layout:
    """Sort a model's tensors into blocks by their names; no architecture is known.

    Args:
        shapes: of all tensors, by the names that the checkpoint has.
        blocks: how many equal blocks of layers; ``"layer"``: one a layer; ``"module"``: one a kind of module
            (``self_attn.q_proj``), over all layers.
        pivots: the last layer of each block but the last, inclusive, in place of ``blocks``.
        tied: heads that are copies of an embedding.
        head: ``"last"`` puts the head into the last block of layers, as the released code does.

    Raises:
        ArgumentError: the model has too few layers, or the tied head is to have its own ratio.

    Reference: arXiv 2309.06256, sections 4 and 5.

    Example:
        >>> layout = lay_out({f"h.{i}.attn.weight": (4, 4) for i in range(5)} | {"wte.weight": (9, 4)}, blocks=2)
        >>> [group.layers for group in layout.groups], layout.part
        ([(0, 1), (2, 3, 4)], {'wte.weight': 'embeddings'})
    """
    tied = dict(tied or {})
    if tied and head is not None:
        raise ArgumentError("head", head, f"{min(tied)} is tied to {tied[min(tied)]}: give embeddings a ratio instead")
    inner = [name for name in shapes if part_of(name) == "layers"]
    numbers = sorted({layer for layer in map(layer_of, inner) if layer is not None})
    if not numbers:
        raise ArgumentError("blocks", blocks, "no tensor's name counts layers: there are no blocks to make")
    count = numbers[-1] + 1
    if pivots is None and blocks == "module":
        kinds = list(dict.fromkeys(map(kind_of, inner)))
        members = [[name for name in inner if kind_of(name) == kind] for kind in kinds]
        groups = [Group(_layers(names), kind) for kind, names in zip(kinds, members, strict=True)]
    else:
        bounds = _pivots(blocks, count) if pivots is None else checked_pivots(pivots, count)
        members = [[] for _ in range(len(bounds) + 1)]
        for name in inner:
            members[sum(pivot < (layer_of(name) or 0) for pivot in bounds)].append(name)
        groups = [Group(_layers(names)) for names in members]
    block = {name: number for number, names in enumerate(members) for name in names}
    if head == "last":
        block |= {name: len(groups) - 1 for name in shapes if part_of(name) == "head"}
    elif isinstance(head, str):
        raise ArgumentError("head", head, "give a number, or 'last' for the last block's ratio")
    part = {name: "embeddings" if name in tied else part_of(name) for name in shapes if name not in block}
    return Layout(tuple(groups), block, part, tied, dict(shapes), count)


def kind_of(name: str) -> str:
    """The module that a tensor belongs to, whatever its layer: ``self_attn.q_proj``; its bias goes with it."""
    return module_of(name).removesuffix(".bias")


def checked_pivots(pivots: Sequence[int], count: int) -> tuple[int, ...]:
    """Pivots for so many layers.

    Raises:
        ArgumentError: they do not ascend, or leave a block without layers.
    """
    found = tuple(pivots)
    if not all(type(pivot) is int for pivot in found) or list(found) != sorted(set(found)):
        raise ArgumentError("pivots", pivots, "give layer numbers that ascend")
    if found and not 0 <= found[0] <= found[-1] < count - 1:
        raise ArgumentError("pivots", pivots, f"must lie in 0 … {count - 2}: the model has {count} layers")
    return found


def _pivots(blocks: Blocks, count: int) -> tuple[int, ...]:
    number = count if blocks == "layer" else blocks
    if type(number) is not int or number < 1:
        raise ArgumentError("blocks", blocks, "give a positive number, 'layer' or 'module'")
    if number > count:
        raise ArgumentError("blocks", blocks, f"the model has {count} layers: give at most as many blocks")
    return tuple(count * i // number - 1 for i in range(1, number))


def _layers(names: Sequence[str]) -> tuple[int, ...]:
    return tuple(sorted({layer for layer in map(layer_of, names) if layer is not None}))
