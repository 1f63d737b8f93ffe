"""Do ALRIGHT and MAXRIGHT dominate training one objective after the other? The tiny world, several seeds.

    python benchmarks/joint/tiny_world.py --seeds 0,1,2 [--out benchmarks/joint/tiny_world.jsonl]
    python benchmarks/joint/tiny_world.py --table

One JSON line a model; what is there is not made again. Reward and skills are in points of 100, the losses those of
the final model on the dialogues and pairs that it trained on. The table has the mean over seeds of each joint run
minus each sequential one on the same seed, with a 95% t interval over seeds; a run dominates when one of the two is
better by its interval and the interval of the other excludes a loss of more than 2 points.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch

from paretune.demo import joint, methods
from paretune.demo.align import DPOSettings, _preference_loss
from paretune.demo.measure import measure
from paretune.demo.methods import Bench, Row
from paretune.demo.pretrain import Recipe, default_cache, prepare
from paretune.demo.world import World

WEIGHTS = (0.1, 0.25, 0.5, 0.75, 0.9)
METRICS = ("reward", "skills", "sft", "dpo")
MARGIN = 2.0  # points: a loss that is called none


def rows() -> list[Row]:
    """The reference, plain DPO, both orders, and each schedule over weights."""
    table = [
        Row("reference (SFT)", "control", methods._reference),
        Row("DPO alone", "control", methods._adamw),
        Row("sequential", "joint", joint.joint, {"order": "sft then dpo"}),
        Row("sequential", "joint", joint.joint, {"order": "dpo then sft"}),
    ]
    for method in ("MIX", "ALRIGHT", "MAXRIGHT"):
        table += [Row(method, "joint", joint.joint, {"weight": weight}) for weight in WEIGHTS]
    return table


def run(seed: int, out: Path) -> None:
    """All rows of one seed."""
    known = {(each["seed"], each["key"], each["world"]) for each in _read(out)}
    world = World(seed=seed)
    recipe = Recipe(world)
    stamp = f"{recipe.reference_key} {DPOSettings()}"
    bench: Bench | None = None
    for row in rows():
        if (seed, row.key, stamp) in known:
            continue
        if bench is None:
            base, reference = prepare(recipe, default_cache())
            bench = Bench(recipe, base, reference, out.parent)
        torch.manual_seed(seed)
        before = time.process_time()
        (_, about, model), *_ = row.make(bench, row)
        seconds = time.process_time() - before
        line = {"seed": seed, "key": row.key, "world": stamp, "method": row.method, "setting": row.hyperparameters}
        line |= {**about, **_scores(bench, model), "seconds": round(seconds, 2)}
        with out.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def _scores(bench: Bench, model: Any) -> dict[str, float]:
    found, world = measure(model, bench.recipe.world), bench.recipe.world
    by_category: dict[str, list[bool]] = {}
    for item, solved in zip(world.items, found.solved, strict=True):
        by_category.setdefault(item.category, []).append(solved)
    dialogues = joint.sft_dialogues(world)
    with torch.no_grad():
        sft = float(joint._sft_loss(model, *(part[:512] for part in dialogues)))
        dpo = float(_preference_loss(model, bench.pairs.take(range(min(512, len(bench.pairs.ids)))), DPOSettings()))
    return {
        "reward": round(100 * statistics.mean(found.rewards), 2),
        "skills": round(100 * statistics.mean(statistics.mean(solved) for solved in by_category.values()), 2),
        "sft": round(sft, 4),
        "dpo": round(dpo, 4),
    }


def table(out: Path) -> str:
    """Means over seeds, and paired differences from each sequential run."""
    lines = _read(out)
    last = {(each["seed"], each["key"]): each for each in lines}
    seeds = sorted({seed for seed, _ in last})
    keys = [row.key for row in rows() if all((seed, row.key) in last for seed in seeds)]
    shown = [f"{len(seeds)} seeds: {', '.join(map(str, seeds))}", "", "| | reward | skills | sft loss | dpo loss |"]
    shown.append("|---|---|---|---|---|")
    for key in keys:
        means = [statistics.mean(last[seed, key][metric] for seed in seeds) for metric in METRICS]
        shown.append(f"| {key} | {means[0]:.1f} | {means[1]:.1f} | {means[2]:.3f} | {means[3]:.3f} |")
    for order in [key for key in keys if key.startswith("sequential")]:
        shown += ["", f"Minus {order}:", "", "| | reward | skills | dominates |", "|---|---|---|---|"]
        for key in [key for key in keys if key.startswith(("MIX", "ALRIGHT", "MAXRIGHT"))]:
            cells, verdicts = [], []
            for metric in ("reward", "skills"):
                low, mean, high = interval([last[seed, key][metric] - last[seed, order][metric] for seed in seeds])
                cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
                verdicts.append((low > 0, high < 0, low > -MARGIN))
            better, worse = any(v[0] for v in verdicts), any(v[1] for v in verdicts)
            verdict = {(True, False): "yes", (False, True): "no, worse", (True, True): "no, a trade"}
            told = verdict.get((better, worse), "not resolved")
            if told == "yes" and not all(v[2] for v in verdicts):
                told = "better in one, the other not resolved"
            shown.append(f"| {key} | {cells[0]} | {cells[1]} | {told} |")
    return "\n".join(shown)


def interval(differences: list[float]) -> tuple[float, float, float]:
    """The mean and its 95% t interval."""
    from scipy.stats import t

    mean = statistics.mean(differences)
    if len(differences) < 2:
        return float("-inf"), mean, float("inf")
    half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return mean - half, mean, mean + half


def _read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tiny_world.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        print(table(options.out))
        return
    for seed in map(int, options.seeds.split(",")):
        run(seed, options.out)


if __name__ == "__main__":
    main()
