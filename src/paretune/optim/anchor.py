"""Anchor: any optimizer with an L2 or L1 pull of the policy to the reference."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoint import Checkpoint
from ..errors import ArgumentError, MismatchError, StateError, examples
from ..task_vector import plain_name
from .parts import local
from .wrapper import OptimizerWrapper, shard_like

Reference: TypeAlias = "str | os.PathLike[str] | nn.Module | Mapping[str, Tensor] | None"

_CHUNK = 1 << 15  # elements pulled at a time: on the CPU the scratch stays in the cache …
_DEVICE_CHUNK = 1 << 24  # … and elsewhere few kernels are started
_SAMPLES = 256  # elements of each tensor in the fingerprint


class Anchor(OptimizerWrapper):
    """Any optimizer, followed by a decoupled pull of the policy to the reference.

    After the inner step, with η the group's learning rate and d = θ − θ_r:

    - **L2**: θ ← θ − η·l2·d, the gradient step of l2/2·‖θ − θ_r‖² outside the inner optimizer, as AdamW's decay
      is outside Adam (it *is* that decay, towards θ_r instead of 0);
    - **L1**: then d is soft-thresholded by η·l1: the proximal step of l1·‖θ − θ_r‖₁, so a parameter within η·l1
      of its reference comes to lie on it exactly.

    Over T steps L2 alone takes a distance to (1 − η·l2)^T of itself: at η=1e-6 and T=1000 it needs l2 of 100 to
    1000 to be felt. Parameters without a gradient are left alone, as torch's decay leaves them.

    Arithmetic is float32 (float64 for float64 parameters). For float32 parameters the result is rounded once;
    for bf16 and fp16 ones, whose spacing would swallow the pull, what rounding left out is carried to the next
    step, and saved with the optimizer's state (``anchor_carry``, float32, 4 bytes a parameter).

    The reference is never part of the state dict: a fingerprint of it is (``anchor_fingerprint`` in
    ``param_groups``), and a state saved with another reference is refused. With ``None`` build the optimizer
    while the model *is* the reference; to resume from a checkpoint give the reference itself.

    Args:
        inner_optimizer: any torch optimizer built from ``model.named_parameters()``, but none with a closure of
            its own (LBFGS).
        reference: θ_r: a checkpoint (path or hub id; memory-mapped and read by name in chunks, nothing is
            loaded), a module, ``{name: tensor}``, or None for a copy of the parameters as they are now.
        l2: ≥ 0, with lr·l2 ≤ 1.
        l1: ≥ 0.

    Raises:
        ArgumentError: l1 or l2 out of range, a reference of another kind, parameters without names.
        MismatchError: parameters that the reference lacks or has in another shape.

    Reference:
        arXiv 2309.06256, the L1 and L2 penalty baselines (there inside the loss).

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
        >>> optimizer = Anchor(inner, {"weight": torch.ones(1, 1)}, l2=5.0)
        >>> model.weight.grad = torch.zeros(1, 1)
        >>> optimizer.step()
        >>> model.weight.item()
        2.0
    """

    own_state: ClassVar[frozenset[str]] = frozenset({"anchor_carry"})

    def __init__(
        self, inner_optimizer: Optimizer, reference: Reference = None, l2: float = 0.0, l1: float = 0.0
    ) -> None:
        super().__init__(inner_optimizer)
        for argument, value in (("l2", l2), ("l1", l1)):
            if not 0 <= value < float("inf"):
                raise ArgumentError(argument, value, "must be finite and ≥ 0")
        self.l2 = l2
        self.l1 = l1
        self._check_groups()
        self._checkpoint: Checkpoint | None = None
        self._tensors: dict[str, Tensor] = {}
        self._snapshot = reference is None
        if isinstance(reference, nn.Module):
            named = reference.named_parameters(remove_duplicate=False)  # the policy may name a tied one otherwise
            self._tensors = {plain_name(name): p.detach() for name, p in named}
        elif isinstance(reference, Mapping):
            self._tensors = {plain_name(name): tensor.detach() for name, tensor in reference.items()}
        elif isinstance(reference, str | os.PathLike):
            self._checkpoint = Checkpoint(reference)
        elif reference is not None:
            raise ArgumentError("reference", reference, "give a checkpoint, a module, {name: tensor} or None")
        self._meet()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; with ``reference=None`` its parameters as they are now are their reference.

        Args:
            param_group: as torch takes it, with (name, parameter) pairs.
        """
        super().add_param_group(param_group)
        try:
            self._check_groups()
            self._meet()
        except (ArgumentError, MismatchError):
            self.inner.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, for the same reference.

        Args:
            state_dict: of this wrapper, or of the inner optimizer alone.

        Raises:
            StateError: the state is of other parameters, or was saved with another reference.
        """
        own = [group["anchor_fingerprint"] for group in self.param_groups]
        saved = [group.get("anchor_fingerprint") for group in state_dict["param_groups"]]
        if any(there not in (None, here) for here, there in zip(own, saved, strict=False)):
            mend = "the reference itself (not None) when resuming" if self._snapshot else "the same reference"
            raise StateError(f"the saved optimizer state belongs to a run pulled to another reference: give {mend}")
        super().load_state_dict(state_dict)
        for group, fingerprint in zip(self.param_groups, own, strict=True):
            group["anchor_fingerprint"] = fingerprint

    def _check_groups(self) -> None:
        for index, group in enumerate(self.param_groups):
            lr = group.get("lr")
            if lr is None:
                mend = "the pull is scaled by the learning rate; give the inner optimizer an explicit lr"
                raise ArgumentError(f"param_groups[{index}]['lr']", lr, mend)
            if float(lr) * self.l2 > 1:
                mend = f"lr·l2 must be ≤ 1, more overshoots the reference; at lr={float(lr):g} give ≤ {1 / float(lr):g}"
                raise ArgumentError("l2", self.l2, mend)

    def _meet(self) -> None:
        """Match the reference with the parameters and note its fingerprint in every group."""
        missing, wrong = [], []
        for _, pairs in self.named_groups():
            for name, p in pairs:
                if self._snapshot and name not in self._tensors:
                    if p.is_meta:
                        mend = f"parameter {name} is on the meta device; give the reference as a path"
                        raise ArgumentError("reference", None, mend)
                    self._tensors[name] = p.detach().clone()
                shape = self._shape(name)
                if shape is None:
                    missing.append(name)
                elif shape != tuple(p.shape):
                    wrong.append(f"{name} {shape} for {tuple(p.shape)}")
                elif self._checkpoint is None and local(self._tensors[name]).data_ptr() == local(p).data_ptr():
                    # The policy itself was given as the reference: keep it as it is now.
                    self._tensors[name] = self._tensors[name].clone()
        if missing:
            raise MismatchError(
                f"the reference lacks these parameters: {examples(missing)}; give the policy's own SFT model"
            )
        if wrong:
            raise MismatchError(f"the reference has other shapes: {examples(wrong)}; give the policy's own SFT model")
        for group, pairs in self.named_groups():
            group.setdefault("anchor_fingerprint", self._fingerprint(name for name, _ in pairs))

    def _shape(self, name: str) -> tuple[int, ...] | None:
        if self._checkpoint is not None:
            info = self._checkpoint.get(name)
            return None if info is None else info.shape
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def _fingerprint(self, names: Iterable[str]) -> str:
        """A hash of names, shapes and up to 256 evenly spread values of each tensor, in float32."""
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(names):
            flat = self._flat(name)
            count = min(_SAMPLES, flat.numel())
            places = torch.arange(count, device=flat.device) * flat.numel() // max(1, count)
            values = flat[places].float().cpu() + 0.0  # −0 becomes 0
            digest.update(f"{name}{self._shape(name)}".encode() + values.numpy().tobytes())
        return digest.hexdigest()

    def _flat(self, name: str) -> Tensor:
        """The reference of one parameter, whole, in one dimension."""
        if self._checkpoint is not None:
            return self._checkpoint.flat(name)
        tensor = self._tensors[name]
        full = getattr(tensor, "full_tensor", None)
        return (tensor if full is None else full()).reshape(-1)

    def _local_reference(self, name: str, p: Tensor) -> Tensor:
        """The reference of this rank's part of a parameter, in one dimension."""
        if not hasattr(p, "to_local"):
            return self._flat(name)
        if name not in self._tensors or not hasattr(self._tensors[name], "to_local"):
            # A shard is cut once and kept: what is held is one rank's share of the reference.
            self._tensors[name] = shard_like(self._flat(name).view(p.shape), p)
        return local(self._tensors[name]).reshape(-1)

    def _step(self) -> None:
        initialising = self._initialising()
        self.inner.step()
        if self.l2 == 0 and self.l1 == 0:
            return
        for group, pairs in self.named_groups():
            lr = float(group["lr"])
            for name, p in pairs:
                if p.grad is None:
                    continue
                carry = None
                if torch.finfo(p.dtype).bits < 32:
                    if p not in self.own:
                        self.own[p] = {"anchor_carry": torch.zeros_like(p, dtype=torch.float32, requires_grad=False)}
                    carry = local(self.own[p]["anchor_carry"])
                if lr != 0 and not initialising:
                    self._pull(local(p.detach()), carry, self._local_reference(name, p), lr)

    def _pull(self, p: Tensor, carry: Tensor | None, reference: Tensor, lr: float) -> None:
        """Pull one parameter in place, some elements at a time; ``reference`` is flat."""
        flat = p.view(-1) if p.is_contiguous() else p.reshape(-1)
        wide = torch.promote_types(p.dtype, torch.float32)
        left = None if carry is None else carry.reshape(-1)
        chunk = _CHUNK if p.device.type == "cpu" else _DEVICE_CHUNK
        for start in range(0, flat.numel(), chunk):
            part = slice(start, start + chunk)
            theta = flat[part].to(wide)
            if left is not None:
                theta = theta + left[part]
            pulled = pull(theta, reference[part].to(p.device, wide), lr * self.l2, lr * self.l1)
            flat[part] = pulled  # rounds to the parameter's dtype
            if left is not None:
                left[part] = pulled - flat[part].to(wide)
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))
        if carry is not None and left is not None and not carry.is_contiguous():
            carry.copy_(left.view(p.shape))


def pull(theta: Tensor, reference: Tensor, shrink: float, threshold: float) -> Tensor:
    """One pull to the reference: the distance shrunk by a factor, then soft-thresholded.

    d ← (1 − shrink)·(θ − θ_r);  θ ← θ_r + sign(d)·max(|d| − threshold, 0), written as small changes of θ so that
    one rounding remains; where |d| ≤ threshold the result is θ_r exactly.

    Args:
        theta: the policy.
        reference: θ_r, same shape and dtype.
        shrink: η·l2; taken as 1 above 1.
        threshold: η·l1, in units of the parameters.

    Returns:
        The pulled policy.

    Reference:
        arXiv 2309.06256, the L1 and L2 baselines; the L1 step is the proximal operator of threshold·‖θ − θ_r‖₁.

    Example:
        >>> pull(torch.tensor([5.0, 1.5]), torch.ones(2), shrink=0.5, threshold=0.5)
        tensor([2.5000, 1.0000])
    """
    distance = theta - reference
    shrunk = distance * min(shrink, 1.0)
    distance -= shrunk
    change = shrunk + distance.clamp(-threshold, threshold)
    return torch.where(distance.abs() <= threshold, reference, theta - change)
