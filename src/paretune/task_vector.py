"""The task vector τ = reference − base, by tensor name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import ArgumentError, MismatchError, examples

Source: TypeAlias = "str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]"

_CHUNK = 1 << 19  # elements handled at a time: fits the caches, bounds the memory
_SAMPLES = 16  # places per tensor that the fingerprint looks at …
_SAMPLE = 64  # … and how many elements at each
_BLOCK = 64  # elements of an int8 τ that share a scale
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_name(name: str) -> str:
    """A parameter's name without the segments that DDP, FSDP, torch.compile and activation checkpointing insert.

    Example:
        >>> plain_name("module._orig_mod.layers.0.module_list.weight")
        'layers.0.module_list.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class TaskVector(Mapping[str, tuple[int, ...]]):
    """τ = θ_reference − θ_base: a mapping from tensor name to shape, with the values read on demand in float32.

    Made by `TaskVector.between`. From two checkpoints on disk nothing is loaded: every read subtracts the two
    memory-mapped slices. Where either side is in memory, τ is computed once and kept, so that a model that is then
    trained in place does not change it.

    Reference: arXiv 2405.17931, section 3 (τ is its "delta parameters" of the SFT model).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, _Part]) -> None:
        self._shapes = dict(shapes)
        self._parts = dict(parts)

    @classmethod
    def between(cls, *, base: Source, reference: Source, base_vocab: Literal["strict", "pad"] = "strict") -> TaskVector:
        """τ = reference − base, matched by tensor name.

        Args:
            base: the pre-trained model: a checkpoint directory or file, a hub id, a module, or ``{name: tensor}``.
            reference: the SFT model, in any of these forms.
            base_vocab: ``"pad"`` gives τ = 0 to the vocabulary rows that SFT appended; ``"strict"`` refuses them.

        Raises:
            MismatchError: names, shapes or vocabularies differ; three examples and the count are given.

        Example:
            >>> import torch
            >>> tau = TaskVector.between(base={"w": torch.ones(2)}, reference={"w": torch.tensor([1.0, 3.0])})
            >>> tau.dense("w")
            tensor([0., 2.])
        """
        if base_vocab not in ("strict", "pad"):
            raise ArgumentError("base_vocab", base_vocab, "choose 'strict' or 'pad'")
        b, r = _open(base, "base"), _open(reference, "reference")
        names = _matched_names(b, r)
        padded = _padded_names(b, r, names, pad=base_vocab == "pad")
        lazy = isinstance(b, _Files) and isinstance(r, _Files)
        parts: dict[str, _Part] = {}
        for name in names:
            part: _Part = _Difference(b, r, name, b.numel(name) if name in padded else r.numel(name))
            if not lazy:
                part = _Stored(part.read(0, r.numel(name)))
            parts[name] = part
        return cls({name: r.shapes[name] for name in names}, parts)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self._shapes[name]

    def numel(self, name: str) -> int:
        """How many elements a tensor has."""
        return _numel(self._shapes[name])

    def dense(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """τ's elements ``start … stop−1`` of one tensor, flattened, in float32, on the CPU."""
        return self._parts[name].read(start, self.numel(name) if stop is None else stop)

    def gather(self, name: str, index: Tensor) -> Tensor:
        """τ at the given flat positions (int64, on the CPU) of one tensor, in float32: reads only these elements."""
        return self._parts[name].gather(index)

    def gather_all(self, names: Sequence[str], indices: Sequence[Tensor]) -> Tensor:
        """`gather` of many tensors, concatenated: one subtraction instead of many small ones."""
        parts = [self._parts[name] for name in names]
        if not parts or not all(isinstance(part, _Difference) and part.whole for part in parts):
            found = [part.gather(index) for part, index in zip(parts, indices, strict=True)]
            return torch.cat(found) if found else torch.empty(0)
        pairs = [part.pair(index) for part, index in zip(cast(list[_Difference], parts), indices, strict=True)]
        reference, base = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
        return _subtract(reference, base)

    def stored(self, dtype: torch.dtype = torch.bfloat16) -> TaskVector:
        """This τ, rounded and held in memory: for hosts that cannot keep both checkpoints in their page cache.

        Reading it is no faster than reading checkpoints that the page cache holds. It is another τ: a run that began
        with it resumes with it only. Each process holds all of it.

        Args:
            dtype: bfloat16 (2 bytes an element, within 2⁻⁹ of each), or int8 (1.06 bytes: one scale for 64 elements,
                within 1/254 of the largest of these).

        Raises:
            ArgumentError: another dtype.

        Example:
            >>> tau = TaskVector.between(base={"w": torch.zeros(2)}, reference={"w": torch.tensor([1.0, 0.3])})
            >>> tau.stored(torch.bfloat16).dense("w")
            tensor([1.0000, 0.3008])
        """
        if dtype not in (torch.bfloat16, torch.int8):
            raise ArgumentError("dtype", dtype, "choose torch.bfloat16 or torch.int8")
        return TaskVector(self._shapes, {name: self._rounded(name, dtype) for name in self._shapes})

    def _rounded(self, name: str, dtype: torch.dtype) -> _Stored:
        n = self.numel(name)
        values = torch.empty(n, dtype=dtype)
        scales = torch.empty((n + _BLOCK - 1) // _BLOCK) if dtype == torch.int8 else None
        for start in range(0, n, _CHUNK):
            part = self.dense(name, start, min(n, start + _CHUNK))
            if scales is not None:
                blocks = torch.nn.functional.pad(part, (0, -part.numel() % _BLOCK)).view(-1, _BLOCK)
                scale = blocks.abs().amax(1) / 127
                scales[start // _BLOCK : start // _BLOCK + scale.numel()] = scale
                part = (blocks / scale.clamp(min=1e-37).unsqueeze(1)).round_().view(-1)[: part.numel()]
            values[start : start + part.numel()] = part
        return _Stored(values, scales)

    @property
    def sources(self) -> tuple[str | None, str | None]:
        """Where base and reference were read from; None for a side that was in memory."""
        part = next(iter(self._parts.values()), None)
        if not isinstance(part, _Difference):
            return None, None
        base, reference = part.base, part.reference
        return cast(_Files, base).checkpoint.source, cast(_Files, reference).checkpoint.source

    @property
    def resident_bytes(self) -> int:
        """Memory it holds: 0 for checkpoints on disk, 4 bytes an element where a side was in memory; see `stored`."""
        return sum(part.resident_bytes for part in self._parts.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names, shapes and τ at up to 1,024 places a tensor: the same whatever form the models came in."""
        digest = hashlib.sha256()
        for name in sorted(self._shapes):
            n = self.numel(name)
            digest.update(f"{name}{self._shapes[name]}".encode())
            last = max(0, n - _SAMPLE)
            for start in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                digest.update(_bytes(self.dense(name, start, min(n, start + _SAMPLE))))
        return digest.hexdigest()[:32]

    def full_hash(self) -> str:
        """A hash of every element of τ; reads both models whole."""
        digest = hashlib.sha256()
        for name in sorted(self._shapes):
            digest.update(f"{name}{self._shapes[name]}".encode())
            for start in range(0, self.numel(name), _CHUNK):
                digest.update(_bytes(self.dense(name, start, min(self.numel(name), start + _CHUNK))))
        return digest.hexdigest()[:32]

    def match(self, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Which tensor of τ belongs to each parameter: ``{parameter name: name in τ}``.

        Args:
            parameters: name and shape of each parameter; wrapper segments in the names are ignored.

        Raises:
            MismatchError: a parameter has no tensor in τ, or one of another shape.
        """
        plain = {name: plain_name(name) for name in parameters}
        missing = [name for name, key in plain.items() if key not in self._shapes]
        if missing:
            mend = (
                "pass the models themselves (base=model, reference=model) if the checkpoint names its tensors otherwise"
            )
            if any(".lora_" in name or "modules_to_save" in name for name in missing):
                mend = "adapters have no task vector of their own: with LoRA merge through pt.LoRAMerging"
            raise MismatchError(f"parameters without a task vector: {examples(missing)}: {mend}")
        unequal = [
            f"{name} {list(shape)} against {list(self._shapes[plain[name]])}"
            for name, shape in parameters.items()
            if tuple(shape) != self._shapes[plain[name]]
        ]
        if unequal:
            raise MismatchError(
                f"parameters and task vector differ in shape: {examples(unequal)}: build τ from this model's own base "
                "(FSDP1 flattens parameters: use FSDP2, accelerate's fsdp_version: 2)"
            )
        return plain


class _Part:
    """τ of one tensor."""

    resident_bytes = 0

    def read(self, start: int, stop: int) -> Tensor:
        raise TypeError("abstract")

    def gather(self, index: Tensor) -> Tensor:
        raise TypeError("abstract")


class _Stored(_Part):
    """τ of one tensor, kept in memory; int8 with scales."""

    def __init__(self, values: Tensor, scales: Tensor | None = None) -> None:
        self.values, self.scales = values, scales
        self.resident_bytes = values.nbytes + (0 if scales is None else scales.nbytes)

    def read(self, start: int, stop: int) -> Tensor:
        if self.scales is not None:
            return self.gather(torch.arange(start, stop))
        return self.values[start:stop].to(torch.float32, copy=True)

    def gather(self, index: Tensor) -> Tensor:
        found = self.values[index].float()
        return found if self.scales is None else found.mul_(self.scales[index // _BLOCK])


class _Difference(_Part):
    """τ of one tensor, subtracted when asked; elements from ``known`` on (rows that the base lacks) are 0."""

    def __init__(self, base: _Side, reference: _Side, name: str, known: int) -> None:
        self.base, self.reference, self.name, self.known = base, reference, name, known

    def read(self, start: int, stop: int) -> Tensor:
        out = torch.zeros(stop - start)
        end = min(stop, self.known)
        if start < end:
            base, reference = self.base.flat(self.name), self.reference.flat(self.name)
            for i in range(start, end, _CHUNK):
                j = min(end, i + _CHUNK)
                out[i - start : j - start] = _subtract(reference[i:j], base[i:j])
        return out

    @property
    def whole(self) -> bool:
        """Whether the base has every element."""
        return self.known == self.reference.numel(self.name)

    def pair(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The elements of reference and base at these positions."""
        return self.reference.flat(self.name).take(index), self.base.flat(self.name).take(index)

    def gather(self, index: Tensor) -> Tensor:
        if self.whole:
            return _subtract(*self.pair(index))
        out = torch.zeros(index.numel())
        inside = index < self.known
        out[inside] = _subtract(*self.pair(index[inside]))
        return out


def _subtract(reference: Tensor, base: Tensor) -> Tensor:
    # float32 holds every bf16, f16 and f32 value; float64 models are subtracted before they are rounded.
    wide = torch.float64 if torch.float64 in (reference.dtype, base.dtype) else torch.float32
    return (reference.to(wide) - base.to(wide)).float()


class _Side:
    """One of the two models: shapes by name, and flat values."""

    label: str
    shapes: dict[str, tuple[int, ...]]

    def numel(self, name: str) -> int:
        return _numel(self.shapes[name])

    def flat(self, name: str) -> Tensor:
        raise TypeError("abstract")


class _Files(_Side):
    def __init__(self, checkpoint: Checkpoint, label: str) -> None:
        self.label = label
        self.checkpoint = checkpoint
        self.shapes = {name: info.shape for name, info in checkpoint.items() if info.dtype.is_floating_point}

    def flat(self, name: str) -> Tensor:
        return self.checkpoint.flat(name)


class _Memory(_Side):
    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        for kind, unusable in (("sharded", lambda t: hasattr(t, "device_mesh")), ("meta", lambda t: t.is_meta)):
            if found := [name for name, tensor in tensors.items() if unusable(tensor)]:
                mend = "pass the checkpoint's path, of which each rank reads its own part"
                raise ArgumentError(label, f"{kind} tensors ({examples(found)})", mend)
        self.tensors = {
            plain_name(name): tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()
        }
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def flat(self, name: str) -> Tensor:
        return self.tensors[name].reshape(-1).cpu()


def _open(source: Source, label: str) -> _Side:
    if isinstance(source, nn.Module):
        return _Memory(dict(source.named_parameters()), label)
    if isinstance(source, Mapping):
        wrong = [str(name) for name, value in source.items() if not isinstance(value, Tensor)]
        if wrong or not source:
            raise ArgumentError(label, dict(list(source.items())[:1]), "pass {name: tensor} with at least one tensor")
        return _Memory(source, label)
    if isinstance(source, str | os.PathLike):
        return _Files(Checkpoint(source), label)
    raise ArgumentError(label, source, "pass a checkpoint path, a hub id, a module or {name: tensor}")


def _matched_names(b: _Side, r: _Side) -> list[str]:
    """The names of both sides. One side may also hold a copy of a tied tensor (a head saved with its embedding)."""
    common = [name for name in r.shapes if name in b.shapes]
    for side, other in ((b, r), (r, b)):
        extra = [name for name in side.shapes if name not in other.shapes and not _is_tied(side, name, common)]
        if extra:
            raise MismatchError(
                f"{side.label} has tensors that {other.label} lacks: {examples(extra)}: "
                "are they of one architecture, and is this the base that the reference was tuned from?"
            )
    return common


def _is_tied(side: _Side, name: str, common: list[str]) -> bool:
    twins = (other for other in common if side.shapes[other] == side.shapes[name])
    return any(_equal(side.flat(name), side.flat(twin)) for twin in twins)


def _equal(a: Tensor, b: Tensor) -> bool:
    return all(torch.equal(a[i : i + _CHUNK], b[i : i + _CHUNK]) for i in range(0, a.numel(), _CHUNK))


def _padded_names(b: _Side, r: _Side, names: list[str], *, pad: bool) -> set[str]:
    """The vocabulary tensors to which SFT appended rows; everything else must agree in shape."""
    unequal = [name for name in names if b.shapes[name] != r.shapes[name]]
    if not unequal:
        return set()
    rows = {(b.shapes[name][:1], r.shapes[name][:1]) for name in unequal}
    grown = len(rows) == 1 and all(
        b.shapes[name][1:] == r.shapes[name][1:] and b.shapes[name][:1] < r.shapes[name][:1] for name in unequal
    )
    if grown and pad:
        return set(unequal)
    shown = examples(f"{name} {list(b.shapes[name])} against {list(r.shapes[name])}" for name in unequal)
    mend = (
        "base_vocab='pad' gives the rows that the reference added τ = 0" if grown else "are they of one architecture?"
    )
    raise MismatchError(f"base and reference differ in shape: {shown}: {mend}")


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _bytes(tensor: Tensor) -> bytes:
    return (tensor + 0.0).numpy().tobytes()  # + 0.0: -0 and 0 are one value
