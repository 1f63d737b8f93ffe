"""Reading safetensors checkpoints without loading them: headers first, then memory-mapped slices.

A checkpoint is one ``.safetensors`` file or a directory of them (with an index when sharded). Opening one reads
headers only and refuses everything that is broken or unsafe: pickled weights, truncated files, offsets that overlap
or leave the file, indexes that point outside the directory.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, examples

if TYPE_CHECKING:  # torch is imported where values are read as tensors: headers alone do not pay for it
    import torch
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
GATE_FILE = "tau_gate.json"  # beside an adapter that was trained beside a task vector
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself

# The format's names of the dtypes that are read: torch's name and bytes an element.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


def refuse_gated_adapter(directory: Path) -> None:
    """An adapter that was trained beside a task vector is, alone, another model than the one that was trained.

    Raises:
        CheckpointError: the directory holds such an adapter, or a gate that cannot be read.
    """
    file = directory / GATE_FILE
    if not file.is_file():
        return
    try:
        gate = float(json.loads(file.read_bytes())["gate"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not the gate of an adapter ({error!r})") from None
    if gate:
        raise CheckpointError(
            f"{directory}: its policy has {gate:g} of the task vector, which the adapter alone leaves out: write the "
            "whole model with paretune export-adapter"
        )


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: name, dtype (as the format calls it), shape, file, its bytes ``[start, stop)`` there."""

    name: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, DTYPES[self.kind][0])

    @property
    def numel(self) -> int:
        return (self.stop - self.start) // DTYPES[self.kind][1]


class Checkpoint(Mapping[str, TensorInfo]):
    """A read-only checkpoint: a mapping from tensor name to `TensorInfo`, and memory-mapped access to the values.

    Args:
        source: a directory with safetensors files, one ``.safetensors`` file, or a hub id.

    Raises:
        CheckpointError: nothing is there, the weights are pickled, or a file is broken or unsafe.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> folder = tempfile.mkdtemp()
        >>> safetensors.torch.save_file({"w": torch.arange(6.0).view(2, 3)}, f"{folder}/model.safetensors")
        >>> checkpoint = Checkpoint(folder)
        >>> checkpoint["w"].shape, checkpoint.flat("w")[2:4]
        ((2, 3), tensor([2., 3.]))
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source = str(source)
        self.path = locate(source)
        files = [self.path] if self.path.is_file() else _files_of(self.path)
        self._tensors: dict[str, TensorInfo] = {}
        for file in files:
            for info in read_header(file).values():
                if info.name in self._tensors:
                    other = self._tensors[info.name].file.name
                    raise CheckpointError(f"{self.path}: tensor {info.name} is in {other} and in {file.name}: keep one")
                self._tensors[info.name] = info
        if self.path.is_dir():
            _check_index(self.path, self._tensors)
        if not self._tensors:
            raise CheckpointError(f"{self.path}: holds no tensors")
        self._maps: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def flat(self, name: str) -> Tensor:
        """The values of a tensor as one dimension, in its own dtype: memory-mapped, free until read."""
        import torch

        info = self._tensors[name]
        if info.numel == 0:
            return torch.empty(0, dtype=info.dtype)
        return torch.frombuffer(self.mapped(info.file), dtype=info.dtype, count=info.numel, offset=info.start)

    def mapped(self, file: Path) -> mmap.mmap:
        """One of this checkpoint's files, memory-mapped."""
        if file not in self._maps:
            self._maps.setdefault(file, _map(file))  # threads may race here: all use the one that came first
        return self._maps[file]

    def companion(self, name: str) -> Path | None:
        """Another file of the checkpoint's directory (configuration, tokenizer), or None; links out are refused."""
        directory = self.path if self.path.is_dir() else self.path.parent
        if not os.path.lexists(directory / name):
            return None
        return _contained(directory, name)

    def read(self, name: str) -> Tensor:
        """A copy of one tensor in its own shape and dtype."""
        return self.flat(name).clone().view(self._tensors[name].shape)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the directory; empty where there is none."""
        file = self.companion("config.json")
        return {} if file is None else _read_json(file)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # maps cannot be pickled; worker processes open their own


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, every offset checked against the file's size.

    Raises:
        CheckpointError: the header is truncated, too large, not JSON, or describes bytes that are not there.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{file}: not a complete safetensors file ({size} bytes): download or save it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: broken safetensors header ({error}): download or save it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: broken safetensors header (not an object): download or save it again")
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise CheckpointError(f"{file}: broken safetensors header (__metadata__): download or save it again")
    data = 8 + length
    tensors = {name: _parse_entry(file, name, entry, data, size) for name, entry in header.items()}
    end = data
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start < end:
            raise CheckpointError(f"{file}: bytes of tensor {info.name} overlap another tensor's: save it again")
        end = info.stop
    if end != size:
        raise CheckpointError(f"{file}: {size - end} bytes belong to no tensor: download or save it again")
    return tensors


def _parse_entry(file: Path, name: str, entry: object, data: int, size: int) -> TensorInfo:
    def broken(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name[:80]}: {what}: download or save it again")

    if not isinstance(entry, dict):
        raise broken("its header is not an object")
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str):
        raise broken("it has no dtype")
    if kind not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name[:80]} has dtype {kind[:20]}: convert the model to BF16, F16 or F32 first"
        )
    if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
        raise broken("its shape is not a list of sizes")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)):
        raise broken("its data_offsets are not two sizes")
    start, stop = offsets[0] + data, offsets[1] + data
    numel = 1
    for n in shape:
        numel *= n
    if not start <= stop <= size:
        raise broken(f"its bytes {offsets} lie outside the file of {size} bytes")
    if numel * DTYPES[kind][1] != stop - start:
        raise broken(f"{stop - start} bytes do not hold shape {shape} of {kind}")
    return TensorInfo(name, kind, tuple(shape), file, start, stop)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def locate(source: str | os.PathLike[str]) -> Path:
    """The local path of a directory, a file or a hub id (which is downloaded).

    Raises:
        CheckpointError: neither is there.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    text = str(source)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or not text:
        raise CheckpointError(f"{text}: no such file or directory")
    return _download(text)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{hub_id}: neither a local directory nor a hub model that can be read ({reason})"
        ) from None


def _files_of(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
    else:
        names = sorted(entry.name for entry in directory.glob("*.safetensors"))
        if SINGLE_NAME in names:
            names = [SINGLE_NAME]
        if names and all(name.startswith("adapter_") for name in names):
            raise CheckpointError(
                f"{directory}: a PEFT adapter, not a model: merge it into its base model and save that"
            )
        if len(names) > 1:
            raise CheckpointError(f"{directory}: {len(names)} safetensors files but no {INDEX_NAME}: restore the index")
    if not names:
        raise CheckpointError(_nothing_found(directory))
    return [_inside(directory, name) for name in names]


def _nothing_found(directory: Path) -> str:
    pickled = sorted(entry.name for pattern in ("*.bin", "*.pt", "*.pth") for entry in directory.glob(pattern))
    if not pickled:
        return f"{directory}: holds no .safetensors file"
    return (
        f'{directory}: {pickled[0]} is pickled and is not read: convert it with python -c "from transformers import '
        f"AutoModelForCausalLM as M; M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\""
    )


def _inside(directory: Path, name: str) -> Path:
    fits = len(name.encode(errors="replace")) < 256 and name.isprintable()
    if name != os.path.basename(name) or not name.endswith(".safetensors") or not fits:
        raise CheckpointError(
            f"{directory}: the index names {name[:80]!r}, which is not a safetensors file of this directory"
        )
    return _contained(directory, name)


def _contained(directory: Path, name: str) -> Path:
    # The hub's cache links snapshots/<commit>/FILE to blobs/<hash> of the same repository; no other link may leave.
    root = directory.parent.parent if directory.parent.name == "snapshots" else directory
    file = (directory / name).resolve()
    if not file.is_relative_to(root):
        raise CheckpointError(f"{directory}: {name} is a link out of the directory: copy the file there")
    if not file.is_file():
        raise CheckpointError(f"{directory}: {name} is missing: download or save the checkpoint again")
    return file


def _weight_map(index: Path) -> dict[str, str]:
    content = _read_json(index).get("weight_map")
    if not isinstance(content, dict) or not all(isinstance(file, str) for file in content.values()):
        raise CheckpointError(f"{index}: has no weight_map of names to files: download or save it again")
    return content


def _check_index(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    index = directory / INDEX_NAME
    if not index.is_file():
        return
    weight_map = _weight_map(index)
    wrong = [
        name
        for name in weight_map.keys() | tensors.keys()
        if name not in tensors
        or name not in weight_map
        or (directory / weight_map[name]).resolve() != tensors[name].file
    ]
    if wrong:
        raise CheckpointError(f"{index}: contradicts its shards at {examples(wrong)}: download or save it again")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file}: not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def _map(file: Path) -> mmap.mmap:
    # Private and writable because torch warns about read-only buffers; NORESERVE so that mapping a checkpoint larger
    # than memory is not refused. Nothing is ever written.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
