"""Rows of benchmarks: files beside a suite, a local mirror of the hub, or the hub itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..generation.prompts import read_rows

_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def mirrored(data: Path | None, hub: str, config: str) -> dict[str, Path]:
    """The files of a data set below a local mirror, by split: ``data/hub/config/split.jsonl``, empty where it has none.

    Args:
        data: the mirror's folder.
        hub: the data set's name on the hub, such as ``openai/gsm8k``.
        config: its configuration, such as ``main``; ``default`` where it has none.
    """
    if data is None:
        return {}
    folder = data / hub / (config or "default")
    return {path.name.split(".")[0]: path for path in sorted(folder.glob("*")) if path.name.endswith(_ENDINGS)}


def hub_rows(hub: str, config: str, split: str, data: Path | None) -> list[dict[str, Any]]:
    """One split of a data set, from the mirror where it is there, else from the hub.

    Raises:
        DataError: neither has it.
    """
    files = mirrored(data, hub, config)
    if files:
        if split not in files:
            raise DataError(f"{data}/{hub}: has no split {split!r}, but {', '.join(files)}: add {split}.jsonl")
        return read_rows(files[split], "data")
    import datasets

    try:
        return list(datasets.load_dataset(hub, config or None, split=split))
    except DataError:  # said by `mirror` already
        raise
    except Exception as error:  # the hub's client raises its own kinds, offline another
        raise DataError(_unreachable(hub, config, data, error)) from error


@contextlib.contextmanager
def mirror(data: Path | None) -> Iterator[None]:
    """Inside it `datasets.load_dataset`, which lm-evaluation-harness calls, reads the local mirror first.

    Args:
        data: the mirror's folder, or None for the hub alone.
    """
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        files = mirrored(data, path, name or "")
        if files:
            return datasets.DatasetDict({s: datasets.Dataset.from_list(read_rows(f, "data")) for s, f in files.items()})
        try:
            return original(path, name, **options)
        except Exception as error:
            raise DataError(_unreachable(path, name or "", data, error)) from error

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


def _unreachable(hub: str, config: str, data: Path | None, error: Exception) -> str:
    place = f"{data or 'DIR'}/{hub}/{config or 'default'}/SPLIT.jsonl"
    return (
        f"{hub}: cannot be loaded from the hub ({type(error).__name__}: {' '.join(str(error).split())[:120]}): "
        f"go online, or put it below --data as {place}"
    )
