"""Training data: a hub id, a file or a folder; refused before training where it cannot be trained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    AnyDataset = Dataset | IterableDataset

# What each trainer can be fed with: any one of these sets of columns suffices.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "dpo": (("chosen", "rejected"),),
    "kto": (("prompt", "completion", "label"), ("chosen", "rejected")),
    "sft": (("messages",), ("text",), ("prompt", "completion"), ("conversations",), ("input_ids",)),
    "grpo": (("prompt",),),
}
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_FINGERPRINT_ROWS = 1024


def load_splits(
    name: str, *, config: str | None = None, streaming: bool = False, argument: str = "dataset_name"
) -> dict[str, Dataset | IterableDataset]:
    """All splits of a data set.

    Args:
        name: a ``.json``, ``.jsonl`` or ``.parquet`` file (``.gz`` of the first two as well), a folder of such files
            or one written by ``Dataset.save_to_disk``, or a hub id.
        config: the data set's configuration, for hub ids and folders.
        streaming: read lazily (not for folders written by ``save_to_disk``).
        argument: what named the data set, for messages.

    Returns:
        Split name to data set; a single file is the split ``train``.

    Raises:
        DataError: nothing is there, it cannot be read, or it holds no rows.
    """
    import datasets

    path = Path(name).expanduser()
    try:
        if path.is_file():
            reader = _reader(path, argument)
            loaded: Any = datasets.load_dataset(reader, data_files={"train": str(path)}, streaming=streaming)
        elif path.is_dir() and _is_saved_to_disk(path):
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path), name=config, streaming=streaming)
        elif _looks_like_path(name):
            raise DataError(f"{argument}={name!r}: no such file or folder; give a file, a folder or a hub id")
        else:
            loaded = datasets.load_dataset(name, name=config, streaming=streaming)
    except DataError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):  # what datasets says of a JSON file with an empty list
            raise DataError(f"{argument}={name!r}: it holds no rows; give a data set that is not empty") from error
        # datasets raises about a dozen unrelated classes here (pyarrow, json, hub, builder errors).
        raise DataError(f"{argument}={name!r}: cannot be read: {_one_line(error)}") from error
    if isinstance(loaded, (datasets.Dataset, datasets.IterableDataset)):
        return {"train": loaded}
    return dict(loaded)


def take_split(splits: dict[str, Any], split: str, *, name: str, argument: str) -> Dataset | IterableDataset:
    """One split, by name.

    Args:
        splits: what :func:`load_splits` returned.
        split: the wanted split.
        name: the data set's name, for the message.
        argument: the argument that chose the split, for the message.

    Raises:
        ArgumentError: there is no such split.
    """
    if split not in splits:
        have = ", ".join(sorted(splits))
        raise ArgumentError(argument, split, f"{name!r} has only the splits {have}; name one of them")
    return splits[split]


def check_columns(
    dataset: Dataset | IterableDataset, trainer: str, *, name: str, argument: str = "dataset_name"
) -> None:
    """Refuse data that the trainer cannot use.

    Args:
        dataset: a split.
        trainer: ``dpo``, ``kto``, ``sft`` or ``grpo``.
        name: the data set's name, for the message; empty where it has none.
        argument: what named the data set, for the message.

    Raises:
        DataError: no rows, missing columns, or missing values in a needed column.
    """
    shown = f"{argument}={name!r}" if name else argument
    columns = list(dataset.column_names or [])
    if not columns:  # a stream does not always know its columns before its first row
        first = next(iter(dataset), None)
        columns = list(first or [])
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    if rows == 0 or not columns:
        raise DataError(f"{shown}: it holds no rows; give a data set that is not empty")
    matching = [needed for needed in COLUMNS[trainer] if set(needed) <= set(columns)]
    if not matching:
        choices = " or ".join("+".join(needed) for needed in COLUMNS[trainer])
        raise DataError(
            f"{shown}: {trainer} needs the columns {choices}, it has {', '.join(sorted(columns))}; "
            "rename or add columns"
        )
    if rows is not None:
        _check_values(dataset, matching[0], shown)


def fingerprint(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """What identifies the data of a run, wherever it lies: rows, columns and a digest of evenly spread rows.

    Args:
        dataset: a split; streams are identified by their columns alone.

    Returns:
        ``{"rows": int | None, "columns": [...], "digest": str | None}``; the digest covers at most 1024 rows.
    """
    columns = sorted(dataset.column_names or [])
    if not hasattr(dataset, "__len__"):
        return {"rows": None, "columns": columns, "digest": None}
    rows = len(dataset)
    count = min(rows, _FINGERPRINT_ROWS)
    digest = hashlib.sha256(f"{rows} {columns}".encode())
    for row in dataset.select([position * rows // count for position in range(count)]):
        digest.update(json.dumps(row, sort_keys=True, default=repr, ensure_ascii=True).encode())
    return {"rows": rows, "columns": columns, "digest": digest.hexdigest()[:32]}


def _check_values(dataset: Dataset, needed: tuple[str, ...], shown: str) -> None:
    for column in needed:
        values = dataset.with_format("arrow")[:][column] if dataset._indices else dataset.data.column(column)
        missing = values.null_count
        if missing:
            first = values.is_null().index(True).as_py()
            raise DataError(
                f"{shown}: column {column} is empty in {missing} of {len(dataset)} rows "
                f"(first: row {first}); fill or drop them"
            )


def _reader(path: Path, argument: str) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if kind not in _READERS or (kind == ".parquet" and suffixes[-1] == ".gz"):
        raise DataError(
            f"{argument}={str(path)!r}: only .json, .jsonl (also .gz) and .parquet files can be read; convert it"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{argument}={str(path)!r}: the file is empty; give a data set that is not empty")
    return _READERS[kind]


def _is_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _looks_like_path(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or suffix in {*_READERS, ".gz"}


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None and not str(error).strip() else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if len(text) <= 300 else text[:299] + "…"
