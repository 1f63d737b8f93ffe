"""How far models are from each other: norms, zeros, density and conflicts of their differences, tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MismatchError, examples
from ..layers import layer_of, module_of
from .eager import Workspace
from .inputs import Model
from .numbers import STORED, Floats
from .selection import BLOCK
from .views import View, numel

_ROW = 4096  # products are summed in float32 within rows of this many elements, and in float64 across rows
_KEYS = (
    "n",
    "zeros",
    "absolute",
    "square",
    "base_square",
    "other_zeros",
    "other_square",
    "product",
    "both",
    "conflicts",
)


@dataclass
class Sums:
    """What is summed over elements; sums of tensors add to sums of blocks.

    ``square`` and ``absolute`` are of τ = reference − base, ``other_…`` of δ = aligned − reference.
    """

    values: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_KEYS, 0.0))
    pair: bool = False

    def add(self, other: Sums) -> None:
        self.pair |= other.pair
        for key in _KEYS:
            self.values[key] += other.values[key]

    def to_dict(self) -> dict[str, Any]:
        """The figures that are reported; None where they have no meaning (0/0)."""
        v = self.values
        found: dict[str, Any] = {
            "elements": int(v["n"]),
            "relative_norm": _root_ratio(v["square"], v["base_square"]),
            "zero_share": _ratio(v["zeros"], v["n"]),
            # ‖τ‖₁²/(n‖τ‖₂²): 1 where all entries are equally large, 1/n where there is but one
            "effective_density": _ratio(v["absolute"] ** 2, v["n"] * v["square"]),
        }
        if self.pair:
            found |= {
                "update_relative_norm": _root_ratio(v["other_square"], v["base_square"]),
                "update_zero_share": _ratio(v["other_zeros"], v["n"]),
                "cosine": _ratio(v["product"], math.sqrt(v["square"]) * math.sqrt(v["other_square"])),
                "sign_conflict": _ratio(v["conflicts"], v["both"]),
            }
        return found


@dataclass(frozen=True)
class Difference:
    """The differences between two or three models.

    Args:
        models: base, reference and, where given, aligned.
        tensors: by tensor name.
    """

    models: tuple[str, ...]
    tensors: dict[str, Sums]

    def blocks(self) -> dict[str, Sums]:
        """Sums by layer; tensors outside the layers stand for themselves."""
        return self._grouped(lambda name: _block(name))

    def modules(self) -> dict[str, Sums]:
        """Sums by module, over all layers."""
        return self._grouped(module_of)

    @property
    def whole(self) -> Sums:
        """Sums over everything."""
        return self._grouped(lambda name: "whole")["whole"]

    def _grouped(self, key: Callable[[str], str]) -> dict[str, Sums]:
        found: dict[str, Sums] = {}
        for name, sums in self.tensors.items():
            found.setdefault(key(name), Sums()).add(sums)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, with plain values."""
        return {
            "models": list(self.models),
            "whole": self.whole.to_dict(),
            "blocks": {name: sums.to_dict() for name, sums in self.blocks().items()},
            "modules": {name: sums.to_dict() for name, sums in self.modules().items()},
            "tensors": {name: sums.to_dict() for name, sums in self.tensors.items()},
        }

    def table(self) -> list[str]:
        """Lines of text: one a block, and the whole."""
        rows = [*self.blocks().items(), ("whole", self.whole)]
        figures = [(name, sums.to_dict()) for name, sums in rows]
        columns = [key for key in figures[-1][1] if key != "elements"]
        width = max(len(name) for name, _ in figures)
        lines = [" ".join([" " * width, *(f"{column:>20}" for column in columns)])]
        for name, values in figures:
            shown = (f"{values[c]:>20.4g}" if values[c] is not None else f"{'-':>20}" for c in columns)
            lines.append(" ".join([f"{name:<{width}}", *shown]))
        return lines

    def grid(self, figure: str) -> tuple[list[str], list[str], np.ndarray]:
        """One figure by layer and module: names of the rows, of the columns, and the values (NaN where none)."""
        cells: dict[tuple[str, str], Sums] = {}
        for name, sums in self.tensors.items():
            cells.setdefault((_block(name), module_of(name)), Sums()).add(sums)
        rows, columns = list(dict.fromkeys(key[0] for key in cells)), list(dict.fromkeys(key[1] for key in cells))
        values = np.full((len(rows), len(columns)), np.nan)
        for (row, column), sums in cells.items():
            value = sums.to_dict().get(figure)
            values[rows.index(row), columns.index(column)] = np.nan if value is None else value
        return rows, columns, values

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a heat map of layers x modules, one panel a figure.

        Args:
            path: of the picture; its ending chooses the format (svg, png, pdf).
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figures = [name for name in self.whole.to_dict() if name not in ("elements", "update_zero_share")]
        rows, columns, _ = self.grid(figures[0])
        size = (2.2 + 0.28 * len(columns) * len(figures), 1.8 + 0.16 * len(rows))
        figure, axes = pyplot.subplots(1, len(figures), figsize=size, squeeze=False, sharey=True)
        for axis, name in zip(axes[0], figures, strict=True):
            signed = name == "cosine"
            image = axis.imshow(
                self.grid(name)[2],
                aspect="auto",
                cmap="RdBu_r" if signed else "viridis",
                vmin=-1 if signed else None,
                vmax=1 if signed else None,
            )
            axis.set_title(name.replace("_", " "), fontsize=8)
            axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6)
            axis.set_yticks(range(len(rows)), rows, fontsize=6)
            figure.colorbar(image, ax=axis)
        figure.savefig(Path(path), bbox_inches="tight", dpi=150)
        pyplot.close(figure)


def compare(
    base: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    aligned: str | os.PathLike[str] | None = None,
) -> Difference:
    """Measure τ = reference − base and, with a third model, δ = aligned − reference against it.

    Args:
        base, reference, aligned: directories, files or hub ids.

    Raises:
        MismatchError: the models differ in names or shapes.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> folder = tempfile.mkdtemp()
        >>> for name, value in (("a", 3.0), ("b", 4.0)):
        ...     safetensors.torch.save_file({"w": torch.tensor([value, 4.0])}, f"{folder}/{name}.safetensors")
        >>> compare(f"{folder}/a.safetensors", f"{folder}/b.safetensors").whole.to_dict()["relative_norm"]
        0.2
    """
    models = [Model(path) for path in (base, reference, aligned) if path is not None]
    names = _matched(models)
    space = Workspace()
    tensors = {name: _sums([model.views[name] for model in models], space) for name in names}
    return Difference(tuple(model.given for model in models), tensors)


def _block(name: str) -> str:
    layer = layer_of(name)
    return name.removesuffix(".weight") if layer is None else f"layer {layer}"


def _matched(models: Sequence[Model]) -> list[str]:
    floats = [{name for name, view in model.views.items() if view.kind in STORED} for model in models]
    common = set.intersection(*floats)
    extra = {name for each in floats for name in each} - common
    strangers = {name for name in extra if layer_of(name) is not None}
    if strangers or not common:
        raise MismatchError(
            f"tensors that not all models have: {examples(strangers or extra)}: are all of one architecture?"
        )
    unequal = [name for name in common if len({model.views[name].shape for model in models}) > 1]
    if unequal:
        raise MismatchError(
            f"tensors of unequal shape: {examples(unequal)}: are all of one architecture and vocabulary?"
        )
    return [name for name in models[0].views if name in common]


def _sums(views: Sequence[View], space: Workspace) -> Sums:
    found = Sums(pair=len(views) == 3)
    v = found.values
    n = numel(views[0].shape)
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        parts = [space.floats("model", stop - start, i) for i in range(len(views))]
        for view, part in zip(views, parts, strict=True):
            view.fill(start, stop, part)
        base, tau = parts[0], parts[1]
        v["n"] += stop - start
        v["base_square"] += inner(base, base)
        if found.pair:
            np.subtract(parts[2], parts[1], out=parts[2])
        np.subtract(tau, base, out=tau)
        v["square"] += inner(tau, tau)
        v["absolute"] += float(np.abs(tau).sum(dtype=np.float64))
        v["zeros"] += tau.size - np.count_nonzero(tau)
        if found.pair:
            _pair(v, tau, parts[2])
    _release(views, n)
    return found


def _pair(v: dict[str, float], tau: Floats, update: Floats) -> None:
    v["other_square"] += inner(update, update)
    v["other_zeros"] += update.size - np.count_nonzero(update)
    v["product"] += inner(tau, update)
    both = (tau != 0) & (update != 0)
    v["both"] += np.count_nonzero(both)
    v["conflicts"] += np.count_nonzero(both & (np.signbit(tau) != np.signbit(update)))


def inner(a: Floats, b: Floats) -> float:
    """⟨a, b⟩, in float32 within rows and float64 across them."""
    whole = a.size // _ROW * _ROW
    rows = np.einsum("ij,ij->i", a[:whole].reshape(-1, _ROW), b[:whole].reshape(-1, _ROW))
    return float(rows.sum(dtype=np.float64)) + float(np.einsum("i,i->", a[whole:], b[whole:]))


def _release(views: Iterable[View], n: int) -> None:
    for view in views:
        view.release(0, n)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _root_ratio(numerator: float, denominator: float) -> float | None:
    return math.sqrt(numerator / denominator) if denominator > 0 else None
