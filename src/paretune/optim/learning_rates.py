"""Learning rates that differ from tensor to tensor, or from entry to entry: factors of a group's own.

    δ ← f ⊙ δ,   λη ← f ⊙ λη

before anything is sparsified or merged. The Fisher gate makes such factors: what preferences need and the reference's
own behaviour does not learns fast.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import ArgumentError, MismatchError, examples
from ..task_vector import plain_name
from .parts import Part

Factors: TypeAlias = "str | os.PathLike[str] | Mapping[str, Tensor] | LearningRates"

_ARGUMENT = "learning_rates"
_SAMPLES = 256  # elements of each tensor in the fingerprint
_BLOCK = 1 << 20  # elements checked at a time


class LearningRates:
    """Factors of the learning rate by parameter; memory-mapped where they are a file.

    Args:
        source: a safetensors file, as ``paretune average fisher --as-learning-rates`` writes it, or
            ``{name: tensor}``: finite and at least 0, of the parameter's shape or without dimensions (one for all).

    Raises:
        ArgumentError: a factor is negative or not finite; the file holds a gate, whose mean is not 1.
        CheckpointError: the file cannot be read.

    Example:
        >>> rates = LearningRates({"w": torch.tensor([0.5, 1.5]), "b": torch.tensor(2.0)})
        >>> rates.match({"w": (2,), "b": (7,)})
        >>> rates.of_tensor("b"), rates.of_tensor("w")
        (2.0, None)
    """

    def __init__(self, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
        self._checkpoint: Checkpoint | None = None
        self._tensors: dict[str, Tensor] = {}
        if isinstance(source, Mapping):
            self._tensors = {plain_name(name): tensor.detach() for name, tensor in source.items()}
            self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        else:
            self._checkpoint = Checkpoint(source)
            if any(_is_gate(file) for file in {str(info.file) for info in self._checkpoint.values()}):
                mend = "is a gate, whose factors have no mean of 1: make it with --as-learning-rates"
                raise ArgumentError(_ARGUMENT, str(source), mend)
            self._shapes = {name: info.shape for name, info in self._checkpoint.items()}
        self._here: dict[tuple[str, Part, torch.device], Tensor] = {}
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self._shapes):
            flat = self._flat(name)
            _check(name, flat)
            count = min(_SAMPLES, flat.numel())
            places = torch.arange(count, device=flat.device) * flat.numel() // max(1, count)
            digest.update(f"{name}{self._shapes[name]}".encode() + flat[places].float().cpu().numpy().tobytes())
        self.fingerprint: str = digest.hexdigest()

    @classmethod
    def of(cls, factors: Factors | None) -> LearningRates | None:
        """What an optimizer's argument means.

        Raises:
            ArgumentError: it is of another kind.
        """
        if factors is None or isinstance(factors, LearningRates):
            return factors
        if not isinstance(factors, str | os.PathLike | Mapping):
            raise ArgumentError(_ARGUMENT, factors, "pass a safetensors file or {name: tensor}")
        return cls(factors)

    def __str__(self) -> str:
        kinds = {"one for each entry" if shape else "one for all entries" for shape in self._shapes.values()}
        return f"{self.fingerprint} for {len(self._shapes)} tensors, {' or '.join(sorted(kinds))}"

    def match(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse parameters that have no factor, or one of another shape; further factors are not used.

        Args:
            shapes: of the trained parameters, whole, by plain name.

        Raises:
            MismatchError: naming examples.
        """
        mend = "make them for the model that is trained"
        if missing := [name for name in shapes if name not in self._shapes]:
            has = examples(self._shapes)
            raise MismatchError(f"{_ARGUMENT}: no factors for {examples(missing)}, but for {has}: {mend}")
        wrong = [
            f"{name} {list(self._shapes[name])} for {list(shape)}"
            for name, shape in shapes.items()
            if self._shapes[name] not in ((), tuple(shape))
        ]
        if wrong:
            raise MismatchError(f"{_ARGUMENT}: factors of other shapes: {examples(wrong)}: {mend}")

    def of_tensor(self, name: str) -> float | None:
        """The one factor of a parameter, or None where its entries have their own."""
        return float(self._flat(name)) if self._shapes[name] == () else None

    def of_entries(self, name: str, part: Part, like: Tensor) -> Tensor:
        """The factors of this rank's entries, flat, in the dtype and on the device of ``like``."""
        key = (name, part, like.device)
        if key not in self._here:
            flat = self._flat(name)
            self._here[key] = part.cut(lambda start, stop: flat[start:stop]).to(like.device, like.dtype)
        return self._here[key]

    @property
    def resident(self) -> list[dict[str, Tensor]]:
        """What is held in memory beside the file, for `memory_report`."""
        held = [*self._tensors.values(), *(each for each in self._here.values() if each.device.type != "cpu")]
        return [{"learning_rates": tensor} for tensor in held]

    def _flat(self, name: str) -> Tensor:
        if self._checkpoint is not None:
            return self._checkpoint.flat(name)
        return self._tensors[name].reshape(-1)


def _check(name: str, flat: Tensor) -> None:
    if not flat.is_floating_point():
        raise ArgumentError(f"{_ARGUMENT}[{name!r}]", flat.dtype, "factors are floating-point numbers")
    for block in flat.split(_BLOCK):
        low, high = (float(value) for value in block.aminmax())
        if not 0 <= low <= high < float("inf"):  # NaN fails as well
            raise ArgumentError(f"{_ARGUMENT}[{name!r}]", f"[{low:g}, {high:g}]", "must be finite and at least 0")


def _is_gate(file: str) -> bool:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return str((opened.metadata() or {}).get("format", "")).startswith("paretune fisher gate")
