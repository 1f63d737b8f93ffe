"""A loaded model between two checkpoints: set to ratios, and the gradient of a loss with respect to them.

    ∂L/∂α_k = Σ_{W in block k} ⟨∂L/∂W, W_pre − W_post⟩

Each weight's gradient is turned into its inner product, and freed, as soon as the backward pass has made it: no two
are held at once, and the work does not depend on the number of ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from ..places import Place, find_places
from .blocks import Layout
from .ends import Ends


class DialledModel:
    """A model whose parameters are θ(α), changed in place.

    Only parameters in blocks get gradients; the others are dialled once. Use it as a context manager, or `close` it:
    the hooks and the frozen parameters are then undone.

    Args:
        model: a loaded model, of the checkpoints' architecture.
        ends: the checkpoints.
        layout: which tensors share a ratio.
        own: the ratios of head, embeddings and norms, by part.

    Raises:
        MismatchError: the model does not fit the checkpoints.

    Reference: arXiv 2309.06256, section 5; the gradient is exact, where the released code differentiates through
    interpolated weights and holds both models.
    """

    def __init__(self, model: nn.Module, ends: Ends, layout: Layout, own: Mapping[str, float]) -> None:
        self.model, self.ends, self.layout = model, ends, layout
        self.gradient = torch.zeros(len(layout.groups), dtype=torch.float64)
        self._places = find_places(model, ends.shapes)
        self._learned: list[tuple[nn.Parameter, list[Place]]] = []
        self._frozen: list[tuple[nn.Parameter, bool]] = []
        self._hooks = []
        for name, parameter in model.named_parameters():
            places = self._places[name]
            self._frozen.append((parameter, parameter.requires_grad))
            inside = any(place.name in layout.block for place in places)
            parameter.requires_grad_(inside)
            if inside:
                self._learned.append((parameter, places))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._collect(places)))
            else:
                for place in places:
                    ends.blend(place.name, own[layout.part[place.name]], place.of(parameter.data))

    def dial(self, ratios: Sequence[float] | Tensor) -> None:
        """Set the model to these ratios, one a block."""
        for parameter, places in self._learned:
            for place in places:
                self.ends.blend(place.name, float(ratios[self.layout.block[place.name]]), place.of(parameter.data))

    def zero(self) -> None:
        """Forget the gradient gathered so far."""
        self.gradient.zero_()

    def close(self) -> None:
        """Take the hooks off; the parameters stay as they are dialled."""
        for hook in self._hooks:
            hook.remove()
        for parameter, wanted in self._frozen:
            parameter.requires_grad_(wanted)

    def __enter__(self) -> DialledModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _collect(self, places: Sequence[Place]) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            for place in places:
                product = self.ends.inner(place.name, place.of(parameter.grad))
                self.gradient[self.layout.block[place.name]] += product.cpu()
            parameter.grad = None

        return hook


def set_model(model: nn.Module, ends: Ends, ratios: Mapping[str, float]) -> None:
    """Set a loaded model's parameters to an average of two checkpoints, in place.

    Args:
        model: a loaded model, of the checkpoints' architecture.
        ends: the checkpoints.
        ratios: every tensor's α, as `Ratios.tensors`.

    Raises:
        MismatchError: the model does not fit the checkpoints.
    """
    places = find_places(model, ends.shapes)
    for name, parameter in model.named_parameters():
        for place in places[name]:
            ends.blend(place.name, ratios[place.name], place.of(parameter.data))
