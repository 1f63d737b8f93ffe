"""Rows of any format that TRL takes, as token sequences with the completion marked.

Tokenising follows TRL's trainers: chat templates for messages, an end mark after plain completions, and a completion
that begins where prompt and prompt+completion diverge.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import DataError
from paretune.training.data import check_columns, load_splits, take_split
from paretune.training.trl_classes import trl

if TYPE_CHECKING:
    from datasets import Dataset

_logger = logging.getLogger("paretune.training")
# What a tokenised row consists of: "prompt" ids and one list of completion ids each.
_PROMPT = "prompt_ids"


@dataclass(frozen=True)
class Sequences:
    """Token sequences in flat arrays.

    Args:
        ids: [tokens] int32, all sequences one after the other.
        completion: [tokens] bool, true where a token counts for the loss.
        starts: [sequences + 1] int64, where each begins; the last entry is the number of tokens.

    Example:
        >>> sequences = Sequences.of([([5, 6, 7], [False, True, True]), ([5, 8], [False, True])])
        >>> sequences.pad([0, 1], fill=0)[0].tolist()
        [[5, 6, 7], [5, 8, 0]]
    """

    ids: np.ndarray
    completion: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Sequences:
        """Pack ``(ids, completion mask)`` rows."""
        pairs = list(rows)
        lengths = [len(ids) for ids, _ in pairs]
        return cls(
            ids=np.fromiter((i for ids, _ in pairs for i in ids), np.int32, sum(lengths)),
            completion=np.fromiter((c for _, mask in pairs for c in mask), bool, sum(lengths)),
            starts=np.cumsum([0, *lengths], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[sequences] tokens in each."""
        return np.diff(self.starts)

    def pad(self, rows: Sequence[int], fill: int) -> tuple[Tensor, Tensor]:
        """Some sequences, padded on the right.

        Args:
            rows: which ones.
            fill: the padding token.

        Returns:
            [rows, length] int64 ids and [rows, length] bool completion mask.
        """
        spans = [(int(self.starts[row]), int(self.starts[row + 1])) for row in rows]
        width = max(end - start for start, end in spans)
        ids = np.full((len(spans), width), fill, np.int64)
        completion = np.zeros((len(spans), width), bool)
        for place, (start, end) in enumerate(spans):
            ids[place, : end - start] = self.ids[start:end]
            completion[place, : end - start] = self.completion[start:end]
        return torch.from_numpy(ids), torch.from_numpy(completion)

    def digest(self) -> str:
        """A hash of every token and mark."""
        digest = hashlib.sha256()
        for part in (self.ids, self.completion, self.starts):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:32]


def take_rows(data: Any, kind: str, *, name: str) -> Dataset:
    """The rows of a data set, checked.

    Args:
        data: a ``datasets.Dataset``, a sequence of rows, or what :func:`paretune.training.data.load_splits` reads.
        kind: what it must be good for: ``sft``, ``dpo`` or ``kto``.
        name: for messages.

    Raises:
        DataError: no rows, missing columns or values, or a stream.
    """
    import datasets

    if isinstance(data, (str, os.PathLike)):
        path = os.fspath(data)
        data = take_split(load_splits(path, argument=name), "train", name=path, argument=name)
    if isinstance(data, (datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise DataError(f"{name}={type(data).__name__}: give one split with a known number of rows, not a stream")
    if not isinstance(data, datasets.Dataset):
        rows = list(data)
        if not rows:
            raise DataError(f"{name}: it holds no rows; give a data set that is not empty")
        data = datasets.Dataset.from_list([dict(row) for row in rows])
    check_columns(data, kind, name="", argument=name)
    return data


def sft_rows(data: Dataset, tokenizer: Any, max_length: int | None, *, name: str) -> Sequences:
    """Demonstrations; only completions count.

    ``prompt``+``completion`` counts the completion, ``messages`` (or ``conversations``) every assistant turn, plain
    ``text`` every token, ``input_ids`` what ``labels`` or ``completion_mask`` say (all where neither is there).

    Args:
        data: from :func:`take_rows`.
        tokenizer: with a chat template where rows are messages.
        max_length: tokens kept of each row, from its start; None keeps all.
        name: for messages.

    Raises:
        DataError: the chat template cannot tell the assistant's turns, or truncation leaves nothing to train on.
    """
    if "input_ids" in data.column_names:
        tokenised = _map(data, _given_ids)
    else:
        tokenised = _map(data, _SFT(tokenizer, name))
    kept = (
        (row["ids"][:max_length], [bool(mark) for mark in row["completion"][:max_length]])
        for row in tokenised.select_columns(["ids", "completion"])
    )
    # The first token of a sequence is never predicted.
    return _with_completions(kept, max_length, name)


def pair_rows(data: Dataset, tokenizer: Any, max_length: int | None, *, name: str) -> Sequences:
    """Preference pairs: sequence 2i is the chosen answer of pair i, 2i+1 the rejected one.

    Args:
        data: from :func:`take_rows`.
        tokenizer: with a chat template where rows are messages.
        max_length: tokens kept of each sequence, from its start; None keeps all.
        name: for messages.

    Raises:
        DataError: prompts leave no room for answers.
    """
    rows = _kept(_map(data, _Pairs(tokenizer)), max_length, name)
    return Sequences.of(
        _marked(row[_PROMPT], row[answer], max_length) for row in rows for answer in ("chosen_ids", "rejected_ids")
    )


def unpaired_rows(
    data: Dataset, tokenizer: Any, max_length: int | None, *, name: str
) -> tuple[Sequences, Sequences, Tensor]:
    """Labelled answers, and each prompt once more with the answer to another prompt.

    The second are KTO's: they estimate how far the policy is from the reference on unrelated answers. Row i's
    partner is fixed by the data (the next one in a fixed shuffle), so its reference log-probability is too.

    Args:
        data: from :func:`take_rows`; pairs become two labelled answers each.
        tokenizer: with a chat template where rows are messages.
        max_length: tokens kept of each sequence, from its start; None keeps all.
        name: for messages.

    Returns:
        The answers, the mismatched answers, and [rows] bool: the answer is a good one.

    Raises:
        DataError: fewer than two rows, or prompts leave no room for answers.
    """
    if "chosen" in data.column_names:
        data = trl().unpair_preference_dataset(_with_prompt(data))
    labels = [bool(label) for label in data["label"]]
    tokenised = _map(data, _Answers(tokenizer)).add_column("label", labels)
    rows = _kept(tokenised, max_length, name)
    if len(rows) < 2:
        raise DataError(f"{name}: KTO compares answers to different prompts, so it needs at least 2 rows; it has 1")
    order = np.random.default_rng(0).permutation(len(rows))
    partner = np.empty_like(order)
    partner[order] = np.roll(order, -1)
    return (
        Sequences.of(_marked(row[_PROMPT], row["completion_ids"], max_length) for row in rows),
        Sequences.of(
            _marked(row[_PROMPT], rows[int(other)]["completion_ids"], max_length)
            for row, other in zip(rows, partner, strict=True)
        ),
        torch.tensor([row["label"] for row in rows]),
    )


# -- one row -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairs:
    tokenizer: Any

    def __call__(self, row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, chosen = _prompt_and_answer(self.tokenizer, row, "chosen")
        again, rejected = _prompt_and_answer(self.tokenizer, row, "rejected")
        # Where only one answer merges with the end of the prompt, both begin there, as in TRL.
        short = min(len(prompt), len(again))
        return {
            _PROMPT: prompt[:short],
            "chosen_ids": prompt[short:] + chosen,
            "rejected_ids": again[short:] + rejected,
        }


@dataclass(frozen=True)
class _Answers:
    tokenizer: Any

    def __call__(self, row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, answer = _prompt_and_answer(self.tokenizer, row, "completion")
        return {_PROMPT: prompt, "completion_ids": answer}


@dataclass(frozen=True)
class _SFT:
    tokenizer: Any
    name: str

    def __call__(self, row: dict[str, Any]) -> dict[str, list[Any]]:
        row = trl().maybe_convert_to_chatml(row)
        if row.get("prompt") is not None and row.get("completion") is not None:
            start, answer = _prompt_and_answer(self.tokenizer, row, "completion")
            return {"ids": start + answer, "completion": [False] * len(start) + [True] * len(answer)}
        if row.get("messages") is not None:
            ids, mask = _assistant_turns(self.tokenizer, row, self.name)
            return {"ids": ids, "completion": mask}
        ids = _ids(self.tokenizer, _ended(row["text"], self.tokenizer))
        return {"ids": ids, "completion": [True] * len(ids)}


def _given_ids(row: dict[str, Any]) -> dict[str, list[Any]]:
    ids = row["input_ids"]
    if row.get("labels") is not None:
        return {"ids": ids, "completion": [label != -100 for label in row["labels"]]}
    mask = row.get("completion_mask")
    return {"ids": ids, "completion": [True] * len(ids) if mask is None else [bool(mark) for mark in mask]}


def _prompt_and_answer(tokenizer: Any, row: Mapping[str, Any], answer: str) -> tuple[list[int], list[int]]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        alone, together = _ids(tokenizer, prompt), _ids(tokenizer, prompt + _ended(row[answer], tokenizer))
    else:
        options = _template_options(row)
        alone = _ids(tokenizer, prompt, add_generation_prompt=True, **options)
        together = _ids(tokenizer, prompt + row[answer], **options)
    shared = _shared(alone, together)
    return together[:shared], together[shared:]


def _assistant_turns(tokenizer: Any, row: Mapping[str, Any], name: str) -> tuple[list[int], list[bool]]:
    messages, options = row["messages"], _template_options(row)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if "{% generation %}" in template or "{%- generation" in template:
        made = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        return made["input_ids"], [bool(mark) for mark in made["assistant_masks"]]
    whole = _ids(tokenizer, messages, **options)
    mask = [False] * len(whole)
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _ids(tokenizer, messages[:place], add_generation_prompt=True, **options)
        after = _ids(tokenizer, messages[: place + 1], **options)
        if place + 1 < len(messages) and whole[: len(after)] != after:
            raise DataError(
                f"{name}: the chat template writes earlier turns otherwise than the last, so the assistant's tokens "
                "cannot be told; give prompt+completion rows, or a template with {% generation %}"
            )
        for at in range(_shared(before, whole), len(after)):
            mask[at] = True
    return whole, mask


def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def _ids(tokenizer: Any, content: Any, **options: Any) -> list[int]:
    if isinstance(content, str):
        return list(tokenizer(content)["input_ids"])
    return list(tokenizer.apply_chat_template(content, tokenize=True, return_dict=True, **options)["input_ids"])


def _ended(text: str, tokenizer: Any) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two sequences have in common."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


# -- all rows ------------------------------------------------------------------------------------------------


def _map(data: Dataset, function: Any) -> Dataset:
    from accelerate import PartialState

    with PartialState().main_process_first():  # the first rank tokenises, the others find its files
        if isinstance(function, (_Pairs, _Answers)):
            data = _with_prompt(data)
        return data.map(function, remove_columns=data.column_names)


def _with_prompt(data: Dataset) -> Dataset:
    """Pairs without a prompt column share the start of their answers."""
    return data if "prompt" in data.column_names else data.map(trl().extract_prompt)


def _kept(tokenised: Dataset, max_length: int | None, name: str) -> list[dict[str, Any]]:
    rows = [row for row in tokenised if max_length is None or len(row[_PROMPT]) < max_length]
    _check_left(len(rows), len(tokenised), max_length, name)
    return rows


def _with_completions(rows: Iterable[tuple[list[int], list[bool]]], max_length: int | None, name: str) -> Sequences:
    everything = list(rows)
    kept = [row for row in everything if any(row[1][1:])]
    _check_left(len(kept), len(everything), max_length, name)
    return Sequences.of(kept)


def _check_left(left: int, rows: int, max_length: int | None, name: str) -> None:
    if left == 0:
        raise DataError(f"{name}: the prompts alone fill max_length={max_length} in every row; raise max_length")
    if left < rows:
        _logger.warning(
            f"{name}: {rows - left} of {rows} rows are left out, their prompts fill max_length={max_length}"
        )


def _marked(prompt: list[int], answer: list[int], max_length: int | None) -> tuple[list[int], list[bool]]:
    ids = (prompt + answer)[:max_length]
    return ids, [False] * min(len(prompt), len(ids)) + [True] * (len(ids) - len(prompt))
