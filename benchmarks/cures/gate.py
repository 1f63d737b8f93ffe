"""The Fisher gate as learning rates, against the gate after training.

    python benchmarks/cures/gate.py train --worlds known,standard --seeds 4,5,6
    python benchmarks/cures/gate.py table     # beside the gate after training, of records.jsonl

``train`` appends to gate_records.jsonl; what is there is not made again. One process, one thread. What gate and dial
cost is measured by gate_cost.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import run as cures_run
import table as cures_table
import torch

from paretune.demo import cures
from paretune.demo.align import align
from paretune.demo.methods import LR, Bench, Made, Row

HERE = Path(__file__).parent
GATES: tuple[dict[str, Any], ...] = ({"weight": 1.0}, {"weight": 3.0}, {"weight": 1.0, "mode": "tensors"})
FACTORS = (0.5, 1.0, 2.0)  # of the learning rate, at the end of which the dial goes on


def trained(bench: Bench, row: Row) -> Made:
    """DPO by AdamW with the gate's factors as learning rates, of mean 1."""
    from dataclasses import replace

    from paretune.optim import OnDARE

    options = row.hyperparameters
    gate = cures.fisher_gate(bench, options["weight"], options.get("mode", "entries"))
    rates, settings = gate.learning_rates(), replace(bench.settings, lr=options["lr"])

    def optimizer(named: Any, run: Any) -> torch.optim.Optimizer:
        return OnDARE(named, None, lr=run.lr, betas=run.betas, density=1.0, weight=0.0, learning_rates=rates)

    model = bench.model()
    for _ in align(model, bench.pairs, settings, optimizer):
        pass
    yield row.method, {"ratio": round(gate.ratio, 2), "refused": not gate.trusted}, model


def rows() -> Iterator[tuple[Row, tuple[float, ...]]]:
    """Each gate at each learning rate, and its ladder."""
    for options in GATES:
        for factor in FACTORS:
            setting = {**options, "lr": round(factor * LR, 9)}
            yield Row("gate as learning rates", "online", trained, setting), cures_run.LADDER


def train(options: argparse.Namespace) -> None:
    cures_run.rows = rows
    logging.getLogger("paretune").setLevel(logging.WARNING)
    for seed in map(int, options.seeds.split(",")):
        for world in options.worlds.split(","):
            cures_run.run(world, seed, options.out / "gate_records.jsonl", None)


def table(options: argparse.Namespace) -> None:
    """Skills where each curve reaches the most reward that AdamW reaches, and where it reaches 95."""
    files = (HERE / "records.jsonl", *options.records, options.out / "gate_records.jsonl")
    lines = {}
    for file in files:
        for text in file.read_text().splitlines() if file.exists() else ():
            line = json.loads(text)
            lines[line["world"], line["seed"], line["method"], json.dumps(line["setting"])] = line
    everything = cures_table.curves(list(lines.values()))
    done = [key for key, own in everything.items() if "AdamW over lr" in own and any("rates" in name for name in own)]
    wanted = {key: max(reward for reward, _ in everything[key]["AdamW over lr"]) for key in done}
    print(
        "| skills at AdamW's most reward / at 95 | "
        + " | ".join(f"{w} {s} ({wanted[w, s]:.1f})" for w, s in done)
        + " |"
    )
    print("|---" * (len(done) + 1) + "|")
    for name in dict.fromkeys(name for key in done for name in everything[key]):
        cells = []
        for key in done:
            found = [cures_table.at(everything[key].get(name, []), reward) for reward in (wanted[key], 95.0)]
            cells.append(" / ".join("X" if value is None else f"{value:.1f}" for value in found))
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.add_argument("--worlds", default="known,standard")
    one.add_argument("--seeds", default="4,5,6")
    one.add_argument("--out", type=Path, default=HERE)
    one.set_defaults(run=train)
    two = commands.add_parser("table")
    two.add_argument("--records", type=Path, nargs="*", default=[], help="further files like records.jsonl")
    two.add_argument("--out", type=Path, default=HERE)
    two.set_defaults(run=table)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.run(options)


if __name__ == "__main__":
    main()
