"""The grid: axes, order, what is kept, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from paretune.errors import ArgumentError, PareTuneError
from paretune.training import loss_space
from paretune.training.sweep import directory_name, parse_axes, points, run_sweep, settings_digest

KNOWN = ("density", "learning_rate", "output_dir")


def test_axes_and_grid() -> None:
    axes = parse_axes(["density=1e-3, 1e-2", "--learning-rate=1e-6"], KNOWN)
    assert axes == {"density": ["1e-3", "1e-2"], "learning_rate": ["1e-6"]}
    grid = points(axes)
    assert grid == [
        {"density": "1e-3", "learning_rate": "1e-6"},
        {"density": "1e-2", "learning_rate": "1e-6"},
    ]
    assert directory_name(grid[0]) == "density=1e-3,learning_rate=1e-6"
    assert directory_name({"model": "a/b c"}) == "model=a_b_c"


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["density"], "write it as name=value,value"),
        (["density="], "write it as name=value,value"),
        (["=1"], "write it as name=value,value"),
        (["depth=1"], "depth is no argument"),
        (["output_dir=a,b"], "output_dir is no argument of this command that can be swept"),
        (["density=1,1"], "twice"),
        (["density=1", "density=2"], "twice"),
    ],
)
def test_wrong_axes(texts: list[str], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        parse_axes(texts, KNOWN)


def make_record(value: float) -> dict[str, Any]:
    return {"optimizer": {"name": "x"}, "steps": 1, "seconds": 0.1, "metrics": {"loss": value}, "last_log": {}}


def test_finished_points_are_kept(tmp_path: Path) -> None:
    trained: list[str] = []

    def train(point: Mapping[str, str], directory: Path) -> dict[str, Any]:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(directory.name)
        return make_record(float(point["density"]))

    grid = points({"density": ["1", "2", "3"]})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(grid, tmp_path, "d", train)
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 2
    trained[:] = ["before"]
    found = run_sweep(grid, tmp_path, "d", train)
    assert trained == ["before", "density=3"]
    assert [record["metrics"]["loss"] for record in found] == [1.0, 2.0, 3.0]
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert lines == found
    # a smaller grid reports its own points and keeps the others
    assert run_sweep(grid[:1], tmp_path, "d", train) == found[:1]
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 3
    with pytest.raises(PareTuneError, match="holds points of other arguments"):
        run_sweep(grid, tmp_path, "e", train)


def test_a_broken_record_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").write_text("{broken")
    with pytest.raises(PareTuneError, match="line 1 is no record of a sweep"):
        run_sweep(points({"density": ["1"]}), tmp_path, "d", lambda *_: make_record(0.0))


def test_only_what_changes_numbers_counts() -> None:
    one = settings_digest({"learning_rate": 1e-6, "output_dir": "a", "resume_from_checkpoint": "true"})
    assert one == settings_digest({"learning_rate": 1e-6, "output_dir": "b"})
    assert one != settings_digest({"learning_rate": 2e-6, "output_dir": "a"})


def test_fronts_are_of_one_schedule_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line joins points that differ by weight alone, in order, and what diverged is no word on an axis."""
    drawn: list[Any] = []
    monkeypatch.setattr(loss_space, "_save", lambda figure, file: drawn.append(figure.axes[0]))
    losses = {("mix", "0.1"): (1.0, 0.6), ("mix", "0.9"): (2.0, 0.2), ("mix", "0.5"): (1.5, 0.4)}
    losses |= {("alright", "0.5"): (1.2, "nan"), ("alright", "0.1"): (1.1, 0.7)}
    points = [
        {"point": {"schedule": schedule, "weights.dpo": w}, "losses": {"train": {"sft": a, "dpo": b}, "eval": {}}}
        for (schedule, w), (a, b) in losses.items()
    ]
    loss_space.draw_front(points, tmp_path / "front.png")
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].get_lines()}
    assert lines["schedule mix"] == [[1.0, 0.6], [1.5, 0.4], [2.0, 0.2]]
    assert lines["schedule alright"][0] == [1.1, 0.7]
    assert math.isnan(lines["schedule alright"][1][1])
    loss_space.draw_front([{**point, "point": {"weights.dpo": "0.5"}} for point in points[:3]], tmp_path / "front.png")
    assert len(drawn[1].get_lines()) == 1
