"""EMA: an exponential moving average of the policy beside the policy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import sync
from ..checkpoint import Checkpoint
from ..errors import ArgumentError, CheckpointError, MismatchError, StateError, examples
from .parts import local
from .wrapper import shard_like, unique_names

_BUCKET = 1 << 24  # elements of a lower-precision policy that are widened at a time: 64 MiB of scratch


class EMA:
    """The moving average of the policy over optimizer steps, kept beside the policy.

    θ̄₀ = θ₀ and, at every ``update()``, θ̄ ← (1−μ)·θ̄ + μ·θ, computed as θ̄ + μ·(θ − θ̄) in the average's dtype,
    without bias correction (θ̄₀ is the policy itself, not 0). Call ``update()`` once after each optimizer step.
    ``decay`` is μ, the weight of the newest policy: with 1 the average is the policy; the usual notation
    "decay 0.999" is 1−μ. The average remembers about the last 1/μ steps.

    Frozen parameters (``requires_grad=False`` at construction) are skipped: they are their own average. A tied
    parameter is averaged once, under its first name. Sharded parameters (FSDP2) give sharded averages: build the
    EMA after the model was sharded.

    A float32 average cannot follow a policy that is nearer than about 3e-8/μ·|θ| (3e-5·|θ| at μ=1e-3): such
    steps round to nothing. ``dtype=torch.float64`` removes that at twice the memory.

    Args:
        named_params: (name, parameter) pairs, as from ``model.named_parameters()``.
        decay: μ, 0 < μ ≤ 1.
        dtype: of the average, float32 or float64; a parameter of higher precision keeps its own.

    Raises:
        ArgumentError: ``decay`` or ``dtype`` is out of range, a name occurs twice, or nothing is trainable.

    Reference:
        arXiv 2405.17931, the EMA baseline (its best μ is 1e-3).

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> ema = EMA(model.named_parameters(), decay=0.5)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> ema.update()
        >>> with ema.average():
        ...     print(model.weight.item())
        2.0
        >>> model.weight.item()
        3.0
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, Tensor]],
        decay: float = 1e-3,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0 < decay <= 1:
            mend = "must be in (0, 1]: the weight of the newest policy, so 1e-3 where others write 0.999"
            raise ArgumentError("decay", decay, mend)
        if dtype not in (torch.float32, torch.float64):
            raise ArgumentError("dtype", dtype, "give torch.float32 or torch.float64")
        trainable: dict[int, tuple[str, Tensor]] = {}
        for name, p in named_params:
            if p.requires_grad:
                trainable.setdefault(id(p), (name, p))
        if not trainable:
            raise ArgumentError(
                "named_params", [], "no parameter requires gradients; build the EMA from a trainable model"
            )
        self.decay = decay
        names = unique_names((name for name, _ in trainable.values()), "named_params")
        self._params = dict(zip(names, (p for _, p in trainable.values()), strict=True))
        self._average = {
            name: p.detach().to(torch.promote_types(p.dtype, dtype), copy=True) for name, p in self._params.items()
        }
        self._policy: dict[str, Tensor] | None = None  # the raw policy while the average is in its place

    @property
    def swapped(self) -> bool:
        """Whether the live parameters hold the average now."""
        return self._policy is not None

    @torch.no_grad()
    def update(self) -> None:
        """θ̄ ← θ̄ + μ·(θ − θ̄), once after each optimizer step.

        Raises:
            StateError: the average is in the live parameters.
        """
        if self._policy is not None:
            raise StateError("EMA.update() while the live parameters hold the average: swap() back first")
        for average, policy in self._buckets():
            torch._foreach_lerp_(average, policy, self.decay)

    def _buckets(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """(average, policy) in one dtype and on one device; parameters of lower precision widened in buckets."""
        direct: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        for name, p in self._params.items():
            average, policy = local(self._average[name]), local(p.detach())
            if average.dtype == policy.dtype:
                pair = direct.setdefault((average.dtype, average.device), ([], []))
                pair[0].append(average)
                pair[1].append(policy)
            elif policy.is_contiguous() and average.is_contiguous():
                for start in range(0, policy.numel(), _BUCKET):
                    part = slice(start, start + _BUCKET)
                    yield [average.view(-1)[part]], [policy.view(-1)[part].to(average.dtype)]
            else:
                yield [average], [policy.to(average.dtype)]
        yield from direct.values()

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average into the live parameters; called again, put the policy back bit for bit.

        The policy is copied aside meanwhile (one more set of parameters); what happens to the live parameters
        in between is dropped. The average enters rounded to the parameter's dtype and is itself unchanged.
        """
        if self._policy is None:
            self._policy = {name: p.detach().clone() for name, p in self._params.items()}
            source = self._average
        else:
            source, self._policy = self._policy, None
        for name, p in self._params.items():
            local(p.detach()).copy_(local(source[name]))

    @contextmanager
    def average(self) -> Iterator[None]:
        """Within the ``with`` block the live parameters hold the average; after it, the policy, bit for bit.

        Raises:
            StateError: the blocks are nested.
        """
        if self._policy is not None:
            raise StateError("EMA.average() within EMA.average(): the live parameters already hold the average")
        self.swap()
        try:
            yield
        finally:
            if self._policy is not None:
                self.swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The average by plain parameter name: the live tensors (clone them to keep them), safetensors-able."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over an average, in the average's own dtype.

        Args:
            state_dict: as from ``state_dict()``: one tensor for each trainable parameter, by name.

        Raises:
            MismatchError: names or shapes are not this model's.
        """
        given = dict(zip(unique_names(state_dict, "state_dict"), state_dict.values(), strict=True))
        if wrong := given.keys() ^ self._average.keys():
            raise MismatchError(
                f"the saved average has other parameters: {examples(wrong)}; load it into the model that it averages"
            )
        shapes = [
            f"{name} {tuple(given[name].shape)} for {tuple(mine.shape)}"
            for name, mine in self._average.items()
            if given[name].shape != mine.shape
        ]
        if shapes:
            raise MismatchError(
                f"the saved average has other shapes: {examples(shapes)}; load it into the model that it averages"
            )
        for name, mine in self._average.items():
            local(mine).copy_(local(shard_like(given[name], mine)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the average to one safetensors file, atomically: a crash leaves the old file or the new one.

        With sharded parameters every rank must call it, and rank 0 writes.

        Args:
            path: the file; its folder must exist.
        """
        whole = {}
        for name, mine in self._average.items():
            full = getattr(mine, "full_tensor", None)
            whole[name] = (mine if full is None else full()).contiguous()
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        target = Path(path)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            save_file(whole, scratch, metadata={"format": "pt", "ema_decay": repr(self.decay)})
            sync(scratch)
            os.replace(scratch, target)
        except BaseException:
            with suppress(FileNotFoundError):
                scratch.unlink()
            raise
        sync(target.parent)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the average that ``save`` wrote; tensors are read one at a time.

        Args:
            path: the file.

        Raises:
            CheckpointError: there is no such file, or it is broken.
            MismatchError: names or shapes are not this model's.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such file; give the file that EMA.save wrote")
        saved = Checkpoint(path)
        self.load_state_dict({name: saved.flat(name).view(info.shape) for name, info in saved.items()})
