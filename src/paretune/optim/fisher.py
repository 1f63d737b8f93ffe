"""Fisher information of a model, and the child network that it selects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DataError, examples
from .wrapper import require_dense, unique_names

Fisher: TypeAlias = Mapping[str, Tensor]

_CHUNK = 1 << 20  # elements ranked at a time
_HALF = 1 << 16  # a float32 is ranked by its upper, then by its lower 16 bits


def fisher_information(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information, by parameter name.

    F = 1/n · Σ_j (∂ loss(model, batch_j) / ∂θ)², in float32, over n batches. With one example in a batch and the
    negative log-likelihood as loss this is the paper's formula; with larger batches the mean gradient is squared,
    as in the paper's code: quicker, and smaller by about the batch size.

    The model is put into evaluation mode meanwhile (no dropout, so nothing is drawn from torch's generators);
    its mode and its gradients are afterwards as they were. Memory: 4 bytes a parameter, and one set of gradients.

    Args:
        model: the model at which the information is taken.
        batches: any iterable of what ``loss`` takes; a few hundred examples of the task.
        loss: (model, batch) -> a scalar with gradient.

    Returns:
        ``{plain name: float32 tensor}`` for every parameter that requires gradients; 0 where none arrived.

    Raises:
        DataError: there is no batch, or a gradient is not finite.

    Reference:
        arXiv 2109.05687, section 2.3.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
        >>> fisher_information(model, batches, lambda model, x: model(x).sum())
        {'weight': tensor([[5.]])}
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names = unique_names((name for name, _ in trainable), "model")
    named = dict(zip(names, (p for _, p in trainable), strict=True))
    sums = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in named.items()}
    kept = {name: p.grad for name, p in named.items()}
    modes = {module: module.training for module in model.modules()}
    count = 0
    try:
        model.eval()
        for batch in batches:
            for p in named.values():
                p.grad = None
            with torch.enable_grad():
                loss(model, batch).backward()
            for name, p in named.items():
                if p.grad is not None:
                    require_dense(name, p.grad)
                    gradient = p.grad.detach().float()
                    sums[name].addcmul_(gradient, gradient)
            count += 1
    finally:
        for name, p in named.items():
            p.grad = kept[name]
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise DataError("batches is empty: Fisher information needs at least one batch")
    if broken := [name for name, value in sums.items() if not bool(_whole(value).isfinite().all())]:
        raise DataError(f"the Fisher information is not finite: {examples(broken)}; check the loss on these batches")
    return {name: value.div_(count) for name, value in sums.items()}


def child_masks(fisher: Fisher, density: float) -> dict[str, Tensor]:
    """The child network of ChildTuning-D: True for the p·N parameters of largest Fisher information.

    k = max(1, int(p·N)) of all N elements of all tensors together. Zeros are never kept, unless p = 1 keeps
    everything. Of c elements tied at the limit, r of which are still needed, those of rank ⌊i·c/r⌋ are kept.
    The k-th value is found exactly by two histograms over the bits, without sorting and without a copy.

    Args:
        fisher: ``{name: tensor}``, finite and ≥ 0; ranked as float32.
        density: p, 0 < p ≤ 1.

    Returns:
        ``{name: bool tensor}`` in the same shapes.

    Raises:
        ArgumentError: ``density`` is out of range, or a value is negative or not finite.

    Reference:
        arXiv 2109.05687, section 2.3.

    Example:
        >>> child_masks({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([3.0, 2.0])}, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    if not 0 < density <= 1:
        raise ArgumentError("density", density, "must be in (0, 1]: the fraction of parameters in the child")
    if density == 1:
        return {name: torch.ones(v.shape, dtype=torch.bool, device=v.device) for name, v in fisher.items()}
    upper = torch.zeros(_HALF, dtype=torch.int64)
    for name, value in fisher.items():
        for bits in _chunks(name, value):
            upper += torch.bincount(bits >> 16, minlength=_HALF).cpu()
    upper[0] -= (zeros := _zeros(fisher))  # zeros have the lowest bits, and are never kept
    total = sum(v.numel() for v in fisher.values())
    wanted = min(max(1, int(density * total)), total - zeros)
    if wanted == 0:
        return {name: torch.zeros(v.shape, dtype=torch.bool, device=v.device) for name, v in fisher.items()}
    high, wanted_here = _bucket(upper, wanted)
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for name, value in fisher.items():
        for bits in _chunks(name, value):
            lower += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=_HALF).cpu()
    if high == 0:
        lower[0] -= zeros
    low, needed = _bucket(lower, wanted_here)
    limit, tied = (high << 16) | low, int(lower[low])
    masks, seen = {}, 0
    for name, value in fisher.items():
        parts = []
        for bits in _chunks(name, value):
            ties = (bits == limit).nonzero().view(-1)
            rank = torch.arange(seen, seen + ties.numel(), device=ties.device)
            seen += ties.numel()
            # A rank is ⌊i·tied/needed⌋ for some i exactly where ⌈rank·needed/tied⌉ is about to rise.
            kept = ((rank + 1) * needed + tied - 1) // tied > (rank * needed + tied - 1) // tied
            part = bits > limit
            part[ties[kept]] = True
            parts.append(part)
        flat = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=value.device)
        masks[name] = flat.view(value.shape)
    return masks


def _whole(value: Tensor) -> Tensor:
    full = getattr(value, "full_tensor", None)
    return (value if full is None else full()).detach()


def _chunks(name: str, value: Tensor) -> Iterable[Tensor]:
    """The values as integers in the same order (the bits of floats ≥ 0 sort as they do), some at a time."""
    flat = _whole(value).reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].float()
        if not bool(((part >= 0) & part.isfinite()).all()):
            mend = "not finite, or negative; the loss overflows on these batches, or this is not a Fisher information"
            raise ArgumentError(f"fisher[{name!r}]", part[~((part >= 0) & part.isfinite())][:1].item(), mend)
        yield part.add(0.0).view(torch.int32).long()  # add: −0 becomes 0


def _zeros(fisher: Fisher) -> int:
    return sum(int((bits == 0).sum()) for name, value in fisher.items() for bits in _chunks(name, value))


def _bucket(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket, counted from the top, that holds the element of rank ``wanted``, and its rank within it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, wanted))
    before = int(from_top[place - 1]) if place else 0
    return counts.numel() - 1 - place, wanted - before
