"""Learned or chosen ratios: what they are, for every tensor, and how they came to be; saved as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..errors import ArgumentError
from .blocks import PARTS, Blocks, Layout, lay_out

FORMAT = 1


@dataclass(frozen=True)
class Block:
    """Layers that share a ratio; ``kind`` names the module where the block holds one kind only."""

    layers: tuple[int, ...]
    ratio: float
    kind: str | None = None


@dataclass(frozen=True)
class Ratios:
    """How much of the model before alignment each tensor gets back: θ = α·θ_pre + (1−α)·θ_post.

    Args:
        mean: α₀.
        blocks: the blocks of layers with their α.
        head, embeddings, norms: α of what is in no block; None for a head that shares another ratio.
        tensors: α of every tensor, by its name in the checkpoints.
        tied: heads that are copies of an embedding, and share its α: ``{head: embedding}``.
        history: a record a step: ``{"step", "loss", "penalty", "ratios", "gradient"}``.
        settings: how they were learned or chosen.

    Reference: arXiv 2309.06256, sections 4 and 5; there α weighs θ_post, here θ_pre as in its code.

    Example:
        >>> shapes = {f"layers.{i}.w": (2, 2) for i in range(4)} | {"embed.w": (5, 2), "norm.w": (2,)}
        >>> ratios = Ratios.by_hand(shapes, ratios=(0.4, 0.2), pivots=(0,), embeddings=1.0)
        >>> round(ratios.mean, 3), ratios.tensors["layers.3.w"], ratios.tensors["embed.w"], round(ratios.norms, 3)
        (0.3, 0.2, 1.0, 0.3)
    """

    mean: float
    blocks: tuple[Block, ...]
    head: float | None
    embeddings: float
    norms: float
    tensors: Mapping[str, float]
    tied: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> tuple[float, ...]:
        """α of each block."""
        return tuple(block.ratio for block in self.blocks)

    @property
    def extrapolates(self) -> bool:
        """Whether an α lies outside [0, 1]."""
        return any(not 0 <= alpha <= 1 for alpha in self.tensors.values())

    @classmethod
    def from_layout(
        cls,
        layout: Layout,
        ratios: Sequence[float],
        mean: float,
        own: Mapping[str, float],
        history: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> Ratios:
        """Ratios of the blocks of a layout, and of its parts."""
        blocks = tuple(
            Block(group.layers, float(ratio), group.kind) for group, ratio in zip(layout.groups, ratios, strict=True)
        )
        has_head = "head" in layout.part.values()
        return cls(
            float(mean),
            blocks,
            own["head"] if has_head else None,
            own["embeddings"],
            own["norms"],
            layout.of_tensors(ratios, own),
            dict(layout.tied),
            tuple(history),
            dict(settings or {}),
        )

    @classmethod
    def by_hand(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        ratios: Sequence[float],
        pivots: Sequence[int] | None = None,
        blocks: Blocks | None = None,
        head: float | str | None = None,
        embeddings: float | None = None,
        norms: float | None = None,
        tied: Mapping[str, str] | None = None,
    ) -> Ratios:
        """Part-wise averaging with ratios that are given.

        Args:
            shapes: of all tensors of the model, by name.
            ratios: α, one a block.
            pivots: the last layer of each block but the last, inclusive; equal blocks by default.
            blocks: other blocks, as in `learn_ratios`.
            head, embeddings, norms: their own α; the mean of ``ratios`` by default.
            tied: heads that are copies of an embedding.

        Raises:
            ArgumentError: numbers that cannot be, or not one a block.

        Reference: arXiv 2309.06256, section 4.
        """
        found = [_ratio("ratios", ratio) for ratio in ratios]
        if not found:
            raise ArgumentError("ratios", ratios, "give one ratio a block")
        layout = lay_out(shapes, len(found) if blocks is None else blocks, pivots, tied=tied, head=head)
        if len(found) != len(layout.groups):
            raise ArgumentError("ratios", ratios, f"there are {len(layout.groups)} blocks: give one ratio for each")
        mean = math.fsum(found) / len(found)
        settings: dict[str, Any] = {"method": "uniform" if len(found) == 1 else "part-wise"}
        return cls.from_layout(
            layout, found, mean, own_ratios(mean, head=head, embeddings=embeddings, norms=norms), (), settings
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of ``ratios.json``."""
        blocks = [
            {"layers": list(block.layers), "ratio": block.ratio} | ({"kind": block.kind} if block.kind else {})
            for block in self.blocks
        ]
        content = asdict(self) | {"blocks": blocks, "history": [dict(each) for each in self.history]}
        return {"format": FORMAT, **content}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``ratios.json``, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ratios:
        """Read what `save` wrote.

        Raises:
            ArgumentError: the file is missing, is not JSON, or lacks something.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            blocks = tuple(Block(tuple(b["layers"]), _ratio("ratios", b["ratio"]), b.get("kind"))
                           for b in content["blocks"])  # fmt: skip
            tensors = {str(name): _ratio("ratios", alpha) for name, alpha in content["tensors"].items()}
            parts = {name: None if content[name] is None else _ratio(name, content[name]) for name in PARTS}
            return cls(
                _ratio("mean", content["mean"]),
                blocks,
                parts["head"],
                float(parts["embeddings"] or 0.0),
                float(parts["norms"] or 0.0),
                tensors,
                dict(content["tied"]),
                tuple(content["history"]),
                dict(content["settings"]),
            )
        except OSError as error:
            raise ArgumentError("ratios", str(path), f"cannot be read ({error.strerror}): name a ratios.json") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ArgumentError):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise ArgumentError("ratios", str(path), f"is no ratios.json ({reason}): learn or save it again") from None


def own_ratios(
    mean: float, *, head: float | str | None = None, embeddings: float | None = None, norms: float | None = None
) -> dict[str, float]:
    """α of each part outside the blocks: its own, or the mean."""
    given = {"head": None if isinstance(head, str) else head, "embeddings": embeddings, "norms": norms}
    return {part: float(mean) if alpha is None else _ratio(part, alpha) for part, alpha in given.items()}


def _ratio(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArgumentError(argument, value, "must be a finite number")
    return float(value)
