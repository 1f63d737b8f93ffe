"""Data from files, folders and saved sets; what cannot be trained on is refused in one line."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import datasets
import pytest
import tiny_models

from paretune.errors import ArgumentError, DataError
from paretune.training.data import check_columns, fingerprint, load_splits, take_split

ROWS = tiny_models.rows("dpo", 5)


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, Path]:
    """The same rows in every form that --dataset_name takes."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    found = {name: tmp_path / name for name in ("a.jsonl", "a.json", "list.json", "a.jsonl.gz", "a.parquet")}
    found["a.jsonl"].write_text(lines)
    found["a.json"].write_text(lines)
    found["list.json"].write_text(json.dumps(ROWS))
    with gzip.open(found["a.jsonl.gz"], "wt") as file:
        file.write(lines)
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(found["a.parquet"])
    found["folder"] = tmp_path / "folder"
    found["folder"].mkdir()
    shutil.copy(found["a.jsonl"], found["folder"] / "train.jsonl")
    shutil.copy(found["a.jsonl"], found["folder"] / "test.jsonl")
    found["saved"], found["saved_dict"] = tmp_path / "saved", tmp_path / "saved_dict"
    table.save_to_disk(found["saved"])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(found["saved_dict"])
    return found


def test_every_form_gives_the_same_rows(forms: dict[str, Path]) -> None:
    digests = set()
    for name, path in forms.items():
        splits = load_splits(str(path))
        assert ("test" in splits) == (name in ("folder", "saved_dict")), name
        assert splits["train"].to_list() == ROWS, name
        check_columns(splits["train"], "dpo", name=str(path))
        digests.add(fingerprint(splits["train"])["digest"])
    assert len(digests) == 1


def test_fingerprint_sees_values(forms: dict[str, Path]) -> None:
    train = load_splits(str(forms["a.jsonl"]))["train"]
    one = fingerprint(train)
    assert (one["rows"], one["columns"]) == (5, ["chosen", "prompt", "rejected"])
    assert fingerprint(train.select([0, 1, 2, 4, 3]))["digest"] != one["digest"]
    assert fingerprint(train.to_iterable_dataset())["rows"] is None


def test_streaming(forms: dict[str, Path]) -> None:
    stream = load_splits(str(forms["a.jsonl"]), streaming=True)["train"]
    check_columns(stream, "dpo", name="a")
    with pytest.raises(DataError, match="kto needs the columns"):
        check_columns(stream.select_columns(["prompt"]), "kto", name="a")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.jsonl", None, "no such file or folder"),
        ("dir/absent/x", None, "no such file or folder"),
        ("empty.jsonl", b"", "the file is empty"),
        ("text.txt", b"hello", "only .json, .jsonl"),
        ("table.parquet.gz", b"x", "only .json, .jsonl"),
        ("broken.jsonl", b'{"chosen": ', "cannot be read"),
        ("broken.parquet", b"no parquet", "cannot be read"),
        ("broken.jsonl.gz", b"no gzip", "cannot be read"),
    ],
)
def test_unreadable_data(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        load_splits(str(path))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_splits(str(tmp_path))


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_splits("nobody/nothing")


@pytest.mark.parametrize(
    ("trainer", "columns", "says"),
    [
        ("dpo", {"prompt": ["a"]}, r"dpo needs the columns chosen\+rejected, it has prompt"),
        ("kto", {"prompt": ["a"], "completion": ["b"]}, r"prompt\+completion\+label or chosen\+rejected"),
        ("sft", {"question": ["a"]}, r"sft needs the columns messages or text"),
        ("grpo", {"text": ["a"]}, "grpo needs the columns prompt"),
        ("dpo", {"chosen": ["a", None, None], "rejected": ["b"] * 3}, "chosen is empty in 2 of 3 rows .first: row 1."),
        ("dpo", {"chosen": [], "rejected": []}, "holds no rows"),
    ],
)
def test_wrong_columns(trainer: str, columns: dict[str, list[str | None]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_columns(datasets.Dataset.from_dict(columns), trainer, name="data")


def test_missing_values_behind_a_selection() -> None:
    table = datasets.Dataset.from_dict({"text": ["a", None, "b", "c"]})
    check_columns(table.select([0, 2, 3]), "sft", name="data")
    with pytest.raises(DataError, match=r"text is empty in 1 of 2 rows \(first: row 1\)"):
        check_columns(table.select([3, 1]), "sft", name="data")


def test_a_missing_split_is_named() -> None:
    with pytest.raises(ArgumentError, match="dataset_train_split='dev': 'data' has only the splits test, train"):
        take_split({"train": 1, "test": 2}, "dev", name="data", argument="dataset_train_split")
