"""Small models, pairs of checkpoints and gradients for the optimizer tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import paretune as pt
from paretune.operators import mask_key

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (32, 16),
    "layer.0.weight": (24, 16),
    "layer.0.bias": (24,),
    "scale": (),
    "norm.weight": (7,),
}


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, scale: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator) * scale for k, s in shapes.items()}


def gradients(steps: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 99) -> list[dict[str, Tensor]]:
    """Normal gradients that keep some of their direction, as real ones do."""
    mean = tensors(seed, shapes, 1.0)
    return [{k: mean[k] + g for k, g in tensors(seed + 1 + t, shapes, 1.0).items()} for t in range(steps)]


def parameters(values: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {k: nn.Parameter(v.detach().clone().to(dtype)) for k, v in values.items()}


def pair(
    seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES, distance: float = 0.01
) -> tuple[dict[str, Tensor], dict[str, Tensor], pt.TaskVector]:
    """(reference, dense τ, TaskVector); the policy starts at the reference."""
    base, move = tensors(seed, shapes), tensors(seed + 1000, shapes, distance)
    reference = {k: base[k] + move[k] for k in base}
    tau = {k: reference[k] - base[k] for k in base}
    return reference, tau, pt.TaskVector.between(base=base, reference=reference)


def run(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, nn.Parameter],
    grads: Sequence[Mapping[str, Tensor | None]],
    learning_rates: Sequence[float] | None = None,
) -> None:
    for t, step in enumerate(grads):
        if learning_rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[t]
        for name, p in params.items():
            g = step.get(name)
            p.grad = None if g is None else g.clone().to(p.dtype).reshape(p.shape)
        optimizer.step()


def project_masks(
    shapes: Mapping[str, Sequence[int]], density: float, seed: int = 0
) -> Callable[[int, str, str], Tensor]:
    """The masks of the package's dense operator, for the oracles: where Random(ones) is not zero."""
    operator = pt.Random(density)

    def kept(step: int, stream: str, name: str) -> Tensor:
        return operator(torch.ones(tuple(shapes[name])), key=mask_key(seed, step, stream, name)) != 0

    return kept


def assert_close(got: Tensor, want: Tensor, relative: float = 1e-6, absolute: float = 0.0, what: str = "") -> None:
    """Largest error against the largest entry of the tensor: what fp32 can promise after cancellation."""
    if want.numel() == 0:
        return
    want, got = want.double(), got.detach().double()
    scale = want.abs().max().item()
    error = (got - want).abs().max().item()
    assert error <= relative * scale + absolute, f"{what}: error {error:.3g}, allowed {relative * scale + absolute:.3g}"
