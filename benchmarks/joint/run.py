"""What a step of joint training costs: ALRIGHT, MAXRIGHT and MIX against training on one objective, and against TRL.

A random Llama on the CPU, one thread, float32. Trainers take turns of one run each, so that a busy machine slows all
of them alike; what counts is process CPU time. The cost of a schedule is the mean over its steps of the median step
of the same kind (objective, and whether losses were measured before it); it is divided by the mean over the same
steps of the median step of training on that objective alone.

    OMP_NUM_THREADS=1 python benchmarks/joint/run.py [--rounds 6] [--steps 20] [--hidden 256] [--json]
    OMP_NUM_THREADS=1 python benchmarks/joint/run.py --memory [--hidden 256]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_step import Timer, write_world

NAMES = ("sft", "dpo", "TRL dpo", "alright", "maxright", "mix")
REFRESH = 10


def make(name: str, world: Path, output: Path, steps: int, batch: int) -> tuple[Any, Timer]:
    """One trainer on its own copy of the model."""
    import trl
    from datasets import load_dataset

    import paretune as pt

    timer = Timer()
    config = trl.DPOConfig(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=batch, disable_tqdm=True, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", precompute_ref_log_probs=True,
    )  # fmt: skip
    pairs = load_dataset("json", data_files=str(world / "pairs.jsonl"), split="train")
    path = str(world / "reference")
    if name == "TRL dpo":
        return trl.DPOTrainer(model=path, args=config, train_dataset=pairs, callbacks=[timer]), timer
    chats = pairs.rename_column("chosen", "completion").remove_columns("rejected")
    objectives: dict[str, Any] = {"sft": pt.SFT(chats), "dpo": pt.DPO(pairs, cache_dir=world / "references")}
    weights = {"sft": 0.5, "dpo": 0.5}
    schedules: dict[str, Any] = {
        "alright": pt.Alright(weights), "maxright": pt.MaxRight({"sft": 0.1, "dpo": 0.9}, refresh_every=REFRESH),
        "mix": pt.Mix(weights),
    }  # fmt: skip
    chosen = {name: objectives[name]} if name in objectives else objectives
    trainer = pt.JointTrainer(path, config, objectives=chosen, schedule=schedules.get(name), callbacks=[timer])
    return trainer, timer


def measure(arguments: argparse.Namespace, world: Path) -> dict[str, Any]:
    """Seconds and ratios."""
    made = {name: make(name, world, world / name.replace(" ", "-"), arguments.steps, arguments.batch) for name in NAMES}
    kinds: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for turn in range(arguments.rounds):
        first = turn % len(NAMES)  # nobody is always first
        for name in NAMES[first:] + NAMES[:first]:
            trainer, _ = made[name]
            trainer.train()
            for step in getattr(trainer, "steps", [])[1:]:  # the first is not timed
                refreshed = name == "maxright" and (step["step"] - 1) % REFRESH == 0
                kinds[name].append((step["objective"], refreshed))
    alone = {name: statistics.median(made[name][1].seconds) for name in ("sft", "dpo", "TRL dpo")}
    result: dict[str, Any] = {"seconds": dict(alone), "ratios": {}}
    for name in ("alright", "maxright", "mix"):
        seconds = defaultdict(list)
        for kind, value in zip(kinds[name], made[name][1].seconds, strict=True):
            seconds[kind].append(value)
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        result["seconds"][name] = statistics.mean(medians[kind] for kind in kinds[name])
        if name != "mix":
            drawn = statistics.mean(alone[objective] for objective, _ in kinds[name])
            result["ratios"][f"{name} / mean of the objectives drawn"] = result["seconds"][name] / drawn
            share = sum(objective == "dpo" for objective, _ in kinds[name]) / len(kinds[name])
            result[f"{name}: share of dpo steps"] = share
    result["ratios"]["mix / alright"] = result["seconds"]["mix"] / result["seconds"]["alright"]
    result["ratios"]["our dpo / TRL's DPOTrainer"] = alone["dpo"] / alone["TRL dpo"]
    result["parameters"] = sum(p.numel() for p in made["sft"][0].model.parameters())
    return result


def peak_memory(name: str, arguments: argparse.Namespace, world: Path) -> dict[str, int]:
    """Bytes: resident before training, and the largest while training."""
    trainer, _ = make(name, world, world / name, arguments.steps, arguments.batch)
    page = os.sysconf("SC_PAGE_SIZE")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * page
    trainer.train()
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def memory(arguments: argparse.Namespace, world: Path) -> dict[str, Any]:
    """Each trainer in a process of its own."""
    found: dict[str, Any] = {}
    for name in ("sft", "dpo", "alright", "maxright", "mix", "TRL dpo"):
        command = [sys.executable, __file__, "--one", name, "--world", str(world), "--steps", str(arguments.steps)]
        command += ["--batch", str(arguments.batch), "--hidden", str(arguments.hidden)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    dearer = max(found["sft"]["peak"], found["dpo"]["peak"])
    ratios = {
        f"{name} / dearer single objective": found[name]["peak"] / dearer for name in ("alright", "maxright", "mix")
    }
    return {"bytes": found, "ratios": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20, help="of each run")
    parser.add_argument("--batch", type=int, default=8, help="rows and pairs in a step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--world", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        world = Path(arguments.world or folder)
        if arguments.one is None:
            write_world(world, hidden=arguments.hidden)
            result = memory(arguments, world) if arguments.memory else measure(arguments, world)
        else:
            result = peak_memory(arguments.one, arguments, world)
    if arguments.json or arguments.one:
        print(json.dumps(result))
    else:
        for name, ratio in result["ratios"].items():
            print(f"{name:45} {ratio:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
