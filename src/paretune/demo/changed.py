"""The tiny world and changed ones, in which cures are tried that were found on the first."""

from __future__ import annotations

from collections.abc import Callable

from paretune.demo.align import DPOSettings
from paretune.demo.pretrain import Recipe, Shape
from paretune.demo.world import World

DEEPER = Shape(hidden=128, layers=6, intermediate=352, tied=False)  # 1.3M parameters
# What the reference never did is hardly learnt by DPO alone.
WITH_NLL = DPOSettings(nll=0.5)

Changed = tuple[Callable[[int], Recipe], DPOSettings]

WORLDS: dict[str, Changed] = {
    "standard": (lambda seed: Recipe(World(seed=seed)), DPOSettings()),
    "deeper": (lambda seed: Recipe(World(seed=seed), DEEPER), DPOSettings()),
    "on-policy": (lambda seed: Recipe(World(seed=seed, on_policy=True)), DPOSettings()),
    "known": (lambda seed: Recipe(World(seed=seed, preference="known")), DPOSettings()),
    "short": (lambda seed: Recipe(World(seed=seed, preference="short")), DPOSettings()),
    "marker": (lambda seed: Recipe(World(seed=seed, preference="marker")), WITH_NLL),
    "refusal": (lambda seed: Recipe(World(seed=seed, preference="refusal")), WITH_NLL),
    "overlap": (lambda seed: Recipe(World(seed=seed, preference="overlap")), DPOSettings()),
}


def world_named(name: str, seed: int) -> tuple[Recipe, DPOSettings]:
    """The recipe and the alignment of a world.

    Raises:
        ArgumentError: there is no such world.

    Example:
        >>> world_named("short", 4)[0].world.preference
        'short'
    """
    from paretune.errors import ArgumentError

    if name not in WORLDS:
        raise ArgumentError("world", name, f"choose one of {', '.join(WORLDS)}")
    recipe, settings = WORLDS[name]
    return recipe(seed), settings
