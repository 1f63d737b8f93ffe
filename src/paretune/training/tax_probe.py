"""Watching the alignment tax while a model trains: reward, KL and SFT loss on a small probe set every n steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from paretune.errors import ArgumentError
from paretune.generation.decoding import Decoding, Prompt, check_prompts, requests
from paretune.generation.divergence import answer_tokens, divergence
from paretune.generation.local import answers, encode
from paretune.training.sequences import Sequences, sft_rows, take_rows

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

_logger = logging.getLogger("paretune.training")

Reward = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Reading:
    """What one probe found; the standard errors are over prompts and over rows.

    Args:
        step: of training.
        kl: KL(policy ‖ reference) per answer, in nats, along the policy's own sampled answers.
        sft_loss: mean negative log-likelihood of an answer's token on the SFT rows, in nats.
        tax: ``sft_loss`` minus the reference's on the same rows.
        tax_error: its paired standard error.
        reward: mean reward of the sampled answers.
        reward_error: its standard error.
    """

    step: int
    kl: float
    sft_loss: float | None = None
    tax: float | None = None
    tax_error: float | None = None
    reward: float | None = None
    reward_error: float | None = None


class TaxProbe(TrainerCallback):
    """Measure a small probe set every few steps, log it, and warn when the tax outruns the reward.

    The values go to wherever the trainer reports, as ``probe/kl``, ``probe/sft_loss``, ``probe/tax``, ``probe/reward``:

        KL = E_x E_{y ~ π} Σ_t Σ_v π(v | x, y_<t) log (π(v | x, y_<t) / π_ref(v | x, y_<t))

    It warns when, against the probe of the best reward so far, the tax has risen beyond two standard errors while the
    reward has not risen, ``patience`` probes in a row. Training itself is untouched: neither the random state nor
    the mode of the model changes, and equal seeds give all probes the same luck.

    Args:
        trainer: any TRL trainer; add the probe to it by ``trainer.add_callback(probe)``.
        prompts: held-out prompts, text or messages; 16 to 64 are enough.
        sft: rows of supervised data that the reference is good at, as TRL takes them; without them there is no tax.
        reward: called with prompts and answers, returns one number each; without it nothing is warned of.
        reference: what the KL is measured to. By default the trainer's own reference model, or the model without its
            adapter. A trainer that precomputes log-probabilities keeps none: give it then.
        every: steps between probes; the first is before step 1.
        patience: probes in a row before the warning.
        decoding: of the answers; 64 tokens at temperature 1 by default.

    Attributes:
        readings: what was found so far.

    Raises:
        ArgumentError: where there is no reference, no prompt, or a number is out of range.

    Example:
        >>> probe = TaxProbe(trainer, held_out, sft=rows, reward=score, every=50)  # doctest: +SKIP
        >>> trainer.add_callback(probe)  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        *,
        sft: Any = None,
        reward: Reward | None = None,
        reference: nn.Module | None = None,
        every: int = 50,
        patience: int = 2,
        decoding: Decoding | None = None,
    ) -> None:
        for name, value in (("every", every), ("patience", patience)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(name, value, "give a whole number of at least 1")
        check_prompts(prompts)
        self.readings: list[Reading] = []
        self._trainer, self._prompts, self._reward = trainer, list(prompts), reward
        self._every, self._patience, self._outrun = every, patience, 0
        self._decoding = Decoding(max_new_tokens=64, temperature=1.0) if decoding is None else decoding
        tokenizer: Any = trainer.processing_class
        self._tokenizer: Any = getattr(tokenizer, "tokenizer", tokenizer)  # of a multimodal processor
        self._reference = reference if reference is not None else getattr(trainer, "ref_model", None)
        if self._reference is None and not hasattr(self._policy, "disable_adapter"):
            raise ArgumentError("reference", None, "give the model that training starts from; the trainer keeps none")
        self._ids = encode(self._prompts, self._tokenizer, self._policy, self._decoding)
        self._rows: Sequences | None = None
        if sft is not None:
            self._rows = sft_rows(take_rows(sft, "sft", name="sft"), self._tokenizer, None, name="sft")
        self._reference_losses: Tensor | None = None

    @property
    def _policy(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._probe(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._every == 0:
            self._probe(state.global_step)

    def _probe(self, step: int) -> None:
        reading = self.measure(step)
        self.readings.append(reading)
        values = {k: v for k, v in asdict(reading).items() if v is not None and k != "step"}
        self._trainer.log({f"probe/{name}": value for name, value in values.items()})
        self._judge(reading)

    def measure(self, step: int) -> Reading:
        """Measure the trainer's model as it is.

        Args:
            step: noted in the reading.
        """
        policy = self._policy
        with _undisturbed(policy):
            wanted = requests(self._prompts, self._ids, self._decoding, "probe")
            batches = answers(policy, self._tokenizer, wanted, self._ids, self._decoding)
            written = [generation for batch in batches for _, generation in batch]
            rows = answer_tokens(written, self._ids, self._tokenizer)
            kl = divergence(policy, lambda: self._as_reference(policy), rows, self._decoding.batch_size)
            losses = self._losses(policy)
            if losses is not None and self._reference_losses is None:
                with self._as_reference(policy) as reference:
                    self._reference_losses = self._losses(reference)
        found: dict[str, float] = {"kl": sum(kl) / len(kl)}
        if losses is not None and self._reference_losses is not None:
            found["sft_loss"] = float(losses.mean())
            found["tax"], found["tax_error"] = _mean(losses - self._reference_losses)
        if self._reward is not None:
            scores = self._reward([g.prompt for g in written], [g.text for g in written])
            if len(scores) != len(written):
                raise ArgumentError("reward", len(scores), f"return one number for each of {len(written)} answers")
            found["reward"], found["reward_error"] = _mean(torch.tensor([float(s) for s in scores]))
        return Reading(step, **found)

    def _judge(self, now: Reading) -> None:
        if now.reward is None or now.tax is None:
            return
        best = max(self.readings, key=lambda r: -math.inf if r.reward is None else r.reward)
        if best is now or best.tax is None:
            self._outrun = 0
            return
        noise = 2 * math.hypot(now.tax_error or 0.0, best.tax_error or 0.0)
        self._outrun = self._outrun + 1 if now.tax - best.tax > noise else 0
        if self._outrun == self._patience:
            _logger.warning(
                f"step {now.step}: the tax outruns the reward: since step {best.step} the SFT loss has risen by "
                f"{now.tax - best.tax:.3g} nats a token while the reward went from {best.reward:.3g} to "
                f"{now.reward:.3g}; stop at step {best.step}, lower the learning rate, or merge afterwards"
            )

    @contextmanager
    def _as_reference(self, policy: Any) -> Iterator[Any]:
        if self._reference is None:
            with policy.disable_adapter():
                yield policy
        else:
            # DeepSpeed and FSDP may have wrapped the trainer's own.
            reference: Any = self._trainer.accelerator.unwrap_model(self._reference)
            with _undisturbed(reference):
                yield reference

    def _losses(self, model: Any) -> Tensor | None:
        """[rows] mean negative log-likelihood of each row's counted tokens; None without rows."""
        if self._rows is None:
            return None
        found = []
        for ids, counted in self._batches(self._rows, model.device):
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            log_p = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
            weight = counted[:, 1:].float()
            found.append(-(log_p * weight).sum(1) / weight.sum(1).clamp_min(1))
        return torch.cat(found).cpu()

    def _batches(self, rows: Sequences, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        pad = self._tokenizer.pad_token_id or 0
        size = self._decoding.batch_size
        for start in range(0, len(rows), size):
            ids, counted = rows.pad(range(start, min(start + size, len(rows))), pad)
            yield ids.to(device), counted.to(device)


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(values.mean()), error


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """In evaluation mode; afterwards every module's mode and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
