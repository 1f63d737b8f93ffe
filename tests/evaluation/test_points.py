"""points.jsonl: what is written is read back, what cannot be is refused with file, line, field and mend."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paretune as pt
from paretune.errors import ArgumentError, DataError
from paretune.evaluation.points import SCHEMA, Difference, ItemScores, Measurement, read_points, write_points

LEAST: dict[str, Any] = {
    "name": "sft",
    "family": "reference",
    "reward": 0.4,
    "reward_ci": [0.3, 0.5],
    "capability": 0.9,
    "capability_ci": [0.8, 1.0],
}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def test_the_least_that_a_line_needs(tmp_path: Path) -> None:
    [point] = pt.read_points(lines(tmp_path / "p.jsonl", LEAST, ""))
    assert (point.name, point.reward_ci, point.tax, point.capability_by_category) == ("sft", (0.3, 0.5), None, {})
    assert point.to_dict() == {"schema": SCHEMA, **LEAST}


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
bounds = st.tuples(finite, finite).map(lambda pair: (min(pair), max(pair)))
text = st.text(min_size=1).filter(lambda s: bool(s.strip()))
items = st.builds(
    lambda scores, category, grouped: ItemScores.of(
        scores, range(len(scores)), category, [i // 2 for i in range(len(scores))] if grouped else None
    ),
    st.lists(finite, min_size=1, max_size=5),
    st.text(max_size=5),
    st.booleans(),
)
differences = st.dictionaries(
    text, st.builds(Difference, finite, bounds, st.none() | st.floats(0, 1), items=st.integers(1, 9)), max_size=2
)
measurements = st.builds(
    Measurement,
    text, text, finite, bounds, finite, bounds,
    hyperparameters=st.dictionaries(st.text(), finite | st.text() | st.booleans(), max_size=2),
    path=st.text(), label=st.text(),
    capability_by_category=st.dictionaries(st.text(), finite, max_size=2),
    tax=st.none() | finite, tax_ci=st.none() | bounds, tax_verdict=st.sampled_from(["", "gain", "within noise"]),
    by_category=differences, kl=st.none() | finite,
    reward_items=st.none() | items, capability_items=st.dictionaries(text, items, max_size=2),
    measured=st.dictionaries(st.text(), st.text(), max_size=2),
    extra=st.just({}) | st.just({"other_tool": [1, {"a": None}]}),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(point=measurements)
def test_round_trip(point: Measurement, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("points") / "p.jsonl"
    write_points(path, [point])
    assert read_points(path) == [point]
    assert len(path.read_text().split("\n")) == 2  # one line, whatever a name contains


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"reward": None}, "reward=None"),
        ({"reward": "0.4"}, "reward='0.4'"),
        ({"reward": True}, "reward=True"),
        ({"capability_ci": [1.0, 0.8]}, "capability_ci=[1.0, 0.8]: give [low, high]"),
        ({"reward_ci": 0.1}, "reward_ci=0.1"),
        ({"name": " "}, "name=' '"),
        ({"family": 3}, "family=3"),
        ({"tax_verdict": "bad"}, "tax_verdict='bad'"),
        ({"capability_by_category": {"math": "x"}}, "capability_by_category['math']='x'"),
        ({"by_category": {"math": {"difference": 1}}}, "give difference and ci"),
        ({"reward_items": {"ids": "x", "scores": []}}, "reward_items="),
        ({"capability_items": {"a": {"ids": "x", "scores": [1], "clusters": [1, 2]}}}, "clusters=[1, 2]"),
        ({"schema": 99}, "schema=99: this paretune reads schema 1"),
    ],
)
def test_wrong_fields(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = lines(tmp_path / "p.jsonl", LEAST | {"name": "first"}, LEAST | change)
    with pytest.raises(DataError) as error:
        read_points(path)
    assert named in str(error.value)
    assert f"{path}, line 2" in str(error.value)


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"reward": NaN}', '{"name": "x"}'])
def test_wrong_lines(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match="line 1"):
        read_points(lines(tmp_path / "p.jsonl", line))


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_points(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_points(tmp_path / "binary")
    with pytest.raises(DataError, match="holds no points"):
        read_points(lines(tmp_path / "empty.jsonl", ""))
    with pytest.raises(DataError, match="occurs 2 times"):
        read_points(lines(tmp_path / "twice.jsonl", LEAST, LEAST))


def test_several_files(tmp_path: Path) -> None:
    a = lines(tmp_path / "a.jsonl", LEAST, LEAST | {"name": "dpo", "family": "control"})
    b = lines(tmp_path / "b.jsonl", LEAST | {"seconds": 3}, LEAST | {"name": "kto", "family": "control"})
    assert [point.name for point in read_points(a, b)] == ["sft", "dpo", "kto"]
    c = lines(tmp_path / "c.jsonl", LEAST | {"reward": 0.41})
    with pytest.raises(ArgumentError, match=r"name='sft'.*a.jsonl and .*c.jsonl hold different points"):
        read_points(a, c)


def test_items_tell_other_items_apart() -> None:
    scores = ItemScores.of([1, 0], ["a", "b"])
    assert scores.ids == ItemScores.of([0, 0], ["a", "b"]).ids
    assert scores.ids != ItemScores.of([1, 0], ["b", "a"]).ids
    assert scores.ids != ItemScores.of([1, 0], ["a", "b"], clusters=["p", "p"]).ids
    with pytest.raises(ArgumentError, match="ids"):
        ItemScores.of([1], ["a", "b"])
    with pytest.raises(ArgumentError, match="finite"):
        ItemScores.of([float("nan")], ["a"])
    with pytest.raises(ArgumentError, match="clusters"):
        ItemScores.of([1, 1], ["a", "b"], clusters=[1])


def test_a_measurement_cannot_be_changed() -> None:
    point = Measurement.from_dict(LEAST)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.reward = 1.0  # type: ignore[misc]
