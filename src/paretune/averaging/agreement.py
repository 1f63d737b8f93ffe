"""How much of what the reference says by itself another setting of the same model still says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError
from ..generation import Decoding, generate
from .dial import Agreement

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGITS = 1 << 26  # elements that are held at a time: 256 MB in float32


class OwnAnswers:
    """The reference's samples and greedy answers, remembered while it is the model, and asked of it after changes.

        KL ≈ mean over the samples' tokens of log π_ref − log π;   exact = share of greedy answers that stay the same

    A greedy answer stays word for word where each of its tokens is still the likeliest after those before it: one
    forward pass tells, nothing is written anew. Answers of which that is not true of the reference itself (text that
    its tokenizer cuts another way) are not watched.

    Args:
        model: the reference, which is changed in place afterwards.
        tokenizer: its tokenizer.
        samples: from `own_samples`.
        max_tokens: of a greedy answer.
        batch_size: sequences at once, at most.

    Raises:
        DataError: no greedy answer can be watched.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = 64,
        batch_size: int = 16,
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.samples = [(list(row["input_ids"]), list(row["completion_mask"])) for row in samples]
        self._tokens = sum(sum(mask) for _, mask in self.samples)
        # Half of a turn or a text, to be continued as the reference would.
        prompts = [ids[: max(1, len(ids) // 2)] for ids, _ in self.samples]
        decoding = Decoding(max_tokens, batch_size=batch_size)
        self.answers = []
        for prompt, answer in zip(prompts, generate(model, prompts, decoding, tokenizer, progress=False), strict=True):
            said = list(tokenizer(answer.text, add_special_tokens=False).input_ids)
            if answer.finished and tokenizer.eos_token_id is not None:
                said.append(tokenizer.eos_token_id)
            if said:
                self.answers.append((prompt + said, [0] * len(prompt) + [1] * len(said)))
        before = self._logps(), self._same()
        self._before = before[0]
        self.answers = [row for row, same in zip(self.answers, before[1], strict=True) if same]
        if not self.answers:
            raise DataError("none of the reference's greedy answers can be read back by its tokenizer: fix its decoder")

    def __call__(self) -> Agreement:
        """The model as it is now."""
        same = self._same()
        return Agreement(sum(same) / len(same), (self._before - self._logps()) / self._tokens)

    def _logps(self) -> float:
        """log π of all samples together."""
        return sum(
            float((marked.gather(-1, said[:, None])[:, 0] - marked.logsumexp(-1)).sum())
            for _, marked, said in self._marked(self.samples)
        )

    def _same(self) -> list[bool]:
        """Which greedy answers the model would give."""
        found = dict.fromkeys(range(len(self.answers)), True)
        for row, marked, said in self._marked(self.answers):
            found[row] = bool((marked.argmax(-1) == said).all())
        return list(found.values())

    @torch.no_grad()
    def _marked(self, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Each row's number, its logits before every marked token (float32), and these tokens."""
        device = next(self.model.parameters()).device
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        width = max(1, self.model.config.get_text_config().vocab_size)
        while order:
            longest = len(rows[order[-1]][0])
            count = max(1, min(self.batch_size, _LOGITS // (longest * width)))
            batch, order = order[-count:], order[:-count]
            # Padded on the right: nothing attends to what follows it.
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            for at, i in enumerate(batch):
                ids[at, : len(rows[i][0])] = torch.tensor(rows[i][0])
            ids = ids.to(device)
            logits = self.model(input_ids=ids, use_cache=False).logits
            for at, i in enumerate(batch):
                marks = torch.tensor(rows[i][1][1:], dtype=torch.bool, device=device).nonzero()[:, 0]
                yield i, logits[at, marks].float(), ids[at, marks + 1]
