"""Pareto set and hypervolume against brute force and moocore; the front of measured models; its command."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pytest

import paretune as pt
from paretune.cli.main import main
from paretune.errors import ArgumentError
from paretune.evaluation.frontier import Frontier, hypervolume, hypervolumes, pareto_set
from paretune.evaluation.points import Difference, Measurement, read_points, write_points


@pytest.mark.parametrize("seed", range(40))
def test_against_a_grid(seed: int) -> None:
    """On integer coordinates the dominated area is a number of unit squares."""
    rng = random.Random(seed)
    points = [(rng.randint(-1, 8), rng.randint(-1, 8)) for _ in range(rng.randint(1, 9))]
    squares = sum(any(x >= i + 1 and y >= j + 1 for x, y in points) for i in range(8) for j in range(8))
    assert hypervolume([(float(x), float(y)) for x, y in points], (0.0, 0.0)) == squares
    front = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    assert [points[i] for i in pareto_set(points)] == front


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_equals_moocore(axes: int) -> None:
    """100 random fronts each; half of them on a grid, with ties and equal points."""
    rng = np.random.default_rng(axes)
    for number in range(100):
        shape = (int(rng.integers(1, 40)), axes)
        points = rng.normal(size=shape) if number % 2 else rng.integers(-2, 6, shape).astype(float)
        corner = rng.uniform(-1, 0.5, axes).round(1).tolist()
        expected = moocore.hypervolume(points, ref=corner, maximise=True)
        assert hypervolume(points.tolist(), corner) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        kept = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
        assert pareto_set(points.tolist()) == np.flatnonzero(kept).tolist()


def test_many_fronts_at_once() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 50, 12))
    one_by_one = [hypervolume(list(zip(a, b, strict=True)), (0.0, 0.0)) for a, b in zip(x, y, strict=True)]
    assert hypervolumes(x, y).tolist() == pytest.approx(one_by_one)


def test_nothing_beyond_the_reference_point() -> None:
    assert hypervolume([(0.5, 0.5)], (0.6, 0.0)) == 0
    assert hypervolume([], (0.0, 0.0)) == 0
    assert pareto_set([]) == []
    for corner, points in (((0.0,), [(1.0,)]), ((0.0, 0.0), [(1.0, 1.0, 1.0)]), ((0.0,) * 5, [(1.0,) * 5])):
        with pytest.raises(ArgumentError, match="2 to 4 numbers"):
            hypervolume(points, corner)


# -- measured models -----------------------------------------------------------------------------------------


def point(name: str, reward: float, capability: float, family: str = "control", **more: Any) -> Measurement:
    bounds = {"reward_ci": (reward - 0.02, reward + 0.02), "capability_ci": (capability - 0.02, capability + 0.02)}
    return Measurement(name, family, reward, capability=capability, **{**bounds, **more})


def front() -> Frontier:
    return pt.Frontier(
        [
            point("sft", 0.4, 0.9, "reference", capability_by_category={"math": 0.9, "code": 0.9}),
            point("dpo", 0.8, 0.6, capability_by_category={"math": 0.3, "code": 0.9}),
            point("bad", 0.3, 0.5),
            point("merged", 0.7, 0.85, "offline", capability_by_category={"math": 0.9, "code": 0.8}),
        ]
    )


def test_front_of_models() -> None:
    found = front()
    assert [p.name for p in found.pareto()] == ["sft", "dpo", "merged"]
    assert found.hypervolume(reference_point=(0, 0)) == pytest.approx(0.8 * 0.6 + 0.7 * 0.25 + 0.4 * 0.05)
    assert found.reference is found.points[0]
    dpo = found.points[1]
    assert dpo.tax == pytest.approx(0.3)
    assert found.tax_per_reward(dpo) == (pytest.approx(0.75), None)
    assert found.tax_per_reward(found.points[2]) is None  # no reward gained
    worst = found.worst_category(dpo)
    assert worst is not None
    assert (worst.category, worst.difference) == ("math", pytest.approx(-0.6))
    assert found.worst_category(found.points[0]) is None


def test_tax_per_reward_has_fiellers_interval() -> None:
    """Against a simulation of the ratio of two normal means."""
    sft = point("sft", 0.4, 0.9, "reference")
    dpo = point("dpo", 0.8, 0.6, tax=0.3, tax_ci=(0.2, 0.4), reward_gain=0.4, reward_gain_ci=(0.3, 0.5))
    price = pt.Frontier([sft, dpo]).tax_per_reward(dpo)
    assert price is not None
    assert price[1] is not None
    rng = np.random.default_rng(0)
    tax, gain = rng.normal(0.3, 0.1 / 1.96, 400_000), rng.normal(0.4, 0.1 / 1.96, 400_000)
    for end in price[1]:  # at each end the data are just compatible with that ratio
        assert (tax - end * gain > 0).mean() == pytest.approx(0.025 if end > 0.75 else 0.975, abs=0.002)
    unsure = point("x", 0.5, 0.6, tax=0.3, tax_ci=(0.2, 0.4), reward_gain=0.1, reward_gain_ci=(-0.1, 0.3))
    assert pt.Frontier([sft, unsure]).tax_per_reward(unsure) == (pytest.approx(3.0), None)


def test_default_reference_point() -> None:
    assert front().default_reference_point() == (0.0, 0.0)
    below = pt.Frontier([point("a", -3.217, 0.5), point("b", 2.0, -0.0421)])
    assert below.default_reference_point() == (-3.3, -0.043)


def test_wrong_fronts() -> None:
    a = point("a", 0.1, 0.2)
    with pytest.raises(ArgumentError, match="at least one"):
        pt.Frontier([])
    with pytest.raises(ArgumentError, match="name='a': occurs 2 times"):
        pt.Frontier([a, a])
    with pytest.raises(ArgumentError, match="one point can be the reference, not x, y"):
        pt.Frontier([point("x", 0, 0, "reference"), point("y", 0, 0, "reference")])
    for corner in ((0,), (0, 0, 0), (0, float("nan")), "ab", 3):
        with pytest.raises(ArgumentError, match="reference_point"):
            pt.Frontier([a]).hypervolume(reference_point=corner)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="reward_ci"):
        pt.Frontier([{"name": "a", "family": "b", "reward": 1, "capability": 1, "capability_ci": [0, 1]}])


@pytest.mark.slow
def test_the_hypervolumes_interval_covers() -> None:
    """8 models of 100 items each, where a plain percentile interval covers far less."""
    from paretune.evaluation.paired import measurement
    from paretune.evaluation.points import ItemScores

    rng, hits, repetitions, spread = np.random.default_rng(0), 0, 100, 0.4
    place = np.linspace(0, 1, 8)
    reward, capability = 0.3 + 0.6 * place, 0.9 - 0.5 * place**2
    truth = hypervolume(list(zip(reward, capability, strict=True)), (0, 0))
    for _ in range(repetitions):
        made = []
        for i in range(8):
            r, c = (ItemScores.of(rng.normal(m, spread, 100), range(100)) for m in (reward[i], capability[i]))
            made.append(measurement(str(i), "x", r, {"m": c}))
        found = Frontier(made)
        assert found.paired
        low, high = found.hypervolume_interval((0, 0), draws=300)
        hits += low <= truth <= high
    assert 0.88 <= hits / repetitions <= 0.99


def test_intervals_without_items() -> None:
    low, high = front().hypervolume_interval((0, 0))
    assert not front().paired
    assert low < front().hypervolume((0, 0)) < high
    assert (low, high) == front().hypervolume_interval((0, 0))  # the same draws each time


# -- paretune frontier ---------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_points(tmp_path / "points.jsonl", front().points)
    return tmp_path / "points.jsonl"


def test_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", str(file), "--json", "--reference-point", "0.1,-0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pareto"] == ["sft", "dpo", "merged"]
    assert found["reference_point"] == [0.1, -0.5]
    expected = moocore.hypervolume([[0.4, 0.9], [0.8, 0.6], [0.7, 0.85]], ref=[0.1, -0.5], maximise=True)
    assert found["hypervolume"] == pytest.approx(expected)
    assert found["hypervolume_ci"][0] < expected < found["hypervolume_ci"][1]
    assert found["points"][1]["worst_category"]["category"] == "math"


def test_a_negative_reference_point_needs_no_equals_sign(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, expected in (("-1,0", [-1.0, 0.0]), ("-.5,-2e-1", [-0.5, -0.2])):
        assert main(["frontier", str(file), "--json", "--reference-point", given]) == 0
        assert json.loads(capsys.readouterr().out)["reference_point"] == expected


def test_text_and_files(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = [tmp_path / f"out.{ending}" for ending in ("html", "svg", "png", "md", "csv", "jsonl")]
    arguments = [text for output in outputs for text in ("-o", str(output))]
    assert main(["frontier", str(file), *arguments]) == 0
    said = capsys.readouterr()
    assert "Hypervolume" in said.out
    assert "against (0, 0)" in said.out
    assert said.err.count("written: ") == 6
    assert all(output.stat().st_size > 100 for output in outputs)
    assert [p.name for p in read_points(outputs[-1])] == ["sft", "dpo", "bad", "merged"]


def test_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for seed in range(3):
        shift = 0.01 * seed
        made = [point("sft", 0.4 + shift, 0.9, "reference"), point("dpo", 0.8 - shift, 0.6 + shift)]
        write_points(tmp_path / f"seed{seed}.jsonl", made)
        paths.append(str(tmp_path / f"seed{seed}.jsonl"))
    assert main(["frontier", *paths]) == 2
    assert "hold different points of this name" in capsys.readouterr().err
    assert main(["frontier", *paths, "--combine-seeds", "--json"]) == 0
    dpo = json.loads(capsys.readouterr().out)["points"][1]
    assert dpo["tax"] == pytest.approx(0.29)
    assert dpo["verdict"] == "loss"


def test_choosing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from paretune.evaluation.paired import measurement
    from paretune.evaluation.points import ItemScores

    rng = np.random.default_rng(0)
    luck, reward = rng.random(200), rng.normal(size=200) * 0.1

    def made(name: str, family: str, gain: float, quality: float) -> Measurement:
        rewards, right = ItemScores.of(reward + gain, range(200)), ItemScores.of(luck < quality, range(200), "math")
        return measurement(name, family, rewards, {"m": right}, path="" if family == "reference" else "linear")

    models = [made("sft", "reference", 0.0, 0.9), made("0.3", "offline", 0.2, 0.9), made("0.9", "offline", 0.4, 0.5)]
    write_points(tmp_path / "p.jsonl", models)
    assert main(["frontier", str(tmp_path / "p.jsonl"), "--choose-max-tax", "0.01", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]["linear"]
    assert (chosen["name"], chosen["verdict"]) == ("0.3", "within noise")
    assert main(["frontier", str(tmp_path / "p.jsonl"), "--choose-max-tax", "-1"]) == 0
    assert "no point pays so little" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.jsonl"], "missing.jsonl: cannot be read (No such file or directory)"),
        (["POINTS", "-o", "out.docx"], "output='out.docx': name a file ending in .html, .svg, .png, .md, .csv, .jsonl"),
        (["POINTS", "-o", "none/out.html"], "name a file in a directory that exists"),
        (["POINTS", "--reference-point", "1"], "--reference-point='1': give reward,capability"),
        (["POINTS", "--reference-point", "a,b"], "--reference-point='a,b'"),
        (["POINTS", "--reference-point", "nan,0"], "give two finite numbers"),
        (["POINTS", "--choose-max-tax", "0.1"], "give the points to choose among the same path"),
        (["POINTS", "--combine-seeds"], "give at least 2 files, one a seed"),
        (["POINTS", "--referenze-point", "1,1"], "did you mean --reference-point?"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], said: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert main(["frontier", *(str(file) if text == "POINTS" else text for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_differences_of_a_file_are_kept() -> None:
    """A point that brings its own comparison is not compared again."""
    told = point("dpo", 0.8, 0.6, tax=0.25, tax_ci=(0.2, 0.3), by_category={"math": Difference(-0.5, (-0.6, -0.4))})
    found = pt.Frontier([point("sft", 0.4, 0.9, "reference"), told])
    assert found.points[1] is told
