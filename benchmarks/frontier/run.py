"""What a front of 200 points costs: the report and its size, the hypervolume's bootstrap, the paired comparison.

    python benchmarks/frontier/run.py

CPU seconds of this process, medians of 3; the first report also pays for importing matplotlib, which is shown apart.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

from paretune.evaluation.frontier import Frontier
from paretune.evaluation.paired import against, measurement
from paretune.evaluation.points import ItemScores, Measurement, read_points, write_points

POINTS, ANSWERS, ITEMS = 200, 200, 150
CATEGORIES = ("math", "code", "reading", "knowledge", "instructions", "agents", "facts")


def models(count: int) -> list[Measurement]:
    """Models whose item-wise scores share their luck, as those of checkpoints of one model do."""
    rng = numpy.random.default_rng(0)
    luck, taste = rng.random((len(CATEGORIES), ITEMS)), rng.normal(size=ANSWERS) * 0.12
    made = []
    for i in range(count):
        reward, quality = (0.4, 0.93) if i == 0 else (rng.uniform(0.2, 0.9), rng.uniform(0.3, 0.95))
        rewards = ItemScores.of(reward + taste + rng.normal(size=ANSWERS) * 0.1, range(ANSWERS))
        own = numpy.where(rng.random(luck.shape) < 0.8, luck, rng.random(luck.shape))
        right = {c: ItemScores.of(own[k] < quality, range(ITEMS), c) for k, c in enumerate(CATEGORIES)}
        about: dict[str, Any] = {
            "hyperparameters": {"lr": 3e-5, "beta": 0.1, "density": 0.05},
            "response_length": 20 + 10 * reward,
            "kl": 30 * reward,
            "measured": {"model": f"/models/run-{i}", "fingerprint": f"{rng.integers(1 << 60):015x}"},
        }
        family = "reference" if i == 0 else ("control", "online", "offline", "joint")[i % 4]
        name = "sft" if i == 0 else f"sweep-{i:03d} lr=3e-5 density=0.05"
        made.append(measurement(name, family, rewards, right, **about))
    return made


def cpu(job: Callable[[], object]) -> float:
    """Median CPU seconds of three calls."""
    took = []
    for _ in range(3):
        began = time.process_time()
        job()
        took.append(time.process_time() - began)
    return statistics.median(took)


def main() -> None:
    """Print the table."""
    folder = Path(tempfile.mkdtemp())
    points = models(POINTS)
    began = time.process_time()
    compared = against(points[0], points)
    comparing = time.process_time() - began
    write_points(folder / "points.jsonl", compared)
    front = Frontier(compared)
    bare = Frontier(
        [Measurement.from_dict({k: v for k, v in p.to_dict().items() if "items" not in k}) for p in compared]
    )
    began = time.process_time()
    front.report(folder / "first.html")
    first = time.process_time() - began
    rows = [
        ("report of 200 points, first of a process (imports matplotlib)", f"{first:.2f} s"),
        ("report of 200 points, a further one", f"{cpu(lambda: front.report(folder / 'r.html')):.2f} s"),
        ("its size", f"{(folder / 'r.html').stat().st_size / 1000:.0f} kB"),
        ("reading points.jsonl with items, comparing, summary", f"{cpu(lambda: _summary(folder)):.2f} s"),
        ("hypervolume + 1,000 bootstraps, from items", f"{cpu(front.hypervolume_interval):.3f} s"),
        ("hypervolume + 1,000 bootstraps, from intervals", f"{cpu(bare.hypervolume_interval):.3f} s"),
        ("all of them against the reference, 7 categories", f"{comparing:.2f} s"),
    ]
    for name, value in rows:
        print(f"| {name} | {value} |")


def _summary(folder: Path) -> object:
    return Frontier(read_points(folder / "points.jsonl")).summary()


if __name__ == "__main__":
    main()
