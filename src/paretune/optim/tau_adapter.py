"""τ beside LoRA: low-rank factors of the task vector in each adapted layer, switched by a growing gate."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import atomic
from ..checkpoint import GATE_FILE
from ..errors import ArgumentError, CheckpointError, MismatchError, examples
from ..operators import mask_key
from ..task_vector import TaskVector, plain_name

_ROUNDS = 2  # power iterations of the randomised SVD: τ's spectrum decays slowly
_EXTRA = 8  # columns more than wanted


@dataclass(frozen=True)
class Gate:
    """What an adapter does not say about itself: how far its policy has moved along τ.

    Args:
        gate: c, the share of τ that is added.
        fingerprint: of the task vector.
        base, reference: where it was read from; None for models that were in memory.
        tensors: the weights that τ is added to.
        rank: of τ's factors in training.
        captured: their share of ‖τ‖² over these weights.
        masked: τ was added in random parts (mode "absorb", density < 1): c·τ is their mean, not their sum.
    """

    gate: float
    fingerprint: str
    base: str | None
    reference: str | None
    tensors: tuple[str, ...]
    rank: int
    captured: float
    masked: bool = False

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write it beside the adapter."""
        atomic.write_text(Path(directory) / GATE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Gate | None:
        """The gate of an adapter's directory; None where it was trained without τ.

        Raises:
            CheckpointError: the file is broken.
        """
        file = Path(directory) / GATE_FILE
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_bytes())
            found = cls(**{**content, "tensors": tuple(content["tensors"])})
            if not (math.isfinite(found.gate) and all(isinstance(name, str) for name in found.tensors)):
                raise ValueError("gate or tensors")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{file}: not what LoRAMerging writes ({error}): save the adapter again") from None
        return found


class TauAdapter:
    """Adds c·τ (its best approximation of some rank) to every layer that a LoRA adapter is in.

        W_effective = W + s·B·A + c·τ_r

    It acts where the adapter is active, and not where adapters are switched off or another one is on: the reference
    policy of PEFT's DPO stays what it is. Its factors are buffers: not trained, not saved.

    Args:
        model: a ``peft.PeftModel`` with a LoRA adapter on linear layers.
        tau: the task vector.
        rank: of τ's factors; None for all of τ.
        adapter: the adapter's name.

    Raises:
        ArgumentError: no LoRA adapter of that name, one on other than linear layers, DoRA, whole modules trained.
        MismatchError: an adapted weight has no tensor of its shape in τ.
    """

    def __init__(self, model: nn.Module, tau: TaskVector, rank: int | None = 16, adapter: str = "default") -> None:
        self._layers = adapted_layers(model, adapter)
        missing = [name for name in self._layers if name not in tau]
        if missing:
            raise MismatchError(
                f"adapted weights without a task vector: {examples(missing)}: build τ from the models under the adapter"
            )
        self.tensors = tuple(self._layers)
        self.rank, self._adapter = 0, adapter
        whole = kept = 0.0
        for name, layer in self._layers.items():
            factor = layer.lora_A[adapter].weight
            wanted = (
                (layer.in_features, layer.out_features)
                if layer.fan_in_fan_out
                else (layer.out_features, layer.in_features)
            )
            if tau.shape(name) != wanted:
                raise MismatchError(
                    f"{name} {list(wanted)} against {list(tau.shape(name))} in the task vector: "
                    "build τ from the models under the adapter"
                )
            matrix = tau.dense(name).view(wanted)
            up, down = factors(matrix.T if layer.fan_in_fan_out else matrix, rank, name)
            whole += float(matrix.square().sum(dtype=torch.float64))
            kept += float(up.square().sum(dtype=torch.float64))
            self.rank = max(self.rank, down.shape[0])
            for buffer, value in (("tau_up", up), ("tau_down", down)):
                layer.register_buffer(buffer, value.to(factor.device, factor.dtype), persistent=False)
            gate = torch.zeros((), device=factor.device)
            layer.register_buffer("tau_gate", gate, persistent=False)
            layer.register_forward_hook(self._add)
        self.captured = kept / whole if whole else 1.0

    def set(self, gate: float) -> None:
        """Set c in all layers."""
        for layer in self._layers.values():
            layer.tau_gate.fill_(gate)

    @property
    def resident_bytes(self) -> int:
        """Memory of τ's factors."""
        return sum(layer.tau_up.nbytes + layer.tau_down.nbytes for layer in self._layers.values())

    def _add(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if layer.disable_adapters or self._adapter not in layer.active_adapters:
            return None
        x = nn.functional.linear(inputs[0].to(layer.tau_down.dtype), layer.tau_down)
        return output + (nn.functional.linear(x, layer.tau_up) * layer.tau_gate).to(output.dtype)


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The LoRA layers of one adapter by the name of the weight under them.

    Raises:
        ArgumentError: see `TauAdapter`.
    """
    config = getattr(model, "peft_config", {}).get(adapter)
    if config is None or str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ArgumentError(
            "adapter", adapter, f"the model has no such LoRA adapter (it has: {known}): use get_peft_model"
        )
    for option in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters"):
        if getattr(config, option, None):
            mend = "only plain LoRA factors can be merged with a task vector: leave it out, or train all parameters"
            raise ArgumentError(option, getattr(config, option), mend)
    found: dict[str, Any] = {}
    unusable: list[str] = []
    for name, layer in model.named_modules():
        if adapter in (getattr(layer, "lora_embedding_A", None) or {}):
            unusable.append(name)
        elif adapter in (getattr(layer, "lora_A", None) or {}):
            if not isinstance(layer.lora_A[adapter], nn.Linear):
                unusable.append(name)
            found[_weight_name(name)] = layer
    if unusable:
        raise ArgumentError("target_modules", examples(unusable), "τ can be added to adapted linear layers only")
    return found


def factors(matrix: Tensor, rank: int | None, name: str) -> tuple[Tensor, Tensor]:
    """up·down, the best approximation of a matrix of some rank (nearly: by a randomised SVD where that is cheaper).

    Args:
        matrix: float32, out × in.
        rank: ≥ 1; None for all.
        name: keys the random test vectors: the same factors on every rank, torch's generator untouched.

    Returns:
        up (out × rank), down (rank × in, orthonormal rows).

    Example:
        >>> up, down = factors(torch.ones(4, 3), 1, "w")
        >>> torch.allclose(up @ down, torch.ones(4, 3), atol=1e-6)
        True
    """
    least = min(matrix.shape)
    if rank is None or 4 * (rank + _EXTRA) >= least:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(mask_key(0, 0, "svd", name) >> 1)
        q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], rank + _EXTRA, generator=generator).to(matrix)).Q
        for _ in range(_ROUNDS):
            q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
        u, s, v = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ u
    keep = least if rank is None else min(rank, least)
    return u[:, :keep] * s[:keep], v[:keep].contiguous()


def keep_gate(model: Any, adapter: str, described: Callable[[], Gate], return_to: Callable[[Gate], None]) -> None:
    """From now on ``model`` saves the gate with its adapter, and takes it back when it loads one that has a gate.

    Args:
        model: the ``peft.PeftModel``.
        adapter: the trained adapter's name.
        described: the gate now.
        return_to: called with the gate of a saved adapter that replaces the trained one.
    """
    save, load = model.save_pretrained, model.load_adapter

    def save_pretrained(save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        result = save(save_directory, *args, **options)
        if options.get("is_main_process", True):
            described().write(save_directory)
        return result

    def load_adapter(model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **options: Any) -> Any:
        result = load(model_id, adapter_name, *args, **options)
        if adapter_name == adapter and (saved := Gate.read(model_id)) is not None:
            return_to(saved)
        return result

    model.save_pretrained, model.load_adapter = save_pretrained, load_adapter


def _weight_name(module: str) -> str:
    return plain_name(f"{module.removeprefix('base_model.model.')}.weight")


def lora_names(names: Mapping[str, Tensor], adapter: str) -> list[str]:
    """Of trained parameters those that are not the adapter's own factors."""
    ends = (f".lora_A.{adapter}.weight", f".lora_B.{adapter}.weight")
    return [name for name in names if not name.endswith(ends)]
