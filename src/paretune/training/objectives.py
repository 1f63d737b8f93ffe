"""What is trained on: a data set, how it becomes batches, and the loss on a batch.

A new objective is a subclass of `Objective` with ``prepare``, ``batch`` and ``loss``; `SFT`, `DPO` and `KTO` are the
examples. Each has its own data, batch size and length; `paretune.JointTrainer` draws from each on its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from paretune.errors import ArgumentError
from paretune.training.logps import summed_logps, token_logps
from paretune.training.ranks import mean_over_ranks
from paretune.training.references import ReferenceModel, reference_logps
from paretune.training.sequences import Sequences, pair_rows, sft_rows, take_rows, unpaired_rows

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from torch import nn
    from transformers import TrainingArguments

    AnyData = Dataset | Sequence[Mapping[str, Any]]

TRAIN, EVAL = "train", "eval"
Batch = dict[str, Tensor]


@dataclass
class Setup:
    """What an objective is prepared with, once, before training.

    Args:
        name: the objective's, as the user called it; for messages.
        model: the policy where it starts, on its device, not wrapped: the reference of preference losses.
        tokenizer: with its chat template and padding token.
        args: of the run: seed, device, ``per_device_train_batch_size``, ``per_device_eval_batch_size``.
        autocast: the run's mixed precision, for whoever calls ``model`` itself.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    args: TrainingArguments
    autocast: Callable[[], AbstractContextManager[Any]]


class Objective(ABC):
    """A data set and a loss on its batches.

    Args:
        dataset: rows to train on.
        eval_dataset: rows to evaluate on; None leaves this objective out of evaluations.
        batch_size: rows in a micro-batch on each rank; the run's ``per_device_train_batch_size`` by default.

    Raises:
        ArgumentError: ``batch_size`` is below 1.
    """

    def __init__(self, dataset: Any, *, eval_dataset: Any = None, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ArgumentError("batch_size", batch_size, "give a number of rows of at least 1")
        self.datasets = {TRAIN: dataset} | ({} if eval_dataset is None else {EVAL: eval_dataset})
        self.batch_size = batch_size

    @abstractmethod
    def prepare(self, setup: Setup) -> None:
        """Read, check and tokenise all data, and compute what does not change while training.

        Args:
            setup: of the run.

        Raises:
            DataError: data that cannot be trained on.
        """

    @abstractmethod
    def rows(self, split: str) -> int:
        """How many rows a split ("train" or "eval") has, once prepared; 0 for one that is not there."""

    @abstractmethod
    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        """Some rows of a split as tensors, on the CPU, under TRL's names where it has one."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch.

        Args:
            model: the policy, perhaps wrapped by DDP or FSDP: call it, do not reach into it.
            batch: on the model's device.

        Returns:
            A scalar; with a gradient unless gradients are off.
        """

    def count(self, batch: Batch) -> int:
        """What the loss of a batch is the mean over: the weight of this batch among others of the same step."""
        return len(next(iter(batch.values())))


class SFT(Objective):
    """Mean negative log-likelihood of completion tokens.

    f_SFT = −(1/N) Σ_rows Σ_completion tokens log π(y_t | x, y_<t), N the completion tokens of the whole step: of all
    micro-batches and ranks, as in TRL.

    Args:
        dataset: ``prompt``+``completion``, ``messages`` (every assistant turn counts), ``text`` (every token counts)
            or ``input_ids``; plain or conversational; a data set, a sequence of rows, a file or a hub id.
        eval_dataset: likewise.
        batch_size: rows in a micro-batch on each rank; the run's by default.
        max_length: tokens kept of each row, from its start; None keeps all.

    Raises:
        ArgumentError: a size below 1.
    """

    def __init__(
        self, dataset: Any, *, eval_dataset: Any = None, batch_size: int | None = None, max_length: int | None = 1024
    ) -> None:
        super().__init__(dataset, eval_dataset=eval_dataset, batch_size=batch_size)
        self.max_length = _length(max_length)
        self._sequences: dict[str, Sequences] = {}

    def prepare(self, setup: Setup) -> None:
        self._pad = padding(setup)
        for split, data in self.datasets.items():
            name = data_name(setup.name, split)
            self._sequences[split] = sft_rows(
                take_rows(data, "sft", name=name), setup.tokenizer, self.max_length, name=name
            )

    def rows(self, split: str) -> int:
        return len(self._sequences.get(split, ()))

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        ids, completion = self._sequences[split].pad(rows, self._pad)
        return {"input_ids": ids, "completion_mask": completion}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logps, _ = token_logps(model, batch["input_ids"], batch["completion_mask"])
        return -logps.mean()

    def count(self, batch: Batch) -> int:
        return int(batch["completion_mask"][:, 1:].sum())


class DPO(Objective):
    """Direct preference optimisation on pairs of answers: the sigmoid loss, with label smoothing, or IPO's.

    With h = (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l)), of mean token log-probabilities for IPO:

    sigmoid: −(1−ε)·log σ(β·h) − ε·log σ(−β·h);  ipo: (h − 1/(2β))²

    Args:
        dataset: ``chosen``+``rejected``, with ``prompt`` or with the prompt in both; plain or conversational; a data
            set, a sequence of rows, a file or a hub id.
        beta: β > 0, how strongly the reference holds the policy (τ of IPO).
        loss_type: ``"sigmoid"`` or ``"ipo"``.
        label_smoothing: ε in [0, 0.5): the share of pairs taken to be labelled wrongly (sigmoid only).
        ref_model: the reference: None for the policy as it is when the trainer is made, a path or hub id, several
            for the mean of their weights, or a model. Its log-probabilities are computed once and kept in a file.
        eval_dataset: likewise.
        batch_size: pairs in a micro-batch on each rank; the run's by default.
        max_length: tokens kept of each prompt with its answer, from its start; None keeps all.
        cache_dir: where reference log-probabilities are kept; ``~/.cache/paretune/references`` by default.

    Raises:
        ArgumentError: an argument out of its range.

    Reference: arXiv 2305.18290, Eq. 7; IPO: arXiv 2310.12036, Eq. 17, length-normalised as in TRL; the mean of
        several models as reference: arXiv 2411.01798.
    """

    loss_types: ClassVar[tuple[str, ...]] = ("sigmoid", "ipo")

    def __init__(
        self,
        dataset: Any,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        ref_model: ReferenceModel = None,
        eval_dataset: Any = None,
        batch_size: int | None = None,
        max_length: int | None = 1024,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(dataset, eval_dataset=eval_dataset, batch_size=batch_size)
        if loss_type not in self.loss_types:
            raise ArgumentError("loss_type", loss_type, "choose sigmoid or ipo; pt.KTO is an objective of its own")
        if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type != "sigmoid"):
            raise ArgumentError(
                "label_smoothing", label_smoothing, "give a share in [0, 0.5), with loss_type='sigmoid'"
            )
        self.beta, self.loss_type, self.label_smoothing = _beta(beta), loss_type, label_smoothing
        self.ref_model, self.cache_dir, self.max_length = ref_model, cache_dir, _length(max_length)
        self._sequences: dict[str, Sequences] = {}
        self._ref_logps: dict[str, Tensor] = {}
        self.watch: Callable[[Tensor], None] | None = None  # is given the margins of what is trained on

    def prepare(self, setup: Setup) -> None:
        self._pad = padding(setup)
        for split, data in self.datasets.items():
            name = data_name(setup.name, split)
            self._sequences[split] = pair_rows(
                take_rows(data, "dpo", name=name), setup.tokenizer, self.max_length, name=name
            )
        logps = reference_logps(list(self._sequences.values()), setup, self.ref_model, self.cache_dir)
        self._ref_logps = {split: part.view(-1, 2) for split, part in zip(self._sequences, logps, strict=True)}

    def rows(self, split: str) -> int:
        return len(self._sequences.get(split, ())) // 2

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        ids, completion = self._sequences[split].pad([2 * row + side for side in (0, 1) for row in rows], self._pad)
        ref_logps = self._ref_logps[split][torch.as_tensor(rows)]
        return {"input_ids": ids, "completion_mask": completion, "ref_logps": ref_logps}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logps = summed_logps(model, batch["input_ids"], batch["completion_mask"])
        ratios = logps.view(2, -1) - batch["ref_logps"].T  # [chosen or rejected, pairs]
        if self.loss_type == "ipo":
            ratios = ratios / batch["completion_mask"][:, 1:].sum(1).view(2, -1).clamp(min=1)
            return (ratios[0] - ratios[1] - 1 / (2 * self.beta)).square().mean()
        margin = self.beta * (ratios[0] - ratios[1])
        if self.watch is not None and margin.requires_grad:
            self.watch(margin.detach())
        loss = -F.logsigmoid(margin)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * F.logsigmoid(-margin)
        return loss.mean()

    def count(self, batch: Batch) -> int:
        return len(batch["ref_logps"])


class KTO(Objective):
    """Kahneman-Tversky optimisation on single answers labelled good or bad.

    With r = log π(y|x) − log π_ref(y|x) and z = max(0, mean over the batch and all ranks of r on mismatched answers):

    good: w_good·(1 − σ(β·(r − z)));  bad: w_bad·(1 − σ(β·(z − r)))

    Args:
        dataset: ``prompt``+``completion``+``label`` (no pairs needed), or pairs, which become two rows each; plain
            or conversational; a data set, a sequence of rows, a file or a hub id.
        beta: β > 0.
        desirable_weight, undesirable_weight: w_good and w_bad.
        ref_model: the reference, as in `DPO`.
        eval_dataset: likewise.
        batch_size: answers in a micro-batch on each rank; the run's by default.
        max_length: tokens kept of each prompt with its answer, from its start; None keeps all.
        cache_dir: where reference log-probabilities are kept; ``~/.cache/paretune/references`` by default.

    Raises:
        ArgumentError: an argument out of its range.

    Reference: arXiv 2402.01306, Eq. 7. The mismatched answer of a row is that of another row, fixed for the whole
        run, so that its reference log-probability is computed once; TRL pairs rows within the batch.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        ref_model: ReferenceModel = None,
        eval_dataset: Any = None,
        batch_size: int | None = None,
        max_length: int | None = 1024,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(dataset, eval_dataset=eval_dataset, batch_size=batch_size)
        for argument, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if not (value >= 0 and math.isfinite(value)):
                raise ArgumentError(argument, value, "give a finite number of at least 0")
        self.beta, self.weights = _beta(beta), (undesirable_weight, desirable_weight)
        self.ref_model, self.cache_dir, self.max_length = ref_model, cache_dir, _length(max_length)
        self._sequences: dict[str, tuple[Sequences, Sequences]] = {}
        self._labels: dict[str, Tensor] = {}
        self._ref_logps: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare(self, setup: Setup) -> None:
        self._pad = padding(setup)
        for split, data in self.datasets.items():
            name = data_name(setup.name, split)
            answers, mismatched, self._labels[split] = unpaired_rows(
                take_rows(data, "kto", name=name), setup.tokenizer, self.max_length, name=name
            )
            self._sequences[split] = (answers, mismatched)
        parts = [part for both in self._sequences.values() for part in both]
        logps = reference_logps(parts, setup, self.ref_model, self.cache_dir)
        pairs = zip(logps[::2], logps[1::2], strict=True)
        self._ref_logps = dict(zip(self._sequences, pairs, strict=True))

    def rows(self, split: str) -> int:
        return len(self._labels.get(split, ()))

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        (answers, mismatched), index = self._sequences[split], torch.as_tensor(rows)
        ids, completion = answers.pad(rows, self._pad)
        kl_ids, kl_completion = mismatched.pad(rows, self._pad)
        ref_logps, ref_kl_logps = (part[index] for part in self._ref_logps[split])
        return {
            "label": self._labels[split][index],
            "input_ids": ids,
            "completion_mask": completion,
            "ref_logps": ref_logps,
            "KL_input_ids": kl_ids,
            "KL_completion_mask": kl_completion,
            "ref_KL_logps": ref_kl_logps,
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            kl_logps = summed_logps(model, batch["KL_input_ids"], batch["KL_completion_mask"])
            # Over all ranks before the clamp: a micro-batch has one z however many processes share it.
            kl = mean_over_ranks((kl_logps - batch["ref_KL_logps"]).mean()).clamp(min=0)
        ratios = summed_logps(model, batch["input_ids"], batch["completion_mask"]) - batch["ref_logps"]
        good = batch["label"]
        losses = 1 - torch.sigmoid(self.beta * torch.where(good, ratios - kl, kl - ratios))
        return (torch.where(good, self.weights[1], self.weights[0]) * losses).mean()


def padding(setup: Setup) -> int:
    """The padding token.

    Raises:
        ArgumentError: there is no tokenizer, or it has none.
    """
    token = getattr(setup.tokenizer, "pad_token_id", None)
    if token is None:
        given = None if setup.tokenizer is None else type(setup.tokenizer).__name__
        raise ArgumentError("processing_class", given, f"{setup.name} needs a tokenizer with a padding token; give it")
    return int(token)


def data_name(objective: str, split: str) -> str:
    """What messages call an objective's data."""
    return f"objectives[{objective!r}]" + (".eval_dataset" if split == EVAL else "")


def _beta(beta: float) -> float:
    if not (beta > 0 and math.isfinite(beta)):
        raise ArgumentError("beta", beta, "give a finite number above 0")
    return beta


def _length(max_length: int | None) -> int | None:
    if max_length is not None and max_length < 2:
        raise ArgumentError("max_length", max_length, "give at least 2 tokens, or None")
    return max_length
