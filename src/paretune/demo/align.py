"""A short DPO loop for the tiny world: plain torch, reference log-probabilities computed once.

    L = −log σ( β·[ (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l)) ] )

Reference: arXiv 2305.18290, Eq. 7. A test shows the loss equal to TRL's `DPOTrainer` on the same batch; `paretune
train` uses TRL itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from paretune.demo import words
from paretune.demo.chat import Preference
from paretune.demo.world import prompt_document

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    NamedParams = list[tuple[str, nn.Parameter]]
    OptimizerFactory = Callable[[NamedParams, "DPOSettings"], Optimizer]


@dataclass(frozen=True)
class DPOSettings:
    """One alignment run; AdamW with these is the demo's default policy.

    Args:
        lr: peak learning rate; a cosine takes it to 0.
        steps: optimizer steps.
        batch: pairs in a batch.
        beta: DPO's β.
        betas: Adam's.
        clip: largest gradient norm.
        nll: weight of the chosen answers' mean negative log-likelihood beside DPO's loss; formats that the reference
            never used are hardly learnt without.
        seed: of the order of the pairs and of everything random in an optimizer.
    """

    lr: float = 1e-4
    steps: int = 80
    batch: int = 16
    beta: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    nll: float = 0.0
    seed: int = 0


class Beside(Protocol):
    """A second objective that takes some steps."""

    def takes(self, step: int) -> bool:
        """Whether it trains at this step, from 0."""
        ...

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Its loss at a step that it takes."""
        ...


@dataclass(frozen=True)
class PairTensors:
    """Preference pairs as tensors.

    Args:
        ids: [n, 2, length] token ids, chosen first, padded on the right.
        completion: [n, 2, length] bool, true on the answer's tokens and its end mark.
        ref_logps: [n, 2] log-probability of each answer under the reference; zeros until `with_reference`.
    """

    ids: Tensor
    completion: Tensor
    ref_logps: Tensor

    @classmethod
    def encode(cls, pairs: Sequence[Preference]) -> PairTensors:
        """Tokenizes pairs exactly as the chat template does."""
        import torch

        index = {word: i for i, word in enumerate(words.vocabulary())}
        rows, starts = [], []
        for pair in pairs:
            prompt = [index[w] for w in prompt_document(pair.prompt).split()]
            for answer in (pair.chosen, pair.rejected):
                rows.append(prompt + [index[w] for w in (*answer.split(), words.END)])
                starts.append(len(prompt))
        width = max(map(len, rows))
        ids = torch.tensor([row + [index[words.PAD]] * (width - len(row)) for row in rows])
        place = torch.arange(width)
        lengths = torch.tensor([len(row) for row in rows])
        completion = (place >= torch.tensor(starts)[:, None]) & (place < lengths[:, None])
        shape = (len(pairs), 2, width)
        return cls(ids.view(shape), completion.view(shape), torch.zeros(len(pairs), 2))

    def with_reference(self, model: nn.Module, chunk: int = 50) -> PairTensors:
        """The same pairs with this model's log-probabilities as the reference's."""
        import torch

        with torch.no_grad():
            parts = [
                completion_logps(model, ids.flatten(0, 1), completion.flatten(0, 1))
                for ids, completion in zip(self.ids.split(chunk), self.completion.split(chunk), strict=True)
            ]
        return replace(self, ref_logps=torch.cat(parts).view(-1, 2))

    def take(self, rows: Sequence[int]) -> PairTensors:
        """Some of the pairs, without columns that are padding in all of them."""
        import torch

        index = torch.as_tensor(rows)
        completion = self.completion[index]
        width = int(completion.any(0).any(0).nonzero().max()) + 1
        return PairTensors(self.ids[index, :, :width], completion[..., :width], self.ref_logps[index])


def completion_logps(model: nn.Module, ids: Tensor, completion: Tensor) -> Tensor:
    """Summed log-probability of the answer's tokens in each row.

    Args:
        model: a causal language model.
        ids: [rows, length], padded on the right (no mask is needed: nothing attends to what follows it).
        completion: [rows, length] bool.

    Returns:
        [rows], in nats.
    """
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * completion[:, 1:]).sum(-1)


def dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """DPO's loss, averaged over pairs.

    Args:
        logps, ref_logps: [pairs, 2], chosen first, in nats.
        beta: β > 0.
    """
    from torch.nn import functional as F

    ratios = logps - ref_logps
    return -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).mean()


def _preference_loss(model: nn.Module, batch: PairTensors, settings: DPOSettings) -> Tensor:
    logps = completion_logps(model, batch.ids.flatten(0, 1), batch.completion.flatten(0, 1)).view(-1, 2)
    loss = dpo_loss(logps, batch.ref_logps, settings.beta)
    if settings.nll:
        loss = loss - settings.nll * logps[:, 0].sum() / batch.completion[:, 0].sum()
    return loss


def batches(count: int, settings: DPOSettings) -> Iterator[list[int]]:
    """Which pairs each step takes: every pair once an epoch, in an order of the seed's."""
    rng = Random(f"{settings.seed}/pairs")
    waiting: list[int] = []
    for _ in range(settings.steps):
        while len(waiting) < settings.batch:
            waiting += rng.sample(range(count), count)
        yield waiting[: settings.batch]
        del waiting[: settings.batch]


def adamw(named_params: NamedParams, settings: DPOSettings) -> Optimizer:
    """The default optimizer: torch's AdamW without weight decay."""
    import torch

    return torch.optim.AdamW(named_params, lr=settings.lr, betas=settings.betas, weight_decay=0.0, fused=True)


def align(
    model: nn.Module,
    pairs: PairTensors,
    settings: DPOSettings,
    optimizer: OptimizerFactory = adamw,
    after_step: Callable[[], Any] | None = None,
    stops: Iterable[int] = (),
    beside: Beside | None = None,
) -> Iterator[int]:
    """Trains ``model`` in place by DPO; pauses, yielding the number of steps done, at each stop and at the end.

    Args:
        model: starts at the reference.
        pairs: with the reference's log-probabilities.
        settings: the run.
        optimizer: makes the optimizer from named parameters and settings; its groups' learning rates are then
            scaled by the cosine.
        after_step: called after each step, an average's update for instance.
        stops: steps at which to pause as well.
        beside: another loss, which takes some of the steps in place of the pairs' (ALRIGHT, arXiv 2410.15483).

    Example:
        >>> from paretune.demo.pretrain import Shape, build_model
        >>> from paretune.demo.world import World
        >>> model = build_model(Shape(), seed=0)
        >>> pairs = PairTensors.encode(World().preferences[:8]).with_reference(model)
        >>> list(align(model, pairs, DPOSettings(steps=2, batch=4), stops=(1,)))
        [1, 2]
    """
    import torch

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    opt = optimizer(trained, settings)
    peaks = [float(group["lr"]) for group in opt.param_groups]
    pauses = {*stops, settings.steps}
    order = batches(len(pairs.ids), settings)
    for step in range(settings.steps):
        factor = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group, peak in zip(opt.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        opt.zero_grad(set_to_none=True)
        if beside is not None and beside.takes(step):
            beside.loss(model, step).backward()
        else:
            _preference_loss(model, pairs.take(next(order)), settings).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], settings.clip)
        opt.step()
        if after_step is not None:
            after_step()
        if step + 1 in pauses:
            yield step + 1
