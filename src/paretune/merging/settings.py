"""Parameters that differ by tensor: numbers, gradients over the layers, and lists of name filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..layers import layer_of, part_of


@dataclass(frozen=True)
class Place:
    """Where in the model a tensor belongs.

    Args:
        name: of the tensor.
        depth: 0 for the first layer and all outside the layers, 1 for the last.
        layer: the layer's number; None outside the layers.
    """

    name: str
    depth: float
    layer: int | None = None


def resolve(name: str, place: Place, levels: Sequence[Mapping[str, Any]], default: Any = None) -> Any:
    """A parameter's value for one tensor.

    Args:
        name: of the parameter.
        place: of the tensor.
        levels: the settings that may hold it, the most specific first.
        default: where none does.

    Raises:
        ArgumentError: a setting has a form that is not known.
    """
    for level in levels:
        if name in level:
            found = _value(name, level[name], place)
            if found is not None:
                return found
    return default


def _value(name: str, setting: Any, place: Place) -> Any:
    if isinstance(setting, list | tuple):
        if not setting:
            raise ArgumentError(name, setting, "give at least one value")
        if all(isinstance(each, int | float) and not isinstance(each, bool) for each in setting):
            return _gradient(setting, place.depth)
        for each in setting:
            if not isinstance(each, Mapping) or "value" not in each or set(each) - {"filter", "value"}:
                raise ArgumentError(name, setting, "a list holds numbers, or entries {filter: text, value: …}")
            if _matches(each.get("filter"), place.name):
                return _value(name, each["value"], place)
        return None
    if isinstance(setting, Partwise | PerTensor):
        return setting.weight(place.name)
    if setting is None or isinstance(setting, bool | int | float | str):
        return setting
    raise ArgumentError(name, setting, "give a number, a list of numbers, or a list of {filter: text, value: …}")


def _matches(pattern: Any, name: str) -> bool:
    return pattern is None or str(pattern) == "*" or str(pattern) in name


def _gradient(values: Sequence[float], depth: float) -> float:
    """Piecewise linear through values spread evenly over the layers."""
    at = depth * (len(values) - 1)
    low = min(int(at), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (values[high] - values[low]) * (at - low))


@dataclass(frozen=True)
class Partwise:
    """Ratios by blocks of layers, and for head, embeddings and norms.

    Args:
        ratios: one a block; the share of the first model.
        pivots: the last layer of each block but the last, inclusive: (10, 20) means 0-10, 11-20, 21-last.
        head, embeddings, norms: their own ratios; the mean of ``ratios`` by default.
        rest: whether these are the weights of the other model: 1 − ratio.

    Reference: arXiv 2309.06256, section 4.
    """

    ratios: tuple[float, ...]
    pivots: tuple[int, ...]
    head: float | None = None
    embeddings: float | None = None
    norms: float | None = None
    rest: bool = False

    def __post_init__(self) -> None:
        if len(self.ratios) != len(self.pivots) + 1:
            raise ArgumentError("ratios", self.ratios, f"{len(self.pivots)} pivots make {len(self.pivots) + 1} blocks")
        if list(self.pivots) != sorted(set(self.pivots)) or any(pivot < 0 for pivot in self.pivots):
            raise ArgumentError("pivots", self.pivots, "layer numbers must ascend")

    def weight(self, name: str) -> float:
        """The weight of one tensor."""
        return 1 - self._ratio(name) if self.rest else self._ratio(name)

    def _ratio(self, name: str) -> float:
        part = part_of(name)
        if part == "layers":
            layer = layer_of(name) or 0
            return self.ratios[sum(pivot < layer for pivot in self.pivots)]
        own = getattr(self, part)
        return sum(self.ratios) / len(self.ratios) if own is None else own


@dataclass(frozen=True)
class PerTensor:
    """A ratio for each tensor by its name: the share of the first model.

    Args:
        ratios: of every tensor that is merged.
        rest: whether these are the weights of the other model: 1 − ratio.
    """

    ratios: Mapping[str, float]
    rest: bool = False

    def weight(self, name: str) -> float:
        """The weight of one tensor."""
        if name not in self.ratios:
            raise ArgumentError("ratios", name, "no ratio is given for this tensor: learn ratios on these models")
        return 1 - self.ratios[name] if self.rest else self.ratios[name]
