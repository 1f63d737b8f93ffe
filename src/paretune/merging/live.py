"""Dialling a loaded model between two checkpoints, in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError, MismatchError, examples
from ..layers import layer_of, part_of
from ..native import kernels
from .arithmetic import Ready
from .fused import Fused
from .inputs import Model
from .methods import METHODS
from .plan import Part
from .selection import BLOCK
from .settings import Partwise
from .views import View

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..places import Known

    Dialled = tuple[str, Tensor, View, View]  # name in the checkpoints, where the model keeps it, the end points

_KINDS = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


class LiveMerge:
    """Sets a loaded model's parameters to a mean of two checkpoints, as often as wanted.

        θ = α·θ_pre + (1−α)·θ_post

    Always computed from the memory-mapped end points, in float32 (float64 for float32 parameters) and rounded once:
    dialling back and forth does not drift, 0 gives θ_post and 1 gives θ_pre to the bit.

    Args:
        model: the loaded model; its parameters are changed in place.
        pre: the checkpoint before alignment, which the ratio weighs.
        post: the checkpoint after it.
        pivots: the last layer of each block but the last, for one ratio a block; equal blocks by default.

    Raises:
        MismatchError: the model has parameters that a checkpoint lacks, or of another shape.

    Reference: arXiv 2309.06256, section 4 (MA; α here weighs θ_pre).

    Example:
        >>> import tempfile, torch, safetensors.torch, paretune as pt
        >>> folder = tempfile.mkdtemp()
        >>> for name, value in (("pre", 1.0), ("post", 3.0)):
        ...     safetensors.torch.save_file({"weight": torch.full((1, 2), value)}, f"{folder}/{name}.safetensors")
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> live = pt.LiveMerge(model, pre=f"{folder}/pre.safetensors", post=f"{folder}/post.safetensors").set(0.25)
        >>> model.weight.data
        tensor([[2.5000, 2.5000]])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pre: str | os.PathLike[str],
        post: str | os.PathLike[str],
        pivots: Sequence[int] | None = None,
    ) -> None:
        from ..task_vector import plain_name

        self.pivots = None if pivots is None else tuple(pivots)
        self.ratios: tuple[float, ...] | None = None
        self._ends = [_end(path, label) for path, label in ((pre, "pre"), (post, "post"))]
        named = [(plain_name(name), parameter) for name, parameter in model.named_parameters()]
        aliases = _aliases(model, plain_name)
        self._tensors: list[Dialled] = []
        missing: list[str] = []
        known: Known = {}
        for name, parameter in named:
            views = [_find(end, name, aliases) for end in self._ends]
            if views[0] is None or views[1] is None:
                inside = self._inside(model, name, parameter.detach(), known)
                self._tensors += inside
                if not inside:
                    missing.append(name)
                continue
            for view, end in zip(views, self._ends, strict=True):
                if view is not None and view.shape != tuple(parameter.shape):
                    raise MismatchError(
                        f"{name} has shape {list(parameter.shape)} in the model and {list(view.shape)} in {end.given}: "
                        "load the model that the checkpoints belong to"
                    )
            self._tensors.append((name, parameter.detach(), views[0], views[1]))
        if missing:
            raise MismatchError(
                f"parameters that a checkpoint lacks: {examples(missing)}: "
                "load the model that the checkpoints belong to"
            )
        layers = [layer for layer in (layer_of(name) for name, *_ in self._tensors) if layer is not None]
        self.layers = max(layers, default=-1) + 1

    def _inside(self, model: nn.Module, name: str, parameter: Tensor, known: Known) -> list[Dialled]:
        """The tensors that a parameter fuses, such as a layer's experts; none where it is unknown or does not fit."""
        from ..places import fused_places  # not at the top: it brings torch

        found: list[Dialled] = []
        for place in fused_places(model, name, parameter, known):
            pre, post = (end.views.get(place.name) for end in self._ends)
            if pre is None or post is None or not pre.shape == post.shape == place.shape:
                return []
            found.append((place.name, place.of(parameter), pre, post))
        return found

    def set(
        self,
        ratio: float | Sequence[float] | Mapping[str, float],
        *,
        head: float | None = None,
        embeddings: float | None = None,
        norms: float | None = None,
    ) -> LiveMerge:
        """Dial the model.

        Args:
            ratio: α, one α for each block of layers, or one for each parameter by name; outside [0, 1] extrapolates.
            head, embeddings, norms: their own ratios; the mean of ``ratio`` by default.

        Returns:
            itself.
        """
        if isinstance(ratio, Mapping):
            return self._set_each(ratio, head, embeddings, norms)
        one = isinstance(ratio, int | float)
        ratios: tuple[float, ...] = (float(ratio),) if isinstance(ratio, int | float) else tuple(map(float, ratio))
        if not ratios or not all(np.isfinite(ratios)):
            raise ArgumentError("ratio", ratio, "give a finite number, or one for each block of layers")
        parts = Partwise(ratios, self._pivots(len(ratios)), head=head, embeddings=embeddings, norms=norms)
        own = {"head": head, "embeddings": embeddings, "norms": norms}
        for name, parameter, pre, post in self._tensors:
            # One ratio is meant for every tensor, layers or not.
            alpha = ratios[0] if one and own.get(part_of(name)) is None else parts.weight(name)
            _dial(parameter, pre, post, alpha)
        self.ratios = ratios
        return self

    def _set_each(self, ratios: Mapping[str, float], *parts: float | None) -> LiveMerge:
        if any(part is not None for part in parts):
            raise ArgumentError("ratio", type(ratios).__name__, "ratios by name are of every tensor: give no part's")
        lacking = [name for name, *_ in self._tensors if not np.isfinite(ratios.get(name, np.nan))]
        if lacking:
            raise ArgumentError("ratio", examples(lacking), "give each of these parameters a finite ratio")
        for name, parameter, pre, post in self._tensors:
            _dial(parameter, pre, post, float(ratios[name]))
        self.ratios = None
        return self

    def _pivots(self, blocks: int) -> tuple[int, ...]:
        if blocks == 1:
            return ()
        if self.pivots is not None:
            if len(self.pivots) + 1 != blocks:
                raise ArgumentError("ratio", blocks, f"the pivots make {len(self.pivots) + 1} blocks: give as many")
            return self.pivots
        if blocks > self.layers:
            raise ArgumentError("ratio", blocks, f"the model has {self.layers} layers: give at most as many ratios")
        return tuple(self.layers * i // blocks - 1 for i in range(1, blocks))


def _end(path: str | os.PathLike[str], label: str) -> Model:
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(label, path, "give the path or hub id of a checkpoint")
    return Model(path)


def _aliases(model: nn.Module, plain_name: object) -> dict[str, list[str]]:
    """Other names of each parameter: a tied head may be stored under either."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(plain_name(name))  # type: ignore[operator]
    return {name: names for names in by_identity.values() for name in names}


def _find(end: Model, name: str, aliases: dict[str, list[str]]) -> View | None:
    return next((end.views[each] for each in (name, *aliases.get(name, ())) if each in end.views), None)


def _dial(parameter: Tensor, pre: View, post: View, alpha: float) -> None:
    import torch

    with torch.no_grad():
        if not _fused(parameter, pre, post, alpha):
            _eager(parameter, pre, post, alpha)
    # The end points stay mapped: their pages are the page cache's, and mapping them again is a third of a dial's cost.


def _fused(parameter: Tensor, pre: View, post: View, alpha: float) -> bool:
    """Compute where the parameter lies; False where that cannot be done."""
    library = kernels()
    kind = _KINDS.get(str(parameter.dtype))
    if library is None or kind is None or parameter.device.type != "cpu" or not parameter.is_contiguous():
        return False
    # A NaN that is stored with more digits might not survive the rounding by itself.
    careful = kind != "F32" and "F32" in (pre.kind, post.kind)
    fused = Fused(library, METHODS["linear"], careful=careful)
    part = Part("", tuple(parameter.shape), kind, (pre, post), None, ())
    ready = Ready((alpha, 1 - alpha), (1.0, 1.0), (None, None), 1.0, False)
    fused.into(part, ready, parameter.data_ptr())
    return True


def _eager(parameter: Tensor, pre: View, post: View, alpha: float) -> None:
    import torch

    n = parameter.numel()
    flat = parameter.view(-1) if parameter.is_contiguous() else None
    target = torch.empty(n, dtype=parameter.dtype, device=parameter.device) if flat is None else flat
    low, high = np.empty(min(n, BLOCK), np.float32), np.empty(min(n, BLOCK), np.float32)
    wide = parameter.dtype in (torch.float32, torch.float64)
    sums = np.empty((2, min(n, BLOCK) if wide else 0))
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        a, b = low[: stop - start], high[: stop - start]
        if alpha in (0, 1):
            (pre if alpha == 1 else post).fill(start, stop, a)
            target[start:stop].copy_(torch.from_numpy(a))
            continue
        pre.fill(start, stop, a)
        post.fill(start, stop, b)
        if wide:  # the same as the offline merge of float32 models
            x, y = sums[0][: stop - start], sums[1][: stop - start]
            np.multiply(a, alpha, out=x, dtype=np.float64)
            np.multiply(b, 1 - alpha, out=y, dtype=np.float64)
            target[start:stop].copy_(torch.from_numpy(np.add(x, y, out=x)))
            continue
        np.multiply(a, np.float32(alpha), out=a)
        np.multiply(b, np.float32(1 - alpha), out=b)
        np.add(a, b, out=a)
        target[start:stop].copy_(torch.from_numpy(a))
    if flat is None:
        parameter.copy_(target.view(parameter.shape))
