"""PEFT's LoRA adapters, merged into their base model on the fly: W + scaling·B·A."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, examples
from .numbers import Floats
from .views import Adapted, Stored, View, numel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.(?!weight$)\w+)?(\.weight)?$")


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's configuration and tensors."""

    path: Path
    config: dict[str, Any]
    checkpoint: Checkpoint

    @classmethod
    def open(cls, directory: Path) -> Adapter:
        """Read an adapter's configuration and headers.

        Raises:
            CheckpointError: it is not a LoRA adapter in safetensors, or of a kind that cannot be merged exactly.
        """
        if not (directory / WEIGHTS).is_file():
            raise CheckpointError(f"{directory}: an adapter without {WEIGHTS}: save it with safe_serialization=True")
        try:
            config = json.loads((directory / CONFIG).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{directory / CONFIG}: not readable JSON ({error})") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{directory / CONFIG}: not a JSON object")
        found = cls(directory, config, Checkpoint(directory / WEIGHTS))
        found._check()
        return found

    @property
    def base(self) -> str | None:
        """The model that the adapter says it belongs to."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def _check(self) -> None:
        mend = "merge it with peft (merge_and_unload) and save the model"
        if self.config.get("peft_type") != "LORA":
            raise CheckpointError(f"{self.path}: adapter of type {self.config.get('peft_type')}, not LORA: {mend}")
        for option in ("use_dora", "use_qalora", "trainable_token_indices", "alora_invocation_tokens", "lora_bias"):
            if self.config.get(option):
                raise CheckpointError(f"{self.path}: {option} is not supported: {mend}")

    def apply(self, views: dict[str, View]) -> dict[str, View]:
        """The model's tensors with this adapter added.

        Args:
            views: the model's tensors by name.

        Raises:
            CheckpointError: a tensor of the adapter does not fit the model.
        """
        found = dict(views)
        pairs: dict[str, dict[str, str]] = {}
        for name in self.checkpoint:
            part = _PART.match(name.removeprefix(_PREFIX))
            if part is not None:
                side = part["side"] + ("e" if part["embedding"] else "")
                pairs.setdefault(part["module"], {})[side] = name
                continue
            target = _replaced(name)
            if target not in views:
                raise self._stranger(name)
            replacement = Stored(self.checkpoint, self.checkpoint[name])
            if replacement.shape != views[target].shape:
                raise self._unequal(name, replacement.shape, target, views[target].shape)
            found[target] = replacement
        for module, sides in pairs.items():
            target = f"{module}.weight"
            if target not in views:
                raise self._stranger(module)
            found[target] = self._adapted(module, sides, found[target])
        return found

    def _adapted(self, module: str, sides: dict[str, str], view: View) -> View:
        embedding = "Ae" in sides
        wanted = ("Ae", "Be") if embedding else ("A", "B")
        if set(sides) != set(wanted):
            raise CheckpointError(f"{self.path}: {module} has {examples(sides.values())} but not its other half")
        a, b = (self._matrix(sides[side]) for side in wanted)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{self.path}: {module}: A {list(a.shape)} and B {list(b.shape)} are not matrices of one rank"
            )
        left, right = (a.T, b.T) if embedding or self.config.get("fan_in_fan_out") else (b, a)
        if view.shape != (left.shape[0], right.shape[1]):
            raise self._unequal(module, (left.shape[0], right.shape[1]), module, view.shape)
        scaling = np.float32(self._scaling(module, a.shape[0]))
        return Adapted(view, np.ascontiguousarray(left * scaling), np.ascontiguousarray(right))

    def _scaling(self, module: str, rank: int) -> float:
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", rank))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else max(1, rank))

    def _matrix(self, name: str) -> Floats:
        view = Stored(self.checkpoint, self.checkpoint[name])
        out = np.empty(numel(view.shape), np.float32)
        view.fill(0, out.size, out)
        return out.reshape(view.shape)

    def _stranger(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} belongs to no tensor of the model: is this its base model?")

    def _unequal(self, name: str, shape: tuple[int, ...], target: str, wanted: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {name} of shape {list(shape)} does not fit {target} of {list(wanted)}: "
            "is this its base model?"
        )


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """A module's entry in PEFT's ``rank_pattern`` or ``alpha_pattern``: keys are expressions for the name's end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _replaced(name: str) -> str:
    """The tensor that a whole module saved in the adapter stands for."""
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", name.removeprefix(_PREFIX))
