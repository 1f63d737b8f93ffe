"""PairRM's preference between two answers, with plain transformers, on the ``PairRM-hf`` layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, CheckpointError, DataError, examples
from ..generation import model_fingerprint
from .reward import Item

_MARKS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
_SOURCE_TOKENS, _CANDIDATE_TOKENS = 1224, 412  # as published: 2,048 in all


class PairRM:
    """The probability that an answer beats another one, both orders averaged.

    An encoder reads "source, first, second", each after a mark of its own. With h the last hidden states at the three
    marks and s the head (linear, tanh, linear):

        ℓ(a, b) = mean over tasks of s[h_source; h_a] − s[h_source; h_b]
        value   = σ((ℓ(answer, other) − ℓ(other, answer)) / 2)

    Args:
        path: a directory or hub id in the layout of ``llm-blender/PairRM-hf``.
        batch_size: pairs at once.
        device: where to; the accelerator where there is one.

    Raises:
        CheckpointError: the checkpoint has another layout or lacks weights.

    Reference: arXiv 2306.02561, section 3; the order-averaged comparison of its released code.
    """

    name = "PairRM"
    pairwise = True
    unit = "win probability"

    def __init__(self, path: str, *, batch_size: int = 8, device: str | None = None) -> None:
        from transformers import AutoTokenizer

        if batch_size < 1:
            raise ArgumentError("batch_size", batch_size, "give at least 1")
        self.path, self.batch_size = path, batch_size
        folder = _folder(path)
        self.model, self._pooled = _load(folder, path)
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: has no tokenizer: {' '.join(str(error).split())}") from error
        texts = dict(zip(self._pooled, ("<|source|>", "<|candidate1|>", "<|candidate2|>"), strict=True))
        for mark, text in texts.items():
            if self.tokenizer.convert_tokens_to_ids(text) != mark:
                raise CheckpointError(f"{path}: its tokenizer does not know {text}: give the tokenizer of PairRM-hf")
        self.truncated = 0

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """Win probabilities, in order."""
        self.truncated = 0
        prompts = [_text(item.prompt) for item in items]
        answers, others = [item.answer for item in items], [item.other or "" for item in items]
        forward = self.logits(prompts, answers, others)
        backward = self.logits(prompts, others, answers)
        return [float(torch.sigmoid(torch.tensor((f - b) / 2, dtype=torch.float64)))
                for f, b in zip(forward, backward, strict=True)]  # fmt: skip

    def logits(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """ℓ(first, second) of each triple, in this order only; positive where the first is better."""
        from tqdm import trange

        rows = [self._tokens(*triple) for triple in zip(prompts, first, second, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = [0.0] * len(rows)
        for start in trange(0, len(order), self.batch_size, unit="batch", disable=None):
            batch = order[start : start + self.batch_size]
            width = max(len(rows[i]) for i in batch)
            pad = self.tokenizer.pad_token_id
            ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in batch])
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch])
            with torch.no_grad():
                values = self.model(ids.to(self._device), mask.to(self._device))
            for place, value in zip(batch, values.tolist(), strict=True):
                found[place] = value
        return found

    def record(self) -> dict[str, Any]:
        """Model, fingerprint and truncated texts."""
        return {
            "reward": self.path,
            "kind": "PairRM",
            "fingerprint": self._fingerprint,
            "orders": 2,
            "truncated": self.truncated,
        }

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(self.model)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _tokens(self, prompt: str, first: str, second: str) -> list[int]:
        room = _SOURCE_TOKENS + 2 * _CANDIDATE_TOKENS
        source = self._piece(f"<|source|>{prompt}", _SOURCE_TOKENS)
        each = (room - len(source)) // 2
        return source + self._piece(f"<|candidate1|>{first}", each) + self._piece(f"<|candidate2|>{second}", each)

    def _piece(self, text: str, limit: int) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False).input_ids
        ids = ids[:2] + [token for token in ids[2:] if token not in self.model.marks]  # an answer may write marks too
        if len(ids) <= limit:
            return ids
        self.truncated += 1
        # What is cut is the end of the text, not the separator after it.
        return ids[: limit - 1] + ids[-1:]


class _Ranker(nn.Module):
    """DeBERTa with PairRM's head; its parameters have the checkpoint's names."""

    def __init__(self, config: Any, marks: Sequence[int], tasks: int) -> None:
        from transformers import DebertaV2Model

        super().__init__()
        size = config.hidden_size
        self.config = config
        self.pretrained_model = DebertaV2Model(config)
        # The places of the published head's dropouts stay empty, so that names agree.
        self.head_layer = nn.Sequential(
            nn.Identity(), nn.Linear(2 * size, size), nn.Tanh(), nn.Identity(), nn.Linear(size, tasks)
        )
        self.marks = tuple(marks)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)
        source, first, second = (hidden[rows, (ids == mark).int().argmax(1)] for mark in self.marks)
        left = self.head_layer(torch.cat([source, first], -1))
        return (left - self.head_layer(torch.cat([source, second], -1))).mean(-1)


def _folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{path}: no directory, and no model on the hub: give PairRM-hf") from error


def _load(folder: Path, path: str) -> tuple[_Ranker, tuple[int, ...]]:
    from safetensors.torch import load_file
    from transformers import DebertaV2Config

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path}: has no config.json: give a directory in the layout of PairRM-hf")
    settings = json.loads((folder / "config.json").read_text())
    lacking = [name for name in (*_MARKS, "n_tasks") if name not in settings]
    if lacking:
        raise CheckpointError(f"{path}: its config lacks {examples(lacking)}: give a model in the layout of PairRM-hf")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: has no safetensors weights: convert it")
    marks = tuple(int(settings[name]) for name in _MARKS)
    model = _Ranker(DebertaV2Config.from_dict(settings), marks, int(settings["n_tasks"])).eval()
    weights = {name: tensor.float() for file in files for name, tensor in load_file(file).items()}
    weights.pop("pretrained_model.embeddings.position_ids", None)  # a buffer of old releases
    found = model.load_state_dict(weights, strict=False)
    if found.missing_keys or found.unexpected_keys:
        names = [*found.missing_keys, *found.unexpected_keys]
        raise CheckpointError(f"{path}: missing or unknown weights: {examples(names)}: give the layout of PairRM-hf")
    return model, marks


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if any(not isinstance(turn, dict) for turn in prompt):
        raise DataError("PairRM reads text: give prompts as text or conversations, not as token ids")
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{turn['role'].upper()}: {turn['content']}" for turn in prompt)
