"""The Fisher gate: keep a policy's change where the preferences need it and the reference's own behaviour does not.

    θ(s) = θ_ref + s·(θ_policy − θ_ref) ⊙ F_p/(F_p + λ·F_s)

F_p is the mean squared gradient of log π_ref over the preferred answers, F_s the same over the reference's own samples:
no fine-tuning data is needed. It holds where preferences re-weight what the reference can already do. Where they ask
for something new it suppresses what has to be learnt, and ΣF_s/ΣF_p is then small: `fisher_gate` refuses.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from ..atomic import sync
from ..checkpoint import Checkpoint
from ..errors import ArgumentError, CheckpointError, DataError, MismatchError, examples
from ..task_vector import plain_name
from .fisher import Sequences, squared_gradients, trained

Mode: TypeAlias = Literal["entries", "tensors"]
# ΣF_s/ΣF_p below which the gate refuses itself: where preferences ask for what the reference cannot do, its samples do
# not show it and F_s is small beside F_p. Of the tiny world's variants those with 3.8 and more gained by the gate, and
# in each one in which it lost to scaling back the ratio was at most 2.3 (docs/fisher-gate.md).
MINIMAL_RATIO = 3.0
_FORMAT = "paretune fisher gate 1"
_RATES_FORMAT = "paretune learning rates 1"


@dataclass(frozen=True)
class Gate:
    """What share of a policy's change each tensor, or each entry, keeps.

    Args:
        factors: ``{plain name: float32 tensor in [0, 1]}``: of the parameter's shape, or without dimensions.
        weight: λ ≥ 0.
        ratio: ΣF_s/ΣF_p over all entries; below about 3 the gate is not to be trusted.
        about: counts and anything else worth keeping with it.

    Example:
        >>> gate = Gate({"w": torch.tensor([1.0, 0.5, 0.0])}, weight=1.0, ratio=9.0)
        >>> gate.merged({"w": torch.zeros(3)}, {"w": torch.ones(3)}, scale=2.0)
        {'w': tensor([2., 1., 0.])}
    """

    factors: dict[str, Tensor]
    weight: float
    ratio: float
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> Mode:
        """Whether a factor belongs to an entry or to a whole tensor."""
        return "tensors" if all(factor.ndim == 0 for factor in self.factors.values()) else "entries"

    @property
    def trusted(self) -> bool:
        """Whether ΣF_s/ΣF_p says that the preferences re-weight what the reference can do."""
        return self.ratio >= MINIMAL_RATIO

    def factor(self, name: str) -> Tensor:
        """The factor of one parameter; wrapper segments in the name are ignored.

        Raises:
            MismatchError: the gate has none.
        """
        found = self.factors.get(plain_name(name))
        if found is None:
            raise MismatchError(f"{name}: the gate has no factor for it; it has {examples(self.factors)}")
        return found

    def merged(
        self, reference: Mapping[str, Tensor], policy: Mapping[str, Tensor], scale: float = 1.0
    ) -> dict[str, Tensor]:
        """θ_ref + s·g ⊙ (θ_policy − θ_ref) of every tensor, in the policy's dtypes.

        Args:
            reference, policy: ``{name: tensor}``.
            scale: s; 1 with λ = 0 returns the policy to the bit.

        Raises:
            ArgumentError: ``scale`` is not finite.
            MismatchError: names or shapes differ.
        """
        if not math.isfinite(scale):
            raise ArgumentError("scale", scale, "give a finite number")
        ends = {plain_name(name): tensor for name, tensor in reference.items()}
        found = {}
        for name, tensor in policy.items():
            end = ends.get(plain_name(name))
            if end is None or end.shape != tensor.shape:
                raise MismatchError(f"{name}: the reference has no tensor of shape {list(tensor.shape)} for it")
            found[name] = between(end, tensor, scale * self.factor(name).to(tensor.device))
        return found

    def learning_rates(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The same gate as factors of learning rates, scaled so that their mean over all entries is 1.

        Args:
            names: of the parameters that will be trained, as those of an adapter; all by default.

        Raises:
            ArgumentError: every factor is 0.
            MismatchError: the gate has no factor for one of them.
        """
        chosen = list(self.factors) if names is None else [plain_name(name) for name in names]
        factors = {name: self.factor(name) for name in chosen}
        sizes = self.about["numel"]  # a tensor's one factor counts for all its entries
        count = sum(sizes[name] for name in factors)
        total = sum(float(factor.mean()) * sizes[name] for name, factor in factors.items())
        if total == 0:
            raise ArgumentError("weight", self.weight, "every factor is 0, nothing could be learnt: choose a smaller")
        return {name: factor * (count / total) for name, factor in factors.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gate as one safetensors file, whole or not at all."""
        said = {"weight": self.weight, "ratio": self.ratio, "about": self.about}
        _write(Path(path), self.factors, {"format": _FORMAT, "gate": json.dumps(said)})

    def save_learning_rates(self, path: str | os.PathLike[str]) -> None:
        """Write `learning_rates` as a safetensors file that the optimizers take, whole or not at all."""
        said = {"weight": self.weight, "ratio": self.ratio, "mode": self.mode}
        _write(Path(path), self.learning_rates(), {"format": _RATES_FORMAT, "gate": json.dumps(said)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gate:
        """Read a gate's file.

        Raises:
            CheckpointError: it is not a gate.
        """
        from safetensors import safe_open

        checkpoint = Checkpoint(path)  # refuses what is broken or unsafe
        with safe_open(str(checkpoint.path), "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path}: not a gate: make one with paretune average fisher")
        said = json.loads(metadata["gate"])
        return cls({name: checkpoint.read(name) for name in checkpoint}, said["weight"], said["ratio"], said["about"])


def _write(target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, temporary, metadata=metadata)
        os.chmod(temporary, 0o644)
        sync(Path(temporary))
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def between(reference: Tensor, policy: Tensor, share: Tensor) -> Tensor:
    """reference + share·(policy − reference), exact at shares of 0 and 1; in float32 at least, rounded once.

    Example:
        >>> between(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0]), torch.tensor(0.5))
        tensor([2., 2.])
    """
    wide = torch.float64 if policy.dtype in (torch.float32, torch.float64) else torch.float32
    low, high, share = reference.to(wide), policy.to(wide), share.to(wide)
    change = high - low
    # From the nearer end: the reference at 0 and the policy at 1 come out to the bit.
    return torch.where(share < 0.5, low + share * change, high - (1 - share) * change).to(policy.dtype)


def fisher_gate(
    policy: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None,
    reference: nn.Module,
    preferences: Sequences,
    samples: Sequences,
    weight: float = 1.0,
    *,
    mode: Mode = "entries",
    scratch: str | os.PathLike[str] | None = None,
    override: bool = False,
) -> Gate:
    """The Fisher gate of a reference, its preferences and its own samples.

        g = F_p/(F_p + λ·F_s),  F = mean over sequences of (∂ log π_ref(answer)/∂θ)²

    With ``mode="tensors"`` one factor a tensor, ΣF_p/(ΣF_p + λΣF_s): memory for one gradient beside the model. Where
    neither F sees an entry its factor is 1/(1 + λ), that of equal F.

    Args:
        policy: what will be gated: checked against the reference's names and shapes; None where there is none yet
            (a gate as learning rates).
        reference: the reference model; its mode and gradients are afterwards as they were. Of a PEFT model the base
            layers' weights count as well as the adapter's, under PEFT's names.
        preferences: tokenised preferred answers: dicts of ``input_ids`` and ``completion_mask`` (1 on the tokens whose
            log-probability counts), one sequence each.
        samples: the reference's own samples in the same form; they must contain user turns.
        weight: λ ≥ 0; 0 keeps the policy, infinity returns the reference.
        mode: ``"entries"`` or ``"tensors"``.
        scratch: a directory for the sums of squares of ``"entries"`` (8 bytes a parameter), to keep them out of memory.
        override: make the gate although ΣF_s/ΣF_p is below `MINIMAL_RATIO`.

    Returns:
        The gate, with the ratio; `Gate.merged` applies it, `Gate.save` writes what ``paretune average fisher`` takes.

    Raises:
        ArgumentError: an argument is out of range, or the ratio is too small and ``override`` is not set.
        DataError: no sequences, or a gradient that is not finite.
        MismatchError: policy and reference differ in names or shapes.

    Reference:
        Fisher-weighted averaging: arXiv 2111.09832, Eq. 5. There each model brings its own Fisher of its own data; here
        both are taken at the reference, F_s on what it says itself.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_attention_heads=1, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))
        >>> answer = {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]}
        >>> gate = fisher_gate(model, model, [answer], [answer], weight=1.0, override=True)
        >>> gate.ratio, gate.factors["model.norm.weight"]
        (1.0, tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    """
    if not weight >= 0:
        raise ArgumentError("weight", weight, "must be at least 0: how much the reference's own behaviour counts")
    if mode not in get_args(Mode):
        raise ArgumentError("mode", mode, "choose 'entries' or 'tensors'")
    if policy is not None:
        _check(policy, reference)
    whole = mode == "entries"
    wanted = squared_gradients(reference, preferences, "preferences", entries=whole, scratch=scratch)
    kept = squared_gradients(reference, samples, "samples", entries=whole, scratch=scratch)
    totals = [sum(float(value.sum(dtype=torch.float64)) for value in each.sums.values()) for each in (wanted, kept)]
    if totals[0] == 0:
        raise DataError("preferences: every gradient is 0; do the completion masks mark any token?")
    ratio = totals[1] / totals[0]
    if ratio < MINIMAL_RATIO and not override:
        raise ArgumentError(
            "ΣF_s/ΣF_p",
            round(ratio, 3),
            f"below {MINIMAL_RATIO:g} the preferences ask for what the reference cannot do yet and the gate would "
            "suppress it: use self-rehearsal, or override=True (--override)",
        )
    factors = {name: _share(wanted.sums[name], kept.sums[name], weight) for name in wanted.sums}
    sizes = {plain_name(name): p.numel() for name, p in trained(reference).items()}
    about = {"preferences": wanted.count, "samples": kept.count, "mode": mode, "numel": sizes}
    return Gate(factors, float(weight), ratio, about)


def _share(wanted: Tensor, kept: Tensor, weight: float) -> Tensor:
    if math.isinf(weight):
        return torch.zeros_like(wanted)
    both = wanted + weight * kept
    return torch.where(both == 0, torch.full_like(wanted, 1 / (1 + weight)), wanted / both)


def _check(policy: object, reference: nn.Module) -> None:
    shapes = _shapes(policy)
    parameters = {plain_name(name): tuple(p.shape) for name, p in trained(reference).items()}
    wrong = [name for name, shape in parameters.items() if shapes.get(name, shape) != shape]
    if wrong:
        raise MismatchError(f"policy and reference differ in shape: {examples(wrong)}: are they of one run?")
    missing = [name for name in parameters if name not in shapes]
    if missing:
        raise MismatchError(f"the policy lacks parameters of the reference: {examples(missing)}: are they of one run?")


def _shapes(policy: object) -> dict[str, tuple[int, ...]]:
    if isinstance(policy, nn.Module):
        return {plain_name(name): tuple(p.shape) for name, p in policy.named_parameters()}
    if isinstance(policy, Mapping):
        return {plain_name(name): tuple(cast(Tensor, tensor).shape) for name, tensor in policy.items()}
    if isinstance(policy, str | os.PathLike):
        return {name: info.shape for name, info in Checkpoint(policy).items()}
    raise ArgumentError("policy", policy, "pass a model, {name: tensor}, a checkpoint's path or None")
