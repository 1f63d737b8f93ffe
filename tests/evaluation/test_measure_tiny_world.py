"""The tiny-world suite says what the demo's own measuring says, item by item."""

from __future__ import annotations

import importlib.util
import random
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from paretune.cli.main import main
from paretune.demo import words
from paretune.demo.pretrain import Phase, Recipe, prepare
from paretune.demo.skills import solves
from paretune.demo.world import World
from paretune.evaluation.points import read_points
from paretune.evaluation.suite import load
from paretune.evaluation.tasks import KINDS
from paretune.generation.prompts import read_rows

ROOT = Path(__file__).parents[2]


def example() -> Any:
    path = ROOT / "examples" / "tiny_world" / "write.py"
    spec = importlib.util.spec_from_file_location("tiny_world_write", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_and_scores_are_the_demos(tmp_path: Path) -> None:
    """Every skill has its file, and an answer is right exactly where the demo says so."""
    world, exact, rng = World(items_per_skill=5), KINDS["exact"], random.Random(0)
    example().write_exercises(world, tmp_path)
    example().write_chat(world, tmp_path)
    rows = [row for task in load("tiny-world").tasks for row in read_rows(tmp_path / task.file, "data")]
    assert {row["prompt"] for row in rows} == {item.prompt for item in world.items}
    manners = sorted(words.manners())
    assert exact.score is not None
    right = 0
    for row in rows:
        for _ in range(5):
            said = row["answer"].split() + rng.sample(manners, 2) + rng.sample(words.LETTERS, rng.random() < 0.3)
            if rng.random() < 0.5:
                rng.shuffle(said)
            score = exact.score(row, " ".join(said))
            assert score == solves(row["answer"], " ".join(said))
            right += int(score)
    assert 0 < right < 5 * len(rows)
    assert {tuple(row) for row in read_rows(tmp_path / "pairs.jsonl", "data")} == {("prompt", "chosen", "rejected")}


def commands() -> list[list[str]]:
    """The paretune commands of docs/measure.md's bash block."""
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "measure.md").read_text(), re.DOTALL)
    lines = block.replace("\\\n", " ").split("\n")
    return [shlex.split(line)[1:] for line in lines if line.startswith("paretune ")]


def briefly(world: World) -> Recipe:
    """A fifth of the training: the reference solves some exercises, which is all that is needed here."""
    return Recipe(world, base=Phase(steps=100, rows=6, lr=2e-3), sft=Phase(steps=500, rows=12, lr=2e-3))


@pytest.mark.slow
def test_the_page_and_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says to type runs, and a trained model solves the same exercises as in the demo's own measuring."""
    from paretune.demo.measure import measure
    from paretune.generation import load as load_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["write.py", "runs/world"])
    writing = example()
    monkeypatch.setattr(writing, "Recipe", briefly)
    monkeypatch.setattr(writing, "prepare", partial(prepare, cache=tmp_path / "cache"))
    writing.main()
    train, measuring = commands()
    assert main([*train, "--disable_tqdm", "true"]) == 0
    assert main([*measuring, "--quiet", "--limit", "20", "--samples", "2"]) == 0
    world, points = World(), {point.name: point for point in read_points("runs/world/points.jsonl")}
    assert points["base"].tax_verdict == "loss"
    assert points["aligned 1"].tax == 0
    assert points["aligned 0"].reward > points["reference"].reward
    model, _ = load_model("runs/world/reference", device="cpu")
    solved = measure(model, world, samples=1).solved
    found: dict[str, list[float]] = {}
    for item, right in zip(world.items, solved, strict=True):
        found.setdefault(item.category, []).append(float(right))
    first = {name: scores[:20] for name, scores in found.items()}
    assert {name: list(items.scores) for name, items in points["reference"].capability_items.items()} == first
    assert 0.02 < points["reference"].capability < 1
