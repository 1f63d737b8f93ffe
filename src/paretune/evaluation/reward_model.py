"""Reward models: sequence classification with one output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ..errors import ArgumentError, CheckpointError, DataError
from ..generation import model_fingerprint
from ..generation.local import check_model
from .reward import Item


class RewardModel:
    """The score of a sequence-classification model for (prompt, answer).

    Conversations go through the model's chat template; without one, an encoder with a separator token reads prompt and
    answer as a pair. Answers are padded on the right and never mixed: a score is the same in any batch.

    Args:
        model: a directory, hub id, or loaded model.
        tokenizer: of a loaded model.
        batch_size: items at once.
        max_length: the longest text in tokens; the model's own limit by default.
        truncate: cut longer texts at the start, and count them, instead of refusing them.
        pad_token: sets the padding token.
        dtype: of the weights; float32 keeps scores equal to 1e-5 whatever the batch.
        device: where to; the accelerator where there is one.

    Raises:
        CheckpointError: the checkpoint has no trained score head, or more than one output.
        ArgumentError: no usable padding token, or no way to write a conversation.

    Reference: the Bradley–Terry reward of arXiv 2203.02155, section 3.5; no normalisation is applied.
    """

    pairwise = False
    unit = "score"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        truncate: bool = False,
        pad_token: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> None:
        self.name = str(model) if isinstance(model, str) else type(model).__name__
        if isinstance(model, str):
            check_model(model)
            model, tokenizer = _load(model, dtype, device)
        if tokenizer is None:
            raise ArgumentError("tokenizer", None, "give the reward model's tokenizer")
        if model.config.num_labels != 1:
            raise CheckpointError(
                f"{self.name}: has {model.config.num_labels} outputs, a reward has one: give a reward model"
            )
        if batch_size < 1:
            raise ArgumentError("batch_size", batch_size, "give at least 1")
        self.model, self.tokenizer, self.batch_size, self.truncate = model.eval(), tokenizer, batch_size, truncate
        limits = [max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None)]
        self.max_length = min((limit for limit in limits if limit), default=None)
        self.truncated = 0
        self._pad = _pad_token(model, tokenizer, pad_token)
        if not tokenizer.chat_template and tokenizer.sep_token_id is None:
            raise ArgumentError("tokenizer", self.name, "it has no chat template: set the one of the training")

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """Scores, in order."""
        from tqdm import trange

        encoded = self._encode(items)
        order = sorted(range(len(items)), key=lambda i: -len(encoded[i]["input_ids"]))
        scores: list[float | None] = [None] * len(items)
        for start in trange(0, len(order), self.batch_size, unit="batch", disable=None):
            batch = order[start : start + self.batch_size]
            with torch.no_grad():
                logits = self.model(**self._padded([encoded[i] for i in batch])).logits
            for place, value in zip(batch, logits[:, 0].float().tolist(), strict=True):
                scores[place] = value
        return scores

    def record(self) -> dict[str, Any]:
        """Model, fingerprint and truncated texts."""
        return {
            "reward": self.name,
            "kind": "reward model",
            "fingerprint": self._fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "truncated": self.truncated,
        }

    def _encode(self, items: Sequence[Item]) -> list[dict[str, list[int]]]:
        self.truncated, encoded = 0, []
        for number, item in enumerate(items):
            row = self._tokens(item)
            length = len(row["input_ids"])
            if self.max_length is not None and length > self.max_length:
                if not self.truncate:
                    raise DataError(
                        f"answer {number} has {length} tokens with its prompt, {self.name} takes {self.max_length}: "
                        "truncate=True cuts prompts at the start, or drop the item"
                    )
                self.truncated += 1
                row = {name: values[-self.max_length :] for name, values in row.items()}
            if not self._encoder and row["input_ids"][-1] == self._pad:
                raise ArgumentError(
                    "pad_token",
                    self.tokenizer.pad_token,
                    "answers end with it, so the model would score the token before: give another pad_token",
                )
            encoded.append(row)
        return encoded

    def _tokens(self, item: Item) -> dict[str, list[int]]:
        tokenizer = self.tokenizer
        if tokenizer.chat_template:
            prompt = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else list(item.prompt)
            turns = [*prompt, {"role": "assistant", "content": item.answer}]
            ids = tokenizer.apply_chat_template(turns, return_dict=False, tokenizer_kwargs={"verbose": False})
            return {"input_ids": ids}
        prompt_text = item.prompt
        if not isinstance(prompt_text, str):
            if len(prompt_text) != 1 or not isinstance(prompt_text[0], dict):
                raise DataError(f"{self.name} has no chat template: it scores single turns only")
            prompt_text = prompt_text[0]["content"]
        row = tokenizer(prompt_text, item.answer, verbose=False)
        return {name: row[name] for name in ("input_ids", "token_type_ids") if name in row}

    def _padded(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self._pad, "token_type_ids": 0}
        tensors = {
            name: torch.tensor([row[name] + [fill[name]] * (width - len(row[name])) for row in rows])
            for name in rows[0]
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        tensors["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return {name: tensor.to(self.model.device) for name, tensor in tensors.items()}

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(self.model)

    @property
    def _encoder(self) -> bool:
        """Whether the first token is pooled, where padding cannot matter."""
        return not self.tokenizer.chat_template


def _load(path: str, dtype: torch.dtype, device: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classifier: Any = AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, found = classifier.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be loaded as a reward model: {reason}") from error
    if found["missing_keys"]:
        raise CheckpointError(
            f"{path}: lacks {', '.join(sorted(found['missing_keys'])[:3])}, which would be random: "
            "give a trained reward model"
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def _pad_token(model: Any, tokenizer: Any, wanted: str | None) -> int:
    """The padding token, made known to the model, which looks for it to find the last token."""
    if wanted is not None:
        if wanted not in tokenizer.get_vocab():
            raise ArgumentError("pad_token", wanted, "the tokenizer does not know it: name one of its tokens")
        tokenizer.pad_token = wanted
    pad = tokenizer.pad_token_id
    if pad is None:
        raise ArgumentError("pad_token", None, "the tokenizer has none: name a token that ends no answer")
    model.config.get_text_config().pad_token_id = pad
    return int(pad)
