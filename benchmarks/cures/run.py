"""How far cures without SFT data hold: the tiny world on fresh seeds, and six changed worlds.

    python benchmarks/cures/run.py --worlds standard --seeds 4,5,6,7,8
    python benchmarks/cures/run.py --worlds deeper,on-policy,short,marker,refusal,overlap --seeds 4,5
    python benchmarks/cures/table.py

Every method is a curve: AdamW over learning rates, all others over the scale of their change. Hyper-parameters are the
constants of `paretune.demo.cures`, fixed before these seeds were run. One process, one thread; a line of records.jsonl
for each point; what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from paretune.demo import cures, methods
from paretune.demo.changed import WORLDS, world_named
from paretune.demo.measure import measure
from paretune.demo.methods import Bench, Row
from paretune.demo.pretrain import default_cache, prepare
from paretune.demo.world import World

LADDER = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5)
GATED = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
FACTORS = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4)


def rows() -> Iterator[tuple[Row, tuple[float, ...]]]:
    """What is run, and the ladder of each."""
    yield Row("reference (SFT)", "control", methods._reference), ()
    for factor in FACTORS:
        yield Row("AdamW", "control", methods._adamw, {"lr": round(factor * methods.LR, 9)}), ()
    yield Row("scaled back", "offline", cures.scaled_back), LADDER
    yield Row("EMA", "regularisation", methods._average, {"decay": 0.02}), LADDER
    yield Row("TIES", "offline", methods._offline, {"merge": "ties", "weight": 0.7, "density": 0.7}), LADDER
    for options in ({"weight": 1.0}, {"weight": 3.0}, {"weight": 1.0, "mode": "tensors"}):
        yield Row("Fisher gate", "offline", cures.gated, options), GATED
    for source in ("raw-fragments", "prompt-model"):
        yield Row("self-rehearsal", "joint", cures.rehearsed, {"source": source}), LADDER
    yield Row("replay", "joint", cures.rehearsed, {"source": "real data"}), LADDER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="standard", help=f"of {', '.join(WORLDS)}")
    parser.add_argument("--seeds", default="4,5,6,7,8")
    parser.add_argument("--methods", help="only these, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    logging.getLogger("paretune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    records = options.out / "records.jsonl"
    wanted = None if options.methods is None else options.methods.split(",")
    for seed in map(int, options.seeds.split(",")):
        for world in options.worlds.split(","):
            run(world, seed, records, wanted)


def run(name: str, seed: int, records: Path, wanted: list[str] | None) -> None:
    """All methods in one world of one seed."""
    recipe, settings = world_named(name, seed)
    # A record counts only for the recipe that made it.
    stamp = f"{recipe.reference_key} {recipe.world.fingerprint} {settings}"
    lines = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    known = {(each["method"], json.dumps(each["setting"])) for each in lines if each["stamp"] == stamp}
    bench: Bench | None = None
    for row, ladder in rows():
        key = (row.method, json.dumps(row.hyperparameters))
        if key in known or (wanted is not None and row.method not in wanted):
            continue
        if bench is None:
            base, reference = prepare(recipe, default_cache())
            work = records.parent / "work"
            work.mkdir(exist_ok=True)
            bench = Bench(recipe, base, reference, work, settings)
            bench.policy()  # not part of anyone's time
        points = list(_points(bench, row, ladder))
        line = {"world": name, "seed": seed, "method": row.method, "setting": row.hyperparameters, "stamp": stamp}
        with records.open("a") as stream:
            stream.write(json.dumps(line | {"points": points}) + "\n")
        best = max(points, key=lambda point: point["reward"])
        print(f"{name} {seed} {row.key}: {best}", flush=True)


def _points(bench: Bench, row: Row, ladder: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """Each point of a method's curve: the method is made once, and dialled."""
    torch.manual_seed(bench.seed)
    before = time.process_time()
    policy: dict[str, torch.Tensor] = {}
    further: dict[str, Any] = {}
    for _, about, model in row.make(bench, row):
        if about.get("scale", 1.0) == 1.0:  # the ladders of the demo's rows are not ours
            policy = {name: p.detach().clone() for name, p in model.named_parameters()}
            further = {k: v for k, v in about.items() if k != "scale"}
    if row.make is cures.scaled_back:
        policy = bench.policy()
    seconds = time.process_time() - before
    for scale in ladder or (1.0,):
        for _, about, dialled in cures.climbed(bench, row, policy, (scale,)):
            yield {**about, **further, **scores(dialled, bench.recipe.world), "seconds": round(seconds, 2)}


def scores(model: Any, world: World) -> dict[str, Any]:
    """Mean sampled reward and mean of the skills' categories, in points of 100."""
    found = measure(model, world)
    by_category: dict[str, list[bool]] = {}
    for item, solved in zip(world.items, found.solved, strict=True):
        by_category.setdefault(item.category, []).append(solved)
    each = {name: round(100 * statistics.mean(solved), 2) for name, solved in by_category.items()}
    reward = round(100 * statistics.mean(found.rewards), 2)
    return {"reward": reward, "skills": round(statistics.mean(each.values()), 2), "by_category": each}


if __name__ == "__main__":
    main()
