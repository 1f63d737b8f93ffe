"""Online merging with LoRA: the adapter is trained, τ comes in beside it."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import log
from ..errors import ArgumentError, StateError
from ..operators import mask_key, sampled_indices_of
from ..task_vector import TaskVector
from .arguments import in_range, number, whole
from .pull import weight_for_pull
from .tau_adapter import Gate, TauAdapter, adapted_layers, keep_gate, lora_names
from .weights import Weights, require_supported
from .wrapper import OptimizerWrapper

_LOG = log.get("optim")


class LoRAMerging(OptimizerWrapper):
    """Any optimizer of a LoRA adapter, with the policy moving along the task vector at every step.

        (A, B) ← (A, B) + (1−α)·δ,   c ← c + α·p,   θ = θ_r + s·B·A + c·τ

    c·τ is what OnDARE's masked additions α·F(τ) amount to in expectation; the adapter's updates are not sparsified.
    ``mode="gate"``: τ stands in a frozen low-rank adapter of its own beside the trained one, and c is its scale. The
    frozen weights are not touched, so the reference policy that PEFT gives DPO (adapters off, or a copy of the adapter)
    stays what it is, and they may be quantised. In training τ is approximated by ``rank``;
    ``paretune export-adapter`` adds all of it. The gate is saved with the optimizer's state, and beside the adapter by
    ``model.save_pretrained``.
    ``mode="absorb"``: α·F(τ), with OnDARE's own masks, is added to the frozen weights themselves, of full rank and
    exact. They must not be quantised, and the reference policy must not be read from them: give DPO a ``ref_model``
    or precomputed log-probabilities. Resuming adds all past merges to freshly loaded weights again.

    Args:
        inner_optimizer: of the adapter's factors only, built from named parameters.
        model: the ``peft.PeftModel``, with plain LoRA on linear layers.
        tau: τ = reference − base, of the weights under the adapter.
        weight: α in [0, 1].
        pull: instead of ``weight``: the share of τ to add over the run, ≥ 0; needs ``total_steps``.
        total_steps: T, optimizer steps of the run.
        density: p in (0, 1]; in mode "gate" only its product with α matters.
        rank: of τ's factors in training, ≥ 1; None for all of τ (mode "gate").
        mode: ``"gate"`` or ``"absorb"``.
        seed: keys the masks of mode "absorb".
        adapter: the adapter's name.

    Raises:
        ArgumentError: a value out of range; trained parameters that are not the adapter's factors; DoRA, adapted
            embeddings, whole modules trained beside LoRA; quantised weights with mode "absorb".
        MismatchError: an adapted weight has no tensor of its shape in τ.

    Reference: arXiv 2405.17931, Eq. 3 (its optimizers do not work with LoRA; the gate is ours).

    Example:
        >>> import torch, peft, paretune as pt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> base = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        >>> tau = pt.TaskVector.between(base=base, reference=net)
        >>> model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
        >>> trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        >>> optimizer = pt.LoRAMerging(torch.optim.AdamW(trained), model, tau, pull=0.1, total_steps=10)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> round(optimizer.gate, 6)
        0.01
    """

    own_state: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        inner_optimizer: Optimizer,
        model: nn.Module,
        tau: TaskVector,
        weight: float | None = None,
        pull: float | None = None,
        total_steps: int | None = None,
        density: float = 1.0,
        rank: int | None = 16,
        mode: Literal["gate", "absorb"] = "gate",
        seed: int = 0,
        adapter: str = "default",
    ) -> None:
        super().__init__(inner_optimizer)
        if not isinstance(tau, TaskVector):
            raise ArgumentError("tau", tau, "pass TaskVector.between(base=…, reference=…)")
        if not 0 < number(density, "density") <= 1:
            raise ArgumentError("density", density, "must be in (0, 1]")
        if mode not in ("gate", "absorb"):
            raise ArgumentError("mode", mode, "choose 'gate' or 'absorb'")
        if rank is not None:
            whole("rank", rank, 1)
        whole("seed", seed, None)
        self.weight = lora_weight(weight, pull, total_steps, density)
        self.density, self.seed, self.mode = density, seed, mode
        layers = adapted_layers(model, adapter)
        trained = {name: p for _, named in self.named_groups() for name, p in named}
        if strangers := lora_names(trained, adapter):
            mend = f"LoRAMerging trains the factors of adapter {adapter!r} only: pass those, or train all with OnDARE"
            raise ArgumentError("inner_optimizer", strangers[0], mend)
        self._tau, self._model = tau, model
        self._adapter: TauAdapter | None = None
        self._absorbed: dict[str, Weights] = {}
        if mode == "gate":
            self._adapter = TauAdapter(model, tau, rank, adapter)
            self._tensors = self._adapter.tensors
        else:
            self._absorbed = _weights_under(layers, tau)
            self._tensors = tuple(self._absorbed)
        for group in self.param_groups:
            group.update(merge_calls=0, tau_fingerprint=tau.fingerprint, tau_gate=0.0)
        if hasattr(model, "save_pretrained"):
            keep_gate(model, adapter, self.described, self._return_to)
        self.statement: str = lora_statement(self.weight, density, total_steps, self._tensors, self._adapter)
        _LOG.info(self.statement)
        if mode == "absorb":
            _LOG.warning(
                "mode='absorb' changes the weights under the adapter: give DPO a ref_model or "
                "precompute_ref_log_probs, its implicit reference would move with them"
            )

    @property
    def gate(self) -> float:
        """c, the share of τ that is added so far."""
        return float(self.param_groups[0]["tau_gate"])

    def described(self) -> Gate:
        """The gate with all that ``paretune export-adapter`` needs to know."""
        base, reference = self._tau.sources
        rank, captured = (0, 1.0) if self._adapter is None else (self._adapter.rank, self._adapter.captured)
        masked = self.mode == "absorb" and self.density < 1
        return Gate(self.gate, self._tau.fingerprint, base, reference, self._tensors, rank, captured, masked)

    def _return_to(self, saved: Gate) -> None:
        """An adapter saved earlier takes this one's place (a trainer's best checkpoint): its gate belongs to it."""
        if self._absorbed and saved.gate != self.gate:
            raise StateError(
                f"the adapter was saved when {saved.gate:.6g} of τ was added, the weights under it have absorbed "
                f"{self.gate:.6g}: load the model afresh, or take mode='gate'"
            )
        for group in self.param_groups:
            group["tau_gate"] = saved.gate
        if self._adapter is not None:
            self._adapter.set(saved.gate)

    def _step(self) -> None:
        if self._initialising():
            self.inner.step()
            return
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in trained] if self.weight else []
        self.inner.step()
        for p, old in zip(trained, before, strict=False):
            p.lerp_(old, self.weight)  # (1−α)·δ
        self._merge(self.param_groups[0]["merge_calls"])
        for group in self.param_groups:
            group["merge_calls"] += 1
            group["tau_gate"] += self.weight * self.density
        if self._adapter is not None:
            self._adapter.set(self.gate)

    def _merge(self, call: int) -> None:
        """Mode "absorb": add α·F(τ) of one step to the weights under the adapter."""
        if not self._absorbed or not self.weight:
            return
        names = list(self._absorbed)
        keys = [mask_key(self.seed, call, "tau", name) for name in names]
        for name, index in zip(
            names, sampled_indices_of(keys, [self._tau.numel(n) for n in names], self.density), strict=True
        ):
            weights = self._absorbed[name]
            values = self._tau.gather(name, index) * self.weight
            weights.add_at(index.to(weights.flat.device), values.to(weights.flat.device))
            weights.finish()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, the gate with it.

        Raises:
            StateError: it was saved without LoRAMerging, for other parameters, or with another task vector; mode
                "absorb" has changed the weights already.
        """
        for other in state_dict["param_groups"]:
            if "tau_gate" not in other:
                raise StateError("the saved state is of an optimizer without LoRAMerging: resume with the same one")
            if other["tau_fingerprint"] != self._tau.fingerprint:
                raise StateError(
                    f"the saved state was made with task vector {other['tau_fingerprint'][:12]}, this one is "
                    f"{self._tau.fingerprint[:12]}: pass the same base and reference"
                )
        if self._absorbed and self.param_groups[0]["merge_calls"]:
            raise StateError("mode='absorb' has changed the model's weights already: load the model afresh, then this")
        super().load_state_dict(state_dict)
        if self._adapter is not None:
            self._adapter.set(self.gate)
        for call in range(self.param_groups[0]["merge_calls"] if self._absorbed else 0):
            self._merge(call)


def lora_statement(
    weight: float, density: float, total_steps: int | None, tensors: Sized, adapter: TauAdapter | None = None
) -> str:
    """What τ will amount to beside a LoRA adapter.

    Args:
        weight, density, total_steps: of `LoRAMerging`; without steps it is said for every 1,000.
        tensors: the weights that τ is added to.
        adapter: τ's factors, once they are made.
    """
    steps = total_steps or 1000
    of = f"{steps} steps" if total_steps else f"every {steps} steps"
    text = f"LoRAMerging: pull {weight * density * steps:.3g} of τ over {of} (weight {weight:.3g}, "
    text += f"density {density:.3g}) in {len(tensors)} weights"
    if adapter is not None:
        text += f"; in training τ has rank {adapter.rank}, which holds {adapter.captured:.1%} of ‖τ‖²"
    return text + "; the adapter's update is not sparsified: compare with weight 0"


def lora_weight(weight: float | None, pull: float | None, total_steps: int | None, density: float) -> float:
    """α, given or from the pull; checked."""
    if total_steps is not None:
        whole("total_steps", total_steps, 1)
    if pull is None:
        in_range("weight", 5e-7 if weight is None else weight, 0, 1)
        return 5e-7 if weight is None else weight
    in_range("pull", pull, 0, float("inf"))
    if weight is not None:
        raise ArgumentError("pull", pull, "give pull or weight, not both")
    if total_steps is None:
        raise ArgumentError("pull", pull, "needs total_steps, the optimizer steps of the run")
    return weight_for_pull(pull, density, total_steps, 1)


def _weights_under(layers: dict[str, Any], tau: TaskVector) -> dict[str, Weights]:
    """The frozen weights under the adapter, bfloat16 ones with the low half of a float32 master."""
    found = {}
    for name, layer in layers.items():
        weight: Tensor = layer.get_base_layer().weight
        if not weight.is_floating_point() or hasattr(weight, "quant_state"):
            raise ArgumentError("mode", "absorb", f"{name} is quantised: only mode='gate' leaves it as it is")
        if hasattr(weight, "device_mesh"):
            raise ArgumentError("mode", "absorb", f"{name} is sharded: take mode='gate'")
        require_supported(name, weight)
        tau.match({name: tuple(weight.shape)})
        low = torch.zeros(weight.numel(), dtype=torch.int16, device=weight.device)
        found[name] = Weights(weight.detach(), low if weight.dtype == torch.bfloat16 else None)
    return found
