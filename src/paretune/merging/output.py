"""Writing a merge so that it is absent, resumable or complete at any moment, never half a model that loads.

Everything is written beside the output, in ``OUT.merging``: weights under temporary names at offsets known from the
start, and a journal of the tensors that have reached the disk. When all have, names become final, the index and the
configuration are written, and the directory is renamed to ``OUT`` at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..atomic import sync
from ..errors import ArgumentError, CheckpointError
from .plan import Part, Plan
from .record import write_companions

SUFFIX = ".merging"
PARTIAL = ".partial"
_JOURNAL = "journal.jsonl"
_COMMIT_BYTES = 1 << 29  # what may have to be computed again after a power loss …
_SWEEP_BYTES = 1 << 28  # … of a sweep, whose pages are then used again …
_COMMIT_SECONDS = 20.0  # … whichever comes first


class Output:
    """The files of one merge.

    Args:
        plan: what is written.
        out: the directory that the result will have.

    Raises:
        ArgumentError: there is something at ``out`` already, or too little space for it.
        CheckpointError: another merge is unfinished there, or running.
    """

    def __init__(self, plan: Plan, out: str | os.PathLike[str]) -> None:
        self.plan = plan
        self.out = checked_directory(out)
        self.stage = self.out.with_name(self.out.name + SUFFIX)
        self.done: set[int] = set()
        self._lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._fresh: list[int] = []
        self._fresh_bytes = 0
        self._committed = time.monotonic()
        self._files: list[dict[str, int]] = []
        self._shard_of = {name: shard for shard in plan.shards for name in shard.offsets}
        self._journal: BinaryIO | None = None

    def open(self) -> None:
        """Start writing, or go on where the same merge stopped."""
        self.stage.parent.mkdir(parents=True, exist_ok=True)
        if self._last_journal.is_file() and self.stage.is_dir() and not (self.stage / _JOURNAL).exists():
            self._last_journal.rename(self.stage / _JOURNAL)  # stopped just before the end
        if self.stage.is_dir() and not (self.stage / _JOURNAL).is_file() and any(self.stage.iterdir()):
            raise self._foreign("holds files of something else")
        self.stage.mkdir(exist_ok=True)
        self._journal = (self.stage / _JOURNAL).open("a+b")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{self.stage}: another process is writing this merge: wait for it") from None
        self.done = self._read_journal()
        self.check_space()
        complete = True
        for directory in self.directories:
            directory.mkdir(exist_ok=True)
            for shard in self.plan.shards:
                name = directory / shard.name
                if not name.exists():  # a final name: all tensors were there, and the end was interrupted
                    name = directory / (shard.name + PARTIAL)
                complete &= name.is_file() and name.stat().st_size == shard.size
        if not complete:
            self.done = set()
        if not self.done:
            self._write_journal({"paretune": "merge", "digest": self.plan.digest}, truncate=True)
        for directory in self.directories:
            self._files.append({shard.name: self._open_shard(directory, shard.name) for shard in self.plan.shards})
        for files in self._files:
            for shard in self.plan.shards:
                os.ftruncate(files[shard.name], shard.size)
                _write(files[shard.name], shard.header, 0)

    def _open_shard(self, directory: Path, name: str) -> int:
        final, partial = directory / name, directory / (name + PARTIAL)
        if final.exists():
            final.rename(partial)
        return os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    @property
    def directories(self) -> list[Path]:
        """Where each result is written, until the end."""
        return [self.stage / label for label in self.plan.labels] or [self.stage]

    def check_space(self) -> None:
        """Refuse a disk that the result does not fit on."""
        existing = next(parent for parent in (self.stage, *self.stage.parents) if parent.exists())
        there = sum(file.stat().st_blocks * 512 for file in self.stage.rglob("*") if file.is_file())
        free = shutil.disk_usage(existing).free + there
        wanted = self.plan.bytes_written + (1 << 24)
        if free < wanted:
            raise ArgumentError(
                "out",
                str(self.out),
                f"needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: free some, or go elsewhere",
            )

    def write(self, result: int, part: Part, start: int, values: np.ndarray) -> None:
        """Put the elements ``start …`` of a tensor in their place.

        Args:
            result: which result of a sweep.
            part: the tensor.
            start: where the elements begin, counted in elements.
            values: what to write, in the stored dtype.
        """
        shard = self._shard_of[part.name]
        offset = shard.offsets[part.name] + start * values.itemsize
        _write(self._files[result][shard.name], values, offset)

    def finished(self, number: int, size: int) -> None:
        """Note that a tensor is written whole; now and then make what is noted durable."""
        with self._lock:
            self._fresh.append(number)
            self._fresh_bytes += size * max(1, len(self._files))
            limit = _COMMIT_BYTES if len(self._files) == 1 else _SWEEP_BYTES
            due = self._fresh_bytes >= limit or time.monotonic() - self._committed >= _COMMIT_SECONDS
        if due:
            self.commit()

    def commit(self) -> None:
        """Make all finished tensors durable, then say so in the journal."""
        with self._commit_lock:
            with self._lock:
                fresh, self._fresh, self._fresh_bytes = self._fresh, [], 0
                self._committed = time.monotonic()
            if not fresh:
                return
            for files in self._files:
                for descriptor in files.values():
                    os.fdatasync(descriptor)
                    if len(self._files) > 1 and hasattr(os, "posix_fadvise"):
                        # A sweep would push its own inputs out of the page cache; and memory that is used again costs
                        # a fraction of memory that was never used.
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._write_journal(fresh)
            self.done.update(fresh)

    def publish(self) -> None:
        """Give everything its final name; afterwards the result is complete."""
        self.commit()
        for files in self._files:
            for descriptor in files.values():
                os.fsync(descriptor)
        self._close_files()
        for number, directory in enumerate(self.directories):
            for shard in self.plan.shards:
                (directory / (shard.name + PARTIAL)).rename(directory / shard.name)
            write_companions(self.plan, number, directory)
            sync(directory)
        # The result holds no journal; until it has its name, the journal waits beside it.
        (self.stage / _JOURNAL).rename(self._last_journal)
        sync(self.stage)
        os.rename(self.stage, self.out)
        sync(self.out.parent)
        self.close()
        self._last_journal.unlink(missing_ok=True)

    @property
    def _last_journal(self) -> Path:
        return self.stage.with_name(self.stage.name + ".journal")

    def close(self) -> None:
        """Close all files; what is unfinished stays resumable."""
        self._close_files()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _close_files(self) -> None:
        for files in self._files:
            for descriptor in files.values():
                os.close(descriptor)
        self._files = []

    def _read_journal(self) -> set[int]:
        lines = (self.stage / _JOURNAL).read_bytes().split(b"\n")[:-1]  # a line without an end was cut off
        if not lines:
            return set()
        try:
            head = json.loads(lines[0])
            digest = head["digest"]
        except (ValueError, KeyError, TypeError):
            raise self._foreign("its journal cannot be read") from None
        if digest != self.plan.digest:
            raise self._foreign("belongs to another merge, or an input has changed since")
        found: set[int] = set()
        for line in lines[1:]:
            try:
                found.update(int(number) for number in json.loads(line))
            except (ValueError, TypeError):
                break  # what follows a damaged line is written again
        return found & set(range(len(self.plan.parts)))

    def _write_journal(self, entry: object, *, truncate: bool = False) -> None:
        if self._journal is None:
            raise ValueError("the journal is closed")
        if truncate:
            self._journal.truncate(0)
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _foreign(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.stage}: {what}: finish that merge with its own command, or remove the directory")


def checked_directory(out: str | os.PathLike[str]) -> Path:
    """An output directory that does not exist yet, or is empty.

    Raises:
        ArgumentError: it is not.
    """
    path = Path(out).expanduser()
    if not path.name:
        raise ArgumentError("out", str(out), "name a new directory")
    path = path.resolve()
    if path.exists():
        if not path.is_dir():
            raise ArgumentError("out", str(out), "is a file: name a new directory")
        if any(path.iterdir()):
            raise ArgumentError("out", str(out), "is not empty: name a new directory, or remove this one")
        if os.path.ismount(path):
            raise ArgumentError("out", str(out), "is a mount point: name a new directory inside it")
    return path


def _write(descriptor: int, values: Any, offset: int) -> None:
    view = memoryview(values).cast("B") if len(values) else memoryview(b"")
    try:
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise CheckpointError(f"cannot write: {error.strerror}: the same command goes on once that is mended") from None
