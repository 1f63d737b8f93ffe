"""Sums of squared gradients of single sequences: a diagonal Fisher, streamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DataError, examples
from ..task_vector import plain_name

Sequences: TypeAlias = Iterable[Mapping[str, Any]]  # each of input_ids and completion_mask


@dataclass(frozen=True)
class SquaredGradients:
    """The mean of squared gradients.

    Args:
        sums: ``{plain name: float32}``: of the parameter's shape, or their sum over it.
        count: how many sequences.
    """

    sums: dict[str, Tensor]
    count: int


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The floating-point parameters, each once, by their plain names; those of quantised layers are left out."""
    return {plain_name(name): p for name, p in model.named_parameters() if p.is_floating_point()}


def log_probability(model: nn.Module, sequence: Mapping[str, Any], argument: str = "sequence") -> Tensor:
    """log π(answer | prompt) of one sequence, in nats and float32.

    Args:
        model: a causal language model.
        sequence: ``input_ids`` and ``completion_mask``, as long as each other; the first token is never counted.
        argument: what to call it in errors.

    Raises:
        DataError: the two differ in length, or the mask marks no token after the first.
    """
    ids, mask = list(sequence["input_ids"]), list(sequence["completion_mask"])
    if len(ids) != len(mask):
        raise DataError(f"{argument}: {len(ids)} input_ids but {len(mask)} marks in completion_mask")
    if not any(mask[1:]):
        raise DataError(f"{argument}: a sequence whose completion_mask marks no token after the first")
    device = next(model.parameters()).device
    row = torch.as_tensor(ids, device=device)[None]
    marked = torch.as_tensor(mask[1:], device=device, dtype=torch.bool)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1][marked]
    return logits.float().log_softmax(-1).gather(-1, row[0, 1:][marked][:, None]).sum()


def squared_gradients(
    model: nn.Module,
    sequences: Sequences,
    argument: str,
    *,
    entries: bool = True,
    scratch: str | os.PathLike[str] | None = None,
) -> SquaredGradients:
    """F = 1/n·Σ_j (∂ log π(answer_j)/∂θ)², one sequence at a time.

    Each gradient is squared, added and freed as soon as backward has made it, so that no more than the largest one is
    held beside the sums. The model is put into evaluation mode meanwhile.

    Args:
        model: at which the gradients are taken; every floating-point parameter counts, frozen or not.
        sequences: see `log_probability`; any iterable.
        argument: what to call them in errors.
        entries: keep F of every entry; else its sum over each tensor.
        scratch: a directory that holds the sums of entries as files instead of memory.

    Raises:
        DataError: there are none, or a gradient is not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_attention_heads=1, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))
        >>> found = squared_gradients(model, [{"input_ids": [1, 2], "completion_mask": [0, 1]}], "samples")
        >>> found.count, found.sums["lm_head.weight"].shape
        (1, torch.Size([8, 4]))
    """
    named = trained(model)
    with _scratch(scratch) as folder:
        return _streamed(model, named, sequences, argument, entries, folder)


def _streamed(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    sequences: Sequences,
    argument: str,
    entries: bool,
    folder: Path | None,
) -> SquaredGradients:
    sums = {name: _zeros(p, i, folder) if entries else torch.zeros((), device=p.device)
            for i, (name, p) in enumerate(named.items())}  # fmt: skip
    kept = {name: (p.grad, p.requires_grad) for name, p in named.items()}
    modes = {module: module.training for module in model.modules()}
    count, handles = 0, []
    try:
        model.eval()
        for name, p in named.items():
            p.grad = None
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(_adding(sums[name], entries)))
        for sequence in sequences:
            with torch.enable_grad():
                log_probability(model, sequence, argument).backward()
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        for name, p in named.items():
            p.grad = None
            p.requires_grad_(kept[name][1])
            p.grad = kept[name][0]
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise DataError(f"{argument} is empty: give a few dozen sequences at least")
    if broken := [name for name, value in sums.items() if not bool(value.isfinite().all())]:
        raise DataError(f"{argument}: gradients that are not finite: {examples(broken)}; load the model in float32")
    return SquaredGradients({name: value.div_(count) for name, value in sums.items()}, count)


def _adding(total: Tensor, entries: bool) -> Any:
    def add(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        gradient = parameter.grad.detach().float()
        parameter.grad = None
        if entries:
            total.addcmul_(gradient.to(total.device), gradient.to(total.device))
        else:
            total.add_(gradient.reshape(-1).dot(gradient.reshape(-1)))

    return add


@contextmanager
def _scratch(directory: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """A folder whose files stay mapped after it is gone; None keeps everything in memory."""
    if directory is None:
        yield None
        return
    if not Path(directory).is_dir():
        raise ArgumentError("scratch", os.fspath(directory), "is no directory")
    with tempfile.TemporaryDirectory(prefix="fisher-", dir=directory) as folder:
        yield Path(folder)


def _zeros(parameter: Tensor, number: int, folder: Path | None) -> Tensor:
    if folder is None or parameter.numel() == 0:
        return torch.zeros(parameter.shape, device=parameter.device)
    flat = torch.from_file(str(folder / f"{number}"), shared=True, size=parameter.numel(), dtype=torch.float32)
    return flat.view(parameter.shape)  # a new file reads as zeros
