"""Adaptive model averaging: one ratio a block, learned from samples that score well."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DataError
from ..log import get
from .blocks import Blocks, lay_out
from .dialled import DialledModel
from .ends import Ends
from .parametrization import DEFAULT_LR, make, penalty_weights
from .ratios import Ratios, own_ratios
from .samples import Rows, Sample, batches, collate, encode, nll, read_rows

_logger = get("averaging")
Loss = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int, float], None]  # (step, steps, loss)


def learn_ratios(
    *,
    pre: str | os.PathLike[str],
    post: str | os.PathLike[str],
    data: Rows,
    blocks: Blocks = 3,
    mean: float = 0.2,
    pivots: Sequence[int] | None = None,
    steps: int = 100,
    batch_size: int = 8,
    micro_batch: int | None = None,
    lr: float | None = None,
    parametrization: str = "sigmoid",
    epsilon: float = 0.2,
    penalty: str = "l1",
    penalty_weight: float = 1e-4,
    head: float | str | None = None,
    embeddings: float | None = None,
    norms: float | None = None,
    max_length: int = 1024,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    loss: Loss | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Ratios:
    """Learn how much of each block of layers to give back.

        min over α:  NLL(samples; θ(α)) + λ·Σ_k w_k·|α_k − α₀|,   θ(α) = α·θ_pre + (1−α)·θ_post,   mean α_k = α₀

    The gradient with respect to α is exact; the checkpoints stay on disk, one model is in memory, and never more than
    one weight's gradient.

    Args:
        pre: the checkpoint before alignment: path or hub id. A ratio is its weight.
        post: the aligned checkpoint.
        data: samples that score well (see `collect_best_of_n`): a file of JSON lines, or rows with ``prompt`` and
            ``completion``, ``messages``, ``text`` or ``input_ids``. With ``loss``: batches of any kind.
        blocks: how many equal blocks of layers; ``"layer"``: a ratio a layer; ``"module"``: a ratio a kind of module.
        mean: α₀ in [0, 1].
        pivots: the last layer of each block but the last, inclusive, in place of ``blocks``.
        steps: optimizer steps; the step size follows a cosine to 0.
        batch_size: samples a step.
        micro_batch: samples at once, to save memory; the result is the same.
        lr: peak step: of the logits (0.1 by default), or with ``projection`` of the ratios (0.02).
        parametrization: ``"sigmoid"``, as published, lets a ratio exceed 1; ``"projection"`` keeps all in [0, 1].
        epsilon: ε of the published one.
        penalty: ``"l1"`` (w = 1), ``"depth"``, ``"released"`` or ``"none"``; see `penalty_weights`.
        penalty_weight: λ.
        head, embeddings, norms: their own, fixed ratios; α₀ by default. ``head="last"``: in the last block.
        max_length: tokens of a sample, at most.
        model: a loaded model to work in, which is changed; loaded from ``post`` by default.
        tokenizer: loaded from ``post`` by default, where rows are text.
        loss: ``loss(model, batch)``, in place of the samples' mean NLL a token.
        dtype: of the model: float32 on a CPU, ``post``'s own elsewhere, by default.
        device: a GPU where there is one, by default.
        seed: of the order of the samples.
        progress: called after every step.

    Returns:
        The ratios, each tensor's too, with the history.

    Raises:
        MismatchError: the checkpoints are not two of one architecture, shape and vocabulary.
        ArgumentError, DataError: an argument or a row cannot be used.

    Reference: arXiv 2309.06256, section 5 (AMA, later HMA). Here α weighs θ_pre, as in its code; ratios are float64
    (released: bfloat16, which hardly moves); every tensor has a ratio (released: linear modules only).

    Example:
        >>> import tempfile, safetensors.torch
        >>> folder = tempfile.mkdtemp()
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> for name, values in (("pre", (2.0, 2.0)), ("post", (1.0, 1.0))):
        ...     tensors = {f"{i}.weight": torch.full((1, 1), value) for i, value in enumerate(values)}
        ...     safetensors.torch.save_file(tensors, f"{folder}/{name}.safetensors")
        >>> ratios = learn_ratios(
        ...     pre=f"{folder}/pre.safetensors", post=f"{folder}/post.safetensors", model=model, blocks="layer",
        ...     mean=0.5, penalty="none", parametrization="projection", data=[torch.ones(1)], steps=100,
        ...     loss=lambda model, x: model[0](x).square().sum(),
        ... )
        >>> [round(block.ratio, 3) for block in ratios.blocks]
        [0.0, 1.0]
    """
    _check(steps, lr, penalty_weight, batch_size, micro_batch, max_length)
    ends = Ends(pre, post)
    if ends.pre.path == ends.post.path:
        raise ArgumentError("post", str(post), "is the same checkpoint as pre: there is nothing to average")
    layout = lay_out(ends.shapes, blocks, pivots, tied=ends.tied, head=head)
    own = own_ratios(mean, head=head, embeddings=embeddings, norms=norms)
    ratios = make(parametrization, len(layout.groups), mean, epsilon)
    weights = penalty_weight * penalty_weights(penalty, layout)
    where = _device(model, device)
    source = _source(data, loss, tokenizer, post, where, batch_size, micro_batch, max_length, seed)
    if model is None:
        model = load_model(post, dtype, where)
    peak = DEFAULT_LR[parametrization] if lr is None else lr
    history: list[dict[str, Any]] = []
    training = model.training
    model.eval()
    try:
        with DialledModel(model, ends, layout, own) as dialled:
            for step in range(steps):
                alpha = ratios.ratios
                dialled.dial(alpha)
                dialled.zero()
                value = _backward(model, next(source), loss)
                if not math.isfinite(value):
                    raise DataError(f"the loss of step {step} is {value}: look at the samples and the checkpoints")
                gradient = dialled.gradient.clone()
                away = alpha - mean
                history.append(
                    {
                        "step": step,
                        "loss": value,
                        "penalty": float((weights * away.abs()).sum()),
                        "ratios": alpha.tolist(),
                        "gradient": gradient.tolist(),
                    }
                )
                rate = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
                ratios.step(gradient + weights * away.sign(), rate)
                if progress is not None:
                    progress(step + 1, steps, value)
            dialled.dial(ratios.ratios)
    finally:
        model.train(training)
    settings = {
        "method": "adaptive",
        "pre": str(pre),
        "post": str(post),
        "data": str(data) if isinstance(data, str | os.PathLike) else None,
        "blocks": blocks if pivots is None else None,
        "pivots": None if pivots is None else list(pivots),
        "steps": steps,
        "batch_size": batch_size,
        "lr": peak,
        "parametrization": parametrization,
        "epsilon": epsilon if parametrization == "sigmoid" else None,
        "penalty": penalty,
        "penalty_weight": penalty_weight,
        "max_length": max_length,
        "seed": seed,
    }
    found = Ratios.from_layout(layout, ratios.ratios.tolist(), mean, own, history, settings)
    if found.extrapolates:
        _logger.warning(
            "a ratio lies outside [0, 1]: there the model is extrapolated; parametrization='projection' keeps all in"
        )
    return found


def _check(
    steps: int, lr: float | None, penalty_weight: float, batch_size: int, micro_batch: int | None, max_length: int
) -> None:
    for name, value in (("steps", steps), ("batch_size", batch_size), ("micro_batch", micro_batch)):
        if value is not None and (type(value) is not int or value < 1):
            raise ArgumentError(name, value, "must be a positive whole number")
    if lr is not None and not 0 < lr < math.inf:
        raise ArgumentError("lr", lr, "must be positive")
    if not 0 <= penalty_weight < math.inf:
        raise ArgumentError("penalty_weight", penalty_weight, "must be 0 or positive")
    if type(max_length) is not int or max_length < 2:
        raise ArgumentError("max_length", max_length, "must be at least 2 tokens")


def _device(model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if model is not None:
        return next(model.parameters()).device
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(
    post: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """The model that is dialled: float32 on a CPU, as stored elsewhere, unless a dtype is given."""
    from transformers import AutoModelForCausalLM

    where = _device(None, device)
    wanted: Any = dtype or (torch.float32 if where.type == "cpu" else "auto")
    model: Any = AutoModelForCausalLM.from_pretrained(post, dtype=wanted)
    return model.to(where)


def _source(
    data: Any,
    loss: Loss | None,
    tokenizer: Any,
    post: str | os.PathLike[str],
    device: torch.device,
    batch_size: int,
    micro_batch: int | None,
    max_length: int,
    seed: int,
) -> Iterator[Any]:
    """Endless batches: of samples as micro-batches with their share of the step's tokens, or the caller's own."""
    if loss is not None:
        given = list(data)
        if not given:
            raise DataError("data: holds no batches: give at least one")
        return itertools.cycle(given)
    samples = load_samples(data, post, tokenizer, max_length)
    return (_split(batch, micro_batch or batch_size, device) for batch in batches(samples, batch_size, seed))


def load_samples(
    data: Rows, post: str | os.PathLike[str], tokenizer: Any = None, max_length: int = 1024
) -> list[Sample]:
    """Samples as tokens; see `learn_ratios`."""
    rows = read_rows(data)
    if tokenizer is None and "input_ids" not in rows[0]:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(post)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"data: rows of text need a tokenizer, and post={str(post)!r} has none ({reason})"
            ) from None
    return encode(rows, tokenizer, max_length)


def _split(batch: list[Sample], size: int, device: torch.device) -> Iterator[tuple[dict[str, Tensor], int]]:
    tokens = sum(sample.learned for sample in batch)
    for start in range(0, len(batch), size):
        yield collate(batch[start : start + size], device), tokens


def _backward(model: nn.Module, batch: Any, loss: Loss | None) -> float:
    if loss is not None:
        value = loss(model, batch)
        value.backward()
        return float(value.detach())
    total = 0.0
    for part, tokens in batch:
        value = nll(model, part) / tokens
        value.backward()
        total += float(value.detach())
    return total
