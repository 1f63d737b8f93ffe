"""How far cures hold on a model fourteen times as large: the mid world, two rewards, two kinds of pairs.

    python benchmarks/mid_world/run.py [--seeds 0] [--worlds polite,brief,on-policy]
    python benchmarks/mid_world/table.py

``polite`` asks for politeness with pairs from elsewhere, ``on-policy`` for the same with pairs of the reference's own
answers, ``brief`` for short answers to the point. All share one base and one reference. The learning rate is found on
AdamW alone in ``polite`` (see `learning_rate`), every other hyper-parameter is that of `paretune.demo.cures`. One
process, one thread; base and reference are cached; a line of records.jsonl for each curve; what is there is not made
again.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cures.run import _points

from paretune.demo import cures, methods
from paretune.demo.align import DPOSettings, align
from paretune.demo.methods import Bench, Made, Row
from paretune.demo.mid import mid_recipe
from paretune.demo.pretrain import default_cache, load_model, prepare
from paretune.demo.rehearse import Replay, real_replay, self_rehearsal

WORLDS = {"polite": ("polite", False), "brief": ("short", False), "on-policy": ("polite", True)}
RATES = (1e-5, 2e-5, 4e-5, 8e-5)
BETWEEN = (2.8e-5,)  # where skills fall: the control's curve is finer there, the choice among RATES stays
LADDER = (0.3, 0.5, 0.7, 0.85, 1.0, 1.25)
GATED = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
CLOSE = 2.0  # points of reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default=",".join(WORLDS), help="polite first: the learning rate is found there")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--methods", help="only these, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    logging.getLogger("paretune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    wanted = None if options.methods is None else options.methods.split(",")
    for seed in map(int, options.seeds.split(",")):
        for world in options.worlds.split(","):
            run(world, seed, options.out, wanted)


def run(name: str, seed: int, out: Path, wanted: list[str] | None) -> None:
    """All methods in one world of one seed."""
    recipe, records = mid_recipe(seed, *WORLDS[name]), out / "records.jsonl"
    # A record counts only for the recipe that made it.
    stamp = f"{recipe.reference_key} {recipe.world.fingerprint}"
    base, reference = prepare(recipe, default_cache())
    (out / "work").mkdir(exist_ok=True)
    bench = Bench(recipe, base, reference, out / "work")
    for row, ladder in rows():
        lines = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
        known = {(each["method"], json.dumps(each["setting"])) for each in lines if each["stamp"] == stamp}
        if (row.method, json.dumps(row.hyperparameters)) in known or (wanted is not None and row.method not in wanted):
            continue
        if row.method not in ("reference (SFT)", "AdamW"):
            bench = at_rate(bench, learning_rate([line for line in lines if line["seed"] == seed]))
            bench.policy()  # not part of anyone's time
        if row.method in ("self-rehearsal", "replay"):
            beside(reference, row.hyperparameters["source"], seed)
        points = list(_points(bench, row, ladder))
        line = {"world": name, "seed": seed, "method": row.method, "setting": row.hyperparameters, "stamp": stamp}
        line["lr"] = row.hyperparameters.get("lr", bench.settings.lr)
        with records.open("a") as stream:
            stream.write(json.dumps(line | {"points": points}) + "\n")
        best = max(points, key=lambda point: point["reward"])
        print(f"{name} {seed} {row.key} at {time.process_time():.0f} CPU s: {best}", flush=True)


def at_rate(bench: Bench, lr: float) -> Bench:
    """The same bench with another learning rate of AdamW's."""
    if bench.plain.lr == lr:
        return bench
    other = replace(bench, plain=DPOSettings(lr=lr))
    other.__dict__["pairs"] = bench.pairs  # a cached property; the reference's own answers take long
    return other


def learning_rate(lines: list[dict[str, Any]]) -> float:
    """The smallest at which AdamW comes within two points of its highest reward in ``polite``."""
    found = {
        line["lr"]: line["points"][0]["reward"]
        for line in lines
        if line["world"] == "polite" and line["method"] == "AdamW" and line["lr"] in RATES
    }
    if set(found) != set(RATES):
        raise SystemExit("the learning rate is found on AdamW in polite: run --worlds polite --methods AdamW first")
    return min(lr for lr, reward in found.items() if reward >= max(found.values()) - CLOSE)


def rows() -> Iterator[tuple[Row, tuple[float, ...]]]:
    """What is run in a world, and the ladder of each: what matters most first."""
    yield Row("reference (SFT)", "control", methods._reference), ()
    for lr in RATES:
        yield Row("AdamW", "control", adamw, {"lr": lr}), ()
    yield Row("scaled back", "offline", cures.scaled_back), LADDER
    for weight in (1.0, 3.0):
        yield Row("Fisher gate", "offline", cures.gated, {"weight": weight}), GATED
    for source in ("raw-fragments", "real data", "prompt-model"):
        method = "replay" if source == "real data" else "self-rehearsal"
        yield Row(method, "joint", rehearsed, {"source": source}), LADDER
    yield Row("TIES", "offline", methods._offline, {"merge": "ties", "weight": 0.7, "density": 0.7}), LADDER
    yield Row("EMA", "regularisation", methods._average, {"decay": 0.02}), LADDER
    for lr in BETWEEN:
        yield Row("AdamW", "control", adamw, {"lr": lr}), ()


def adamw(bench: Bench, row: Row) -> Made:
    """Plain AdamW; its policy is kept for whoever starts from it."""
    model, policy = bench.model(), at_rate(bench, row.hyperparameters["lr"]).policy()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(policy[name])
    yield row.method, {}, model


@functools.cache
def beside(reference: Path, source: str, seed: int) -> tuple[Replay, float]:
    """What is rehearsed, and the CPU seconds of making it.

    Made once for the three worlds, which share the reference and the questions of their pairs; ``polite`` says which
    prompts are left out.
    """
    before, world = time.process_time(), mid_recipe(seed).world
    if source == "real data":
        found = real_replay(world, seed)
    else:
        found = self_rehearsal(load_model(reference), world, source, seed)
    return found, time.process_time() - before


def rehearsed(bench: Bench, row: Row) -> Made:
    """`paretune.demo.cures.rehearsed` with what is rehearsed made beforehand."""
    replay, sampling = beside(bench.reference, row.hyperparameters["source"], bench.seed)
    model = bench.model()
    for _ in align(
        model, bench.pairs, replace(bench.settings, steps=cures.TWICE * bench.settings.steps), beside=replay
    ):
        pass
    yield row.method, {"sampling_seconds": round(sampling, 2), "rehearsed": len(replay.ids)}, model


if __name__ == "__main__":
    main()
