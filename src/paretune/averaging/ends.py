"""The two checkpoints that are averaged, memory-mapped: a model is dialled between them and never holds both."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import ArgumentError, CheckpointError, MismatchError, examples
from ..layers import part_of

CHUNK = 1 << 18  # elements at a time: fits the caches, bounds the memory
Path = str | os.PathLike[str]


class Ends:
    """θ_pre and θ_post, tensor by tensor: blends of them, and inner products with their difference.

    Args:
        pre: the checkpoint before alignment.
        post: the checkpoint after it.

    Raises:
        MismatchError: they are of different architectures, shapes or vocabularies.
        CheckpointError: one cannot be read, or not safely.

    Example:
        >>> import tempfile, safetensors.torch
        >>> folder = tempfile.mkdtemp()
        >>> for name, value in (("pre", 1.0), ("post", 3.0)):
        ...     safetensors.torch.save_file({"w": torch.full((2,), value)}, f"{folder}/{name}.safetensors")
        >>> ends = Ends(f"{folder}/pre.safetensors", f"{folder}/post.safetensors")
        >>> out = torch.empty(2)
        >>> ends.blend("w", 0.25, out)
        >>> out, ends.inner("w", torch.ones(2)).item()
        (tensor([2.5000, 2.5000]), -4.0)
    """

    def __init__(self, pre: Path, post: Path) -> None:
        for argument, value in (("pre", pre), ("post", post)):
            if not isinstance(value, str | os.PathLike):
                raise ArgumentError(argument, value, "give the path or hub id of a checkpoint")
        self.pre, self.post = Checkpoint(pre), Checkpoint(post)
        _check_configurations(self.pre, self.post)
        self.shapes = _common(self.pre, self.post)
        _check_tokenizers(self.pre, self.post)
        self._buffers: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Heads that both checkpoints store, and that are copies of an embedding in both: ``{head: embedding}``."""
        embeddings = [name for name in self.shapes if part_of(name) == "embeddings"]
        found = {}
        for name in self.shapes:
            if part_of(name) != "head":
                continue
            for twin in embeddings:
                if self.shapes[twin] == self.shapes[name] and all(
                    _equal(end, name, twin) for end in (self.pre, self.post)
                ):
                    found[name] = twin
                    break
        return found

    def blend(self, name: str, alpha: float, out: Tensor) -> None:
        """Write α·θ_pre + (1−α)·θ_post of one tensor; 0 and 1 give the end points to the bit.

        Args:
            name: of the tensor.
            alpha: α.
            out: of the tensor's shape, of any strides, dtype and device.
        """
        pre, post = self._flat(name)
        low, high = self._scratch(out.device)
        with torch.no_grad():
            for rows, span in self._pieces(name):
                target = out[rows] if out.dim() else out
                if alpha in (0, 1):
                    target.copy_((pre if alpha == 1 else post)[span].view(target.shape))
                    continue
                a, b = low[: span.stop - span.start], high[: span.stop - span.start]
                a, b = _widened(pre[span], a), _widened(post[span], b)
                if target.is_contiguous() and target.dtype == a.dtype and target.device == a.device:
                    torch.lerp(b, a, alpha, out=target.view(-1))
                    continue
                # float32: bfloat16 would round twice
                target.copy_(torch.lerp(b, a, alpha, out=low[: span.stop - span.start]).view(target.shape))
        self._release(name)

    def inner(self, name: str, gradient: Tensor) -> Tensor:
        """⟨G, θ_pre − θ_post⟩ of one tensor, summed in float64 over products in float32.

        Args:
            name: of the tensor.
            gradient: G, of the tensor's shape, of any strides, dtype and device.

        Returns:
            A float64 scalar on the gradient's device.
        """
        pre, post = self._flat(name)
        low, high = self._scratch(gradient.device)
        total = torch.zeros((), dtype=torch.float64, device=gradient.device)
        with torch.no_grad():
            for rows, span in self._pieces(name):
                a, b = low[: span.stop - span.start], high[: span.stop - span.start]
                difference = torch.sub(_widened(pre[span], a), _widened(post[span], b), out=a)
                part = gradient[rows] if gradient.dim() else gradient
                total += torch.dot(difference, part.reshape(-1).float())
        self._release(name)
        return total

    def _flat(self, name: str) -> tuple[Tensor, Tensor]:
        return self.pre.flat(name), self.post.flat(name)

    def _scratch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._buffers:
            size = max([CHUNK, *(_width(shape) for shape in self.shapes.values())])
            self._buffers[device] = torch.empty(size, device=device), torch.empty(size, device=device)
        return self._buffers[device]

    def _pieces(self, name: str) -> Iterator[tuple[slice, slice]]:
        """Runs of whole rows of at most `CHUNK` elements (or one row): (rows, elements)."""
        shape = self.shapes[name]
        rows, width = (shape[0], _width(shape)) if shape else (1, 1)
        step = max(1, CHUNK // max(1, width))
        for row in range(0, rows if width else 0, step):
            stop = min(rows, row + step)
            yield slice(row, stop), slice(row * width, stop * width)

    def _release(self, name: str) -> None:
        """Let the pages of a tensor go: mapped files count as resident, and would double the peak."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for end in (self.pre, self.post):
            info = end[name]
            first = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            if info.stop > first:
                end.mapped(info.file).madvise(mmap.MADV_DONTNEED, first, info.stop - first)


def _widened(values: Tensor, buffer: Tensor) -> Tensor:
    """The values in float32 where the buffer is: themselves, if they are."""
    if values.dtype == buffer.dtype and values.device == buffer.device:
        return values
    return buffer.copy_(values)


def _width(shape: tuple[int, ...]) -> int:
    width = 1
    for size in shape[1:]:
        width *= size
    return width


def _equal(end: Checkpoint, a: str, b: str) -> bool:
    x, y = end.flat(a), end.flat(b)
    if x.dtype != y.dtype:
        return False
    return all(torch.equal(x[i : i + CHUNK], y[i : i + CHUNK]) for i in range(0, x.numel(), CHUNK))


def _check_configurations(pre: Checkpoint, post: Checkpoint) -> None:
    for key, what in (("model_type", "architecture"), ("vocab_size", "vocabulary")):
        a, b = pre.config.get(key), post.config.get(key)
        if a is not None and b is not None and a != b:
            raise MismatchError(
                f"pre={pre.source} and post={post.source} differ in {what}: {key} {a} against {b}: "
                "give the model before alignment and the one aligned from it"
            )


def _common(pre: Checkpoint, post: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes that both have. One may also hold a copy of its embedding as a head."""
    floats = [{n: info.shape for n, info in end.items() if info.dtype.is_floating_point} for end in (pre, post)]
    common = {name: shape for name, shape in floats[0].items() if name in floats[1]}
    for label, end, own, other in (("pre", pre, floats[0], floats[1]), ("post", post, floats[1], floats[0])):
        extra = [name for name in own if name not in other and not _copy_of_any(end, name, common)]
        if extra or not common:
            raise MismatchError(
                f"{label}={end.source} has tensors that the other lacks: {examples(extra)}: "
                "give the model before alignment and the one aligned from it"
            )
    unequal = {name for name in common if floats[0][name] != floats[1][name]}
    if unequal:
        shown = examples(f"{name} {list(floats[0][name])} against {list(floats[1][name])}" for name in unequal)
        rows_only = all(
            floats[0][name][1:] == floats[1][name][1:] and part_of(name) in ("head", "embeddings") for name in unequal
        )
        what = "vocabulary" if rows_only else "shape"
        raise MismatchError(
            f"pre={pre.source} and post={post.source} differ in {what}: {shown}: "
            "give the model before alignment and the one aligned from it"
        )
    return common


def _copy_of_any(end: Checkpoint, name: str, common: Mapping[str, tuple[int, ...]]) -> bool:
    return any(end[twin].shape == end[name].shape and _equal(end, name, twin) for twin in common)


def _check_tokenizers(pre: Checkpoint, post: Checkpoint) -> None:
    files = [end.companion("tokenizer.json") for end in (pre, post)]
    if files[0] is None or files[1] is None or files[0].read_bytes() == files[1].read_bytes():
        return
    import json

    vocabularies = []
    for file in files:
        try:
            vocabularies.append(json.loads(file.read_bytes())["model"]["vocab"])  # type: ignore[union-attr]
        except (ValueError, KeyError, TypeError, OSError):
            raise CheckpointError(f"{file}: not a tokenizer that can be read: download or save it again") from None
    if vocabularies[0] != vocabularies[1]:
        raise MismatchError(
            f"pre={pre.source} and post={post.source} differ in vocabulary: their tokenizers number words otherwise: "
            "give the model before alignment and the one aligned from it"
        )
