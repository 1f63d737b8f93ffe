"""DPO's implicit reward on preference pairs: margin and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, DataError
from ..generation import model_fingerprint
from .reward import Item


class DPOMargin:
    """How much more the policy prefers the chosen answer than the reference does.

        margin = β·(log π(y_w|x) − log π_ref(y_w|x) − log π(y_l|x) + log π_ref(y_l|x))

    A pair is won where the margin is positive; ``accuracy`` is the share of pairs won in the last call. The reference's
    log-probabilities are computed once and kept, so that the same object serves a policy that is changed in place.

    Args:
        policy: a causal language model.
        reference: the model before alignment: another object than the policy.
        tokenizer: of both.
        beta: β, > 0.
        batch_size: pairs at once.

    Raises:
        ArgumentError: β is not positive, or policy and reference are one object.

    Reference: arXiv 2305.18290, section 4 (r̂); sums over answer tokens, the end token included, as in TRL.
    """

    name = "dpo margin"
    pairwise = True
    unit = "margin"

    def __init__(self, policy: Any, reference: Any, tokenizer: Any, *, beta: float = 0.1, batch_size: int = 8) -> None:
        if not beta > 0:
            raise ArgumentError("beta", beta, "give a positive number")
        if policy is reference:
            raise ArgumentError("reference", type(reference).__name__, "is the policy itself: load it separately")
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.beta, self.batch_size = beta, batch_size
        self.accuracy = float("nan")
        self._known: dict[tuple[tuple[int, ...], int], float] = {}

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """Margins, in order; ``answer`` is chosen, ``other`` rejected."""
        pairs = [
            (self._tokens(item, item.answer, number), self._tokens(item, item.other or "", number))
            for number, item in enumerate(items)
        ]
        asked = [row for pair in pairs for row in pair]
        new = [row for row in dict.fromkeys(asked) if row not in self._known]
        self._known.update(zip(new, logps(self.reference, new, self.batch_size), strict=True))
        policy = dict(zip(asked, logps(self.policy, asked, self.batch_size), strict=True))
        margins = [
            self.beta * (policy[chosen] - self._known[chosen] - policy[rejected] + self._known[rejected])
            for chosen, rejected in pairs
        ]
        self.accuracy = sum(margin > 0 for margin in margins) / max(1, len(margins))
        return list(margins)

    def record(self) -> dict[str, Any]:
        """β, accuracy and both fingerprints."""
        return {
            "reward": self.name,
            "kind": "dpo",
            "beta": self.beta,
            "accuracy": self.accuracy,
            "policy": model_fingerprint(self.policy),
            "reference": model_fingerprint(self.reference),
        }

    def _tokens(self, item: Item, answer: str, number: int) -> tuple[tuple[int, ...], int]:
        """(token ids of prompt and answer, length of the prompt)."""
        tokenizer = self.tokenizer
        if isinstance(item.prompt, str):
            prompt = tokenizer(item.prompt, verbose=False).input_ids
            ids = tokenizer(item.prompt + answer, verbose=False).input_ids
            ids += [tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else []
        else:
            write, quiet = tokenizer.apply_chat_template, {"verbose": False}
            turns: list[Any] = list(item.prompt)
            prompt = write(turns, add_generation_prompt=True, return_dict=False, tokenizer_kwargs=quiet)
            turns = [*turns, {"role": "assistant", "content": answer}]
            ids = write(turns, return_dict=False, tokenizer_kwargs=quiet)
        room = getattr(self.policy.config.get_text_config(), "max_position_embeddings", None)
        if len(ids) <= len(prompt) or (room and len(ids) > room):
            raise DataError(
                f"pair {number} has {len(ids)} tokens, {len(prompt)} of them in the prompt, the model room for {room}: "
                "drop it"
            )
        return tuple(ids), len(prompt)


def logps(model: Any, rows: Sequence[tuple[tuple[int, ...], int]], batch_size: int = 8) -> list[float]:
    """log π(answer | prompt) of each row, summed over the answer's tokens.

    Args:
        model: a causal language model; put into evaluation mode meanwhile.
        rows: (token ids of prompt and answer, length of the prompt).
        batch_size: rows at once; never changes a value beyond rounding.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    found = [0.0] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(rows[i][0]) for i in batch)
            ids = torch.tensor([[*rows[i][0], *[0] * (width - len(rows[i][0]))] for i in batch], device=model.device)
            lengths = torch.tensor([len(rows[i][0]) for i in batch], device=model.device)
            mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, place in enumerate(batch):
                tokens, prompt = rows[place]
                found[place] = float(_logp(logits[row, prompt - 1 : len(tokens) - 1], ids[row, prompt : len(tokens)]))
    finally:
        model.train(was_training)
    return found


def _logp(logits: Tensor, targets: Tensor) -> Tensor:
    # One row at a time: float32 copies of a whole batch of logits would be the largest tensors of all.
    return logits.float().log_softmax(-1).gather(-1, targets[:, None]).sum()
