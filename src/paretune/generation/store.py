"""A file of JSON lines that outlives a kill: appended to in whole batches, each flushed to the disk."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .. import atomic
from ..errors import ArgumentError, DataError

_START = b'{"key": "'  # how every row begins


class Store:
    """Rows by their ``key``, in memory and in a file.

    A last line that was torn by a kill or a power cut is cut off; anything else that is no row of ours is an error,
    so that no other file is ever damaged. One process at a time.

    Args:
        path: the file, made where it does not exist; None keeps the rows in memory only.
        argument: what the user calls this file, for messages.

    Raises:
        ArgumentError: another process writes to it, or its folder cannot be made.
        DataError: a line is broken, or no row of this kind.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> with Store(path) as store:
        ...     store.append([{"key": "a", "text": "1"}])
        >>> with Store(path) as store:
        ...     store.rows["a"]["text"]
        '1'
    """

    def __init__(self, path: str | os.PathLike[str] | None, argument: str = "out") -> None:
        self.path = None if path is None else Path(path)
        self.argument = argument
        self.rows: dict[str, dict[str, Any]] = {}
        self._file: Any = None

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise ArgumentError(self.argument, str(self.path), f"cannot be written: {error.strerror}") from error
        try:
            self._lock()
            self._load()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows; when this returns they are on the disk."""
        rows = list(rows)
        if self._file is not None:
            self._file.write(b"".join(_line(row) for row in rows))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows.update((row["key"], row) for row in rows)

    def rewrite(self, keys: Iterable[str]) -> None:
        """Put the rows into this order, whole or not at all, as the last thing that is done with the file."""
        keys = list(keys)
        if list(self.rows) == keys:
            return
        self.rows = {key: self.rows[key] for key in keys}
        if self.path is not None:
            atomic.write_text(self.path, b"".join(map(_line, self.rows.values())).decode())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArgumentError(
                self.argument, str(self.path), "another process writes to it: wait for it or name another file"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _load(self) -> None:
        self._file.seek(0)
        whole = 0  # bytes of complete lines
        for number, line in enumerate(self._file, 1):
            row = _parsed(line)
            if not line.endswith(b"\n") and (row or line[: len(_START)] == _START[: len(line)]):
                break
            if row is None:
                raise DataError(
                    f"{self.argument}={str(self.path)!r}: line {number} is no row of ours (a JSON object with a key): "
                    "name another file"
                )
            self.rows[row["key"]] = row
            whole += len(line)
        if whole < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(whole)


def _line(row: dict[str, Any]) -> bytes:
    # Lone surrogates, which a tokenizer can make, become JSON's own escapes.
    text = json.dumps({"key": row["key"], **row}, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None
