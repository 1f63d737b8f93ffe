"""The models that are merged: local directories, hub ids, adapters."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint import DTYPES, Checkpoint, locate, refuse_gated_adapter
from ..errors import CheckpointError
from .adapters import Adapter, is_adapter
from .views import Stored, View

_SAMPLES = 4  # places per tensor that the fingerprint looks at …
_SAMPLE = 256  # … and how many bytes at each
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
_CONFIGURATION = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


class Model:
    """A model to merge: its tensors as views, its configuration and its other files.

    Args:
        given: a directory, a file or a hub id of a model; an adapter, whose base model is the one that it names; or
            ``MODEL+ADAPTER``.
        adds_tau: whoever merges adds the part of the task vector that an adapter was trained beside.

    Raises:
        CheckpointError: it cannot be read, or not safely; an adapter is a part of its policy only.
    """

    def __init__(self, given: str | os.PathLike[str], adds_tau: bool = False) -> None:
        self.given = os.fspath(given)
        model, adapters = _split(self.given)
        path = locate(model)
        if path.is_dir() and is_adapter(path):
            adapter = Adapter.open(path)
            if adapter.base is None:
                raise CheckpointError(f"{model}: its {path.name} names no base model: write MODEL+{model}")
            adapters.insert(0, path)
            path = locate(adapter.base)
        self.checkpoint = Checkpoint(path)
        self.adapters = [Adapter.open(each) for each in adapters]
        self.views: dict[str, View] = {name: Stored(self.checkpoint, info) for name, info in self.checkpoint.items()}
        for adapter in self.adapters:
            if not adds_tau:
                refuse_gated_adapter(adapter.path)
            self.views = adapter.apply(self.views)

    @property
    def directory(self) -> Path:
        """Where the model's files lie."""
        path = self.checkpoint.path
        return path if path.is_dir() else path.parent

    @property
    def config(self) -> dict[str, Any]:
        """The model's ``config.json``; empty where there is none."""
        return self.checkpoint.config

    @property
    def bytes(self) -> int:
        """The size of all its tensors."""
        return sum(info.stop - info.start for info in self.checkpoint.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names, dtypes, shapes and samples of every tensor: independent of paths and of sharding."""
        digest = hashlib.sha256()
        for checkpoint in [self.checkpoint, *(adapter.checkpoint for adapter in self.adapters)]:
            _sample(checkpoint, digest)
        for adapter in self.adapters:
            digest.update(json.dumps(adapter.config, sort_keys=True).encode())
        return digest.hexdigest()[:32]

    @property
    def stamp(self) -> list[Any]:
        """What changes when a file is written again: size and time of each; guards a merge that is resumed."""
        files = {info.file for info in self.checkpoint.values()}
        files |= {info.file for adapter in self.adapters for info in adapter.checkpoint.values()}
        return sorted([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)

    def tokenizer_files(self) -> dict[str, Path]:
        """Its tokenizer's files by name."""
        return self._files(_TOKENIZER)

    def other_files(self) -> dict[str, Path]:
        """The files that a copy of the model needs besides weights, ``config.json`` and tokenizer."""
        code = sorted(entry.name for entry in self.directory.glob("*.py")) if "auto_map" in self.config else []
        return self._files((*_CONFIGURATION, *code))

    def _files(self, names: tuple[str, ...]) -> dict[str, Path]:
        found = ((name, self.checkpoint.companion(name)) for name in names)
        return {name: file for name, file in found if file is not None}

    def vocabulary(self) -> dict[str, int] | None:
        """Token → number, from ``tokenizer.json``; None where there is none."""
        file = self.checkpoint.companion("tokenizer.json")
        return None if file is None else read_vocabulary(file)


def _sample(checkpoint: Checkpoint, digest: hashlib._Hash) -> None:
    # Read, not mapped: touching a mapped page makes its neighbours resident, and there are many tensors.
    open_files: dict[Path, int] = {}
    try:
        for name in sorted(checkpoint):
            info = checkpoint[name]
            digest.update(f"{name}\0{info.kind}\0{info.shape}\0".encode(errors="surrogatepass"))
            if info.file not in open_files:
                open_files[info.file] = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
            last = max(0, info.stop - info.start - _SAMPLE)
            for place in sorted({info.start + last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                digest.update(os.pread(open_files[info.file], min(info.stop - place, _SAMPLE), place))
    finally:
        for descriptor in open_files.values():
            os.close(descriptor)


def read_vocabulary(file: Path) -> dict[str, int]:
    """Token → number of a ``tokenizer.json``, added tokens included.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        content = json.loads(file.read_bytes())
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram models list (token, score)
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        found = {str(token): int(number) for token, number in vocabulary.items()}
        found.update({str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or []})
    except (OSError, ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a tokenizer that can be read ({type(error).__name__}: {error})") from None
    return found


def itemsize(view: View) -> int:
    """Bytes of one stored element."""
    return DTYPES[view.kind][1]


def _split(given: str) -> tuple[str, list[Path]]:
    """``MODEL+ADAPTER+…`` in its parts; a path that exists is never split."""
    if "+" not in given or os.path.exists(os.path.expanduser(given)):
        return given, []
    model, *adapters = given.split("+")
    found = [locate(each) for each in adapters]
    for path, each in zip(found, adapters, strict=True):
        if not path.is_dir() or not (path / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{each}: not an adapter: after MODEL+ a directory with adapter_config.json is wanted"
            )
    return model, found
