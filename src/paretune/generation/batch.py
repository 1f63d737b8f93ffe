"""One batch of answers through transformers' ``generate``; rows that have ended leave it.

Answers differ in length, and a batch lasts as long as its longest. Whenever half of the rows have ended, ``generate``
is stopped and goes on with the others, from their keys and values: no token is computed twice, and a batch of n rows
is stopped at most log2(n) times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .decoding import Decoding
from .draws import Draws

_FEW = 8  # rows that are not worth another stop


def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    draws: Sequence[int],
    ends: list[int],
    decoding: Decoding,
    *,
    shrink: bool = True,
) -> list[list[int]]:
    """The tokens after each prompt, up to ``decoding.max_new_tokens``; an end token may be followed by padding.

    Args:
        model: causal, in evaluation mode.
        tokenizer: of the model.
        prompts: token ids.
        draws: what seeds each row's sampling.
        ends: token ids that end an answer.
        decoding: how.
        shrink: let rows that have ended leave the batch, where the model's cache allows it.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    shrink = shrink and _shrinks(model)
    found: list[list[int]] = [[] for _ in prompts]
    places, seeds = torch.arange(len(prompts)), torch.tensor(list(draws), dtype=torch.int64)
    cache: Any = None
    while True:
        stops = _Stops(tokenizer, decoding.stop, width) if decoding.stop else None
        ended = _Ended(ids, ends, stops, len(places) // 2 if shrink and len(places) > _FEW else 0)
        processors: list[Any] = [] if decoding.greedy else [_drawn(seeds[places].tolist(), width, decoding)]
        settings = GenerationConfig(
            do_sample=False,  # the draws are in the processor
            max_new_tokens=width + decoding.max_new_tokens - ids.shape[1],
            eos_token_id=ends or None,
            pad_token_id=pad,
            use_cache=True,
            return_dict_in_generate=shrink,
        )
        made = _generate(
            model,
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([ended]),
            **({} if cache is None else {"past_key_values": cache}),
        )
        ids = made.sequences if shrink else made
        full = not shrink or ids.shape[1] >= width + decoding.max_new_tokens
        done = torch.ones_like(places, dtype=torch.bool) if full else ended.rows.cpu()
        for place, row in zip(places[done].tolist(), ids[done.to(ids.device), width:].tolist(), strict=True):
            found[place] = row
        if bool(done.all()):
            return found
        left = (~done).nonzero()[:, 0]
        places, left = places[left], left.to(ids.device)
        cache = made.past_key_values
        cache.batch_select_indices(left)
        ids = ids[left]
        mask = torch.cat([mask[left], mask.new_ones(len(left), ids.shape[1] - mask.shape[1])], 1)


class _Ended:
    """A stopping criterion: which rows have ended; all of them once no more than ``least`` are left."""

    def __init__(self, ids: Tensor, ends: list[int], stops: _Stops | None, least: int) -> None:
        self.rows = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.halted = torch.zeros((), dtype=torch.bool, device=ids.device)
        self.ends = torch.tensor(ends, dtype=ids.dtype, device=ids.device)
        self.stops, self.least = stops, least

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = self.rows | torch.isin(input_ids[:, -1], self.ends)
        if self.stops is not None:
            rows = rows | self.stops(input_ids)
        # Transformers may go on for a step, in which all rows are padded.
        self.rows = torch.where(self.halted, self.rows, rows)
        self.halted = self.halted | ((~self.rows).sum() <= self.least)
        return self.rows | self.halted


class _Stops:
    """Rows in whose last tokens a stop text is found.

    (transformers' own criterion fails for vocabularies of words.)
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int) -> None:
        self.tokenizer, self.stops, self.width = tokenizer, stops, width
        self.tail = max(len(text.encode()) for text in stops) + 8  # tokens; each holds a byte or more

    def __call__(self, input_ids: Tensor) -> Tensor:
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.tail) :].tolist()
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _shrinks(model: Any) -> bool:
    """Whether the model keeps nothing of a row but its keys and values, in a cache of transformers' own."""
    from transformers import cache_utils

    if hasattr(model, "get_base_model"):
        # Prompt learning puts virtual tokens in front, and fills the cache itself.
        if model.active_peft_config.is_prompt_learning:
            return False
        model = model.get_base_model()
    if getattr(model, "_is_stateful", False) or not model._supports_default_dynamic_cache():
        return False
    layers = cache_utils.DynamicCache(config=model.config).layers
    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    return bool(layers) and all(type(layer) in plain for layer in layers)


def _generate(model: Any, **given: Any) -> Any:
    """The model's ``generate`` with what is given, and nothing else.

    transformers fills what is unset from the model's own file: a repetition penalty there would go unrecorded. PEFT
    hands its own settings on to the model inside, so both are put back.
    """
    from transformers import GenerationConfig

    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    kept = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            return model.generate(**given)
    finally:
        for holder, own in zip(holders, kept, strict=True):
            holder.generation_config = own


def _drawn(draws: Sequence[int], width: int, decoding: Decoding) -> Draws:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TopKLogitsWarper(decoding.top_k)] if decoding.top_k else []
    warpers += [TopPLogitsWarper(decoding.top_p)] if decoding.top_p < 1 else []
    return Draws(draws, width, decoding.temperature, warpers)
