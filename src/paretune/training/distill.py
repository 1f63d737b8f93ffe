"""Distillation of the reference on its own answers: the second objective of self-rehearsal."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune.checkpoint import Checkpoint
from paretune.errors import ArgumentError, CheckpointError
from paretune.training.logps import _head_at
from paretune.training.objectives import Batch, Objective, Setup, data_name
from paretune.training.ranks import rank, sum_over_ranks, world_size
from paretune.training.references import ReferenceModel, _opened, cache_directory
from paretune.training.sequences import Sequences, sft_rows, take_rows

Direction: TypeAlias = Literal["forward", "reverse"]
_logger = logging.getLogger("paretune.training")


class Distill(Objective):
    """Keep the policy at what the reference says: KL between their next-token distributions on given answers.

    forward: mean over completion tokens of Σ_v p(v)·log(p(v)/π(v));  reverse: of Σ_v π(v)·log(π(v)/p(v))

    with p the reference and π the policy. With ``top_k`` the reference's k likeliest tokens are kept and all others
    counted as one: a lower bound of the KL, short of it by the tail's mass times the KL within the tail, and equal to
    it where k covers the vocabulary.

    Args:
        dataset: the reference's own answers (``pt.self_answers``), or any demonstrations: ``messages``,
            ``prompt``+``completion`` or ``text``; a data set, a sequence of rows, a file or a hub id.
        direction: ``"forward"`` or ``"reverse"``.
        top_k: tokens kept of each of the reference's distributions, which are then computed once and kept in a file
            (8 bytes each); None holds the reference in memory and asks it at every step.
        ref_model: the reference: None for the policy as it is when the trainer is made, a path or hub id, several for
            the mean of their weights, or a model.
        eval_dataset: likewise.
        batch_size: rows in a micro-batch on each rank; the run's by default.
        max_length: tokens kept of each row, from its start; None keeps all.
        cache_dir: where the file is kept; ``~/.cache/paretune/references`` by default.

    Raises:
        ArgumentError: an argument out of its range.

    Reference: arXiv 1503.02531, section 2 (temperature 1); self-made rehearsal data: arXiv 2403.01244.
    """

    def __init__(
        self,
        dataset: Any,
        direction: Direction = "forward",
        top_k: int | None = 32,
        *,
        ref_model: ReferenceModel = None,
        eval_dataset: Any = None,
        batch_size: int | None = None,
        max_length: int | None = 1024,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(dataset, eval_dataset=eval_dataset, batch_size=batch_size)
        if direction not in get_args(Direction):
            raise ArgumentError("direction", direction, "choose 'forward' or 'reverse'")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ArgumentError("top_k", top_k, "give a number of tokens of at least 1, or None")
        if max_length is not None and max_length < 2:
            raise ArgumentError("max_length", max_length, "give at least 2 tokens, or None")
        self.direction, self.top_k, self.max_length = direction, top_k, max_length
        self.ref_model, self.cache_dir = ref_model, cache_dir
        self._sequences: dict[str, Sequences] = {}
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._first: dict[str, Tensor] = {}
        self._teacher: nn.Module | None = None

    def prepare(self, setup: Setup) -> None:
        self._pad = setup.tokenizer.pad_token_id
        for split, data in self.datasets.items():
            name = data_name(setup.name, split)
            rows = take_rows(data, "sft", name=name)
            self._sequences[split] = sft_rows(rows, setup.tokenizer, self.max_length, name=name)
        with _opened(self.ref_model, setup) as (fingerprint, reference):
            if self.top_k is None:
                # The policy itself is about to move.
                teacher = reference()
                self._teacher = (copy.deepcopy(teacher) if teacher is setup.model else teacher).eval()
                self._teacher.requires_grad_(False)
                return
            for split, part in self._sequences.items():
                counts = torch.tensor([int(marks.sum()) for marks in _marks(part)])
                self._first[split] = counts.cumsum(0) - counts
                self._kept[split] = self._stored(part, int(counts.sum()), fingerprint, reference, setup)

    def rows(self, split: str) -> int:
        return len(self._sequences.get(split, ()))

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        ids, completion = self._sequences[split].pad(rows, self._pad)
        batch = {"input_ids": ids, "completion_mask": completion}
        if self.top_k is not None:
            counts = completion[:, 1:].sum(1).tolist()
            spans = [slice(int(self._first[split][row]), int(self._first[split][row]) + n)
                     for row, n in zip(rows, counts, strict=True)]  # fmt: skip
            tokens, logps = self._kept[split]
            batch["ref_tokens"] = torch.cat([tokens[span] for span in spans]).long()
            batch["ref_logps"] = torch.cat([logps[span] for span in spans])
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logps = completion_logps(model, batch["input_ids"], batch["completion_mask"])
        if self.top_k is not None:
            return lumped_kl(batch["ref_logps"], batch["ref_tokens"], logps, self.direction).mean()
        if self._teacher is None:
            raise TypeError("prepare comes first")
        with torch.no_grad():
            wanted = completion_logps(self._teacher, batch["input_ids"], batch["completion_mask"])
        return full_kl(wanted, logps, self.direction).mean()

    def count(self, batch: Batch) -> int:
        return int(batch["completion_mask"][:, 1:].sum())

    def _stored(
        self, part: Sequences, tokens: int, fingerprint: str, reference: Any, setup: Setup
    ) -> tuple[Tensor, Tensor]:
        """The reference's likeliest tokens and their log-probabilities, [tokens, k] each, memory-mapped."""
        setting = (
            f"{fingerprint} {part.digest()} top {self.top_k} {setup.model.dtype} {setup.args.bf16} {setup.args.fp16}"
        )
        key = hashlib.sha256(setting.encode()).hexdigest()[:32]
        file = Path(self.cache_dir or cache_directory()) / f"{key}.safetensors"
        if not bool(sum_over_ranks(torch.tensor(float(rank() == 0 and _read(file, tokens) is not None)))):
            _logger.info(f"{setup.name}: the reference's distributions at {tokens} tokens, kept in {file}")
            made = self._made(reference(), part, tokens, setup)
            if rank() == 0:
                _write(file, *made)
            if world_size() > 1:
                return made  # another machine may not see the file
        found = _read(file, tokens)
        if found is None:
            raise CheckpointError(f"{file}: cannot be read on this rank: give cache_dir a directory that all share")
        return found

    @torch.no_grad()
    def _made(self, model: Any, part: Sequences, count: int, setup: Setup) -> tuple[Tensor, Tensor]:
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        vocabulary = model.get_output_embeddings().weight.shape[0]
        k = min(self.top_k or 0, vocabulary)
        tokens, logps = torch.zeros(count, k, dtype=torch.int32), torch.zeros(count, k)
        counts = torch.tensor([int(marks.sum()) for marks in _marks(part)])
        first = counts.cumsum(0) - counts
        with setup.autocast():
            for rows in _chunks(part, setup.args.per_device_eval_batch_size)[rank() :: world_size()]:
                ids, completion = part.pad(rows, setup.tokenizer.pad_token_id)
                best = completion_logps(model, ids.to(device), completion.to(device)).topk(k)
                place = torch.cat([torch.arange(int(first[row]), int(first[row] + counts[row])) for row in rows])
                logps[place], tokens[place] = best.values.cpu(), best.indices.int().cpu()
        model.train(was_training)
        return sum_over_ranks(tokens.float()).int() if world_size() > 1 else tokens, sum_over_ranks(logps)


def completion_logps(model: nn.Module, ids: Tensor, completion: Tensor) -> Tensor:
    """Log-probabilities of the whole vocabulary where a completion token is predicted.

    Args:
        model: a causal language model.
        ids: [rows, length], padded on the right.
        completion: [rows, length] bool; its first column is never predicted.

    Returns:
        [tokens, vocabulary] float32, in nats, row by row.
    """
    row, place = completion[:, 1:].nonzero(as_tuple=True)
    inputs = ids[:, :-1]
    with _head_at(model, row, place, inputs.shape[1]) as selects:
        logits = model(input_ids=inputs, use_cache=False).logits
    if not selects:
        logits = logits[:, -inputs.shape[1] :][row, place]
    return logits.float().log_softmax(-1)


def full_kl(reference: Tensor, policy: Tensor, direction: Direction) -> Tensor:
    """KL between two distributions given by log-probabilities, token by token.

    Args:
        reference, policy: [tokens, vocabulary], in nats.
        direction: forward KL(reference ‖ policy) or reverse KL(policy ‖ reference).

    Returns:
        [tokens], in nats.

    Example:
        >>> p = torch.tensor([[0.5, 0.5]]).log()
        >>> full_kl(p, p, "forward")
        tensor([0.])
    """
    log_from, log_to = (reference, policy) if direction == "forward" else (policy, reference)
    return F.kl_div(log_to, log_from, reduction="none", log_target=True).sum(-1)


def lumped_kl(kept: Tensor, tokens: Tensor, policy: Tensor, direction: Direction) -> Tensor:
    """The same with all tokens that are not kept counted as one: a lower bound of the KL.

    Args:
        kept: [tokens, k] the reference's log-probabilities of the kept tokens.
        tokens: [tokens, k] which they are.
        policy: [tokens, vocabulary] log-probabilities.
        direction: as in `full_kl`.

    Returns:
        [tokens], in nats.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.4, 0.4]]).log()
        >>> every = torch.tensor([[0, 1, 2]])
        >>> bool(torch.isclose(lumped_kl(p, every, q, "forward"), full_kl(p, q, "forward")))
        True
        >>> bool(lumped_kl(p[:, :1], every[:, :1], q, "forward") < full_kl(p, q, "forward"))
        True
    """
    own = policy.gather(-1, tokens)
    if kept.shape[-1] < policy.shape[-1]:
        kept = torch.cat([kept, _rest(kept)], -1)
        own = torch.cat([own, _rest(own)], -1)
    return full_kl(kept, own, direction)


def _rest(logps: Tensor) -> Tensor:
    """log(1 − Σ exp): what the kept tokens leave; rounding may leave less than nothing."""
    return torch.log1p(-logps.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))


def _marks(part: Sequences) -> list[Any]:
    """The predicted completion tokens of each sequence: the first token never is."""
    return [part.completion[int(part.starts[row]) + 1 : int(part.starts[row + 1])] for row in range(len(part))]


def _chunks(part: Sequences, size: int) -> list[list[int]]:
    """Rows of like length together, longest first, each time as many as fill ``size`` rows of the longest."""
    lengths = (part.starts[1:] - part.starts[:-1]).tolist()
    waiting = sorted(range(len(part)), key=lambda row: -lengths[row])
    room = size * max(lengths)
    chunks, start = [], 0
    while start < len(waiting):
        chunks.append(waiting[start : start + room // lengths[waiting[start]]])
        start += len(chunks[-1])
    return chunks


def _read(file: Path, tokens: int) -> tuple[Tensor, Tensor] | None:
    try:
        found = Checkpoint(file)
        parts = [found.flat(name).view(found[name].shape) for name in ("tokens", "logps")]
    except (CheckpointError, KeyError):
        return None  # not there, or cut short: computed again and replaced
    return (parts[0], parts[1]) if parts[0].shape[0] == tokens else None


def _write(file: Path, tokens: Tensor, logps: Tensor) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        save_file({"tokens": tokens.contiguous(), "logps": logps.contiguous()}, temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
