"""What self-rehearsal costs: its parts in CPU seconds, and their sum over a plain run's.

    python benchmarks/cures/cost.py [--seed 4] [--repeats 3]          the tiny world's own loop, as in run.py
    python benchmarks/cures/cost.py --library                         paretune train joint ÷ paretune train dpo

One thread; medians of the repeats, in which all runs take turns. With ``--library`` both are whole commands on the same
model and pairs: what starting Python and importing TRL cost is measured too, and left out of the second ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from paretune.demo import cures, rehearse
from paretune.demo.align import Beside, DPOSettings, align
from paretune.demo.changed import world_named
from paretune.demo.methods import Bench
from paretune.demo.pretrain import default_cache, prepare

SOURCES = ("raw-fragments", "prompt-model")
Seconds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--library", action="store_true", help="whole commands in place of the tiny world's loop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe, settings = world_named("standard", options.seed)
    base, reference = prepare(recipe, default_cache())
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(recipe, base, reference, Path(work), settings)
        if options.library:
            library(bench, options.repeats)
        else:
            loop(bench, options.repeats)


def loop(bench: Bench, repeats: int) -> None:
    """The tiny world's own loop."""
    plain = Seconds()
    _ = bench.pairs  # encoded before anything is timed
    parts: dict[str, Seconds] = {source: {} for source in SOURCES}
    twice = replace(bench.settings, steps=cures.TWICE * bench.settings.steps)
    model: Any = bench.model()
    world, seed = bench.recipe.world, bench.seed
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first paid for imports and caches
            plain.clear()
            parts = {source: {} for source in SOURCES}
        timed(plain, "run", aligned, bench, bench.settings)
        for source, into in parts.items():
            prompts = timed(into, "prompts", rehearse.own_prompts, model, world, source, seed)
            dialogues = timed(into, "answers", rehearse.own_answers, model, prompts, seed)
            beside = timed(into, "teacher", rehearse.distilled, model, dialogues, seed)
            timed(into, "steps", aligned, bench, twice, beside)
    unit = statistics.median(plain["run"])
    print(f"plain DPO: {unit:.2f} s")
    for source, into in parts.items():
        each = {name: statistics.median(values) for name, values in into.items()}
        whole = statistics.median([sum(run) for run in zip(*into.values(), strict=True)])
        shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in each.items())
        print(f"{source}: {shown}; together {whole:.2f} s = {whole / unit:.2f} plain runs")


def aligned(bench: Bench, settings: DPOSettings, beside: Beside | None = None) -> None:
    """One run from the reference's file on."""
    for _ in align(bench.model(), bench.pairs, settings, beside=beside):
        pass


def timed(into: Seconds, name: str, run: Callable[..., Any], *given: Any) -> Any:
    """What ``run`` returns; its CPU seconds are added to ``into``."""
    before = time.process_time()
    found = run(*given)
    into.setdefault(name, []).append(time.process_time() - before)
    return found


def library(bench: Bench, repeats: int) -> None:
    """Whole commands, with the settings of the tiny world's loop."""
    work, settings = bench.out, bench.settings
    pairs = work / "pairs.jsonl"
    rows = [{"prompt": [_turn("user", pair.prompt)], "chosen": [_turn("assistant", pair.chosen)],
             "rejected": [_turn("assistant", pair.rejected)]} for pair in bench.recipe.world.preferences]  # fmt: skip
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seeds = work / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in rehearse.seed_prompts(bench.recipe.world)))
    shared = [
        "--model_name_or_path", str(bench.reference), "--per_device_train_batch_size", str(settings.batch),
        "--learning_rate", str(settings.lr), "--lr_scheduler_type", "cosine", "--adam_beta2", str(settings.betas[1]),
        "--beta", str(settings.beta), "--max_length", "64", "--save_strategy", "no", "--disable_tqdm", "true",
        "--seed", str(bench.seed), "--report_to", "none",
    ]  # fmt: skip
    steps = cures.TWICE * settings.steps
    joint = [
        "train", "joint", *shared, "--preference_dataset", str(pairs), "--max_steps", str(steps), "--rehearse", "auto",
        "--rehearse_count", str(rehearse.PROMPTS), "--rehearse_max_new_tokens", "24", "--sft_batch_size",
        str(rehearse.ROWS),
    ]  # fmt: skip
    commands = {
        "imports": [sys.executable, "-c", "import torch, transformers, datasets; from trl import DPOTrainer"],
        "dpo": [*_PARETUNE, "train", "dpo", *shared, "--dataset_name", str(pairs), "--max_steps", str(settings.steps)],
        SOURCES[0]: [*_PARETUNE, *joint],
        SOURCES[1]: [*_PARETUNE, *joint, "--rehearse_seeds", str(seeds)],
    }
    found: Seconds = {}
    for repeat in range(repeats):
        for name, command in commands.items():
            out = work / f"{name}-{repeat}"
            extra = [] if name == "imports" else ["--output_dir", str(out)]
            # Reference log-probabilities are kept between runs otherwise.
            environment = {**os.environ, "XDG_CACHE_HOME": str(out / "cache")}
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([*command, *extra], check=True, env=environment, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.setdefault(name, []).append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    each = {name: statistics.median(values) for name, values in found.items()}
    print("; ".join(f"{name} {seconds:.1f} s" for name, seconds in each.items()))
    for source in SOURCES:
        whole, trained = each[source] / each["dpo"], (each[source] - each["imports"]) / (each["dpo"] - each["imports"])
        print(f"{source}: {whole:.2f} plain commands, {trained:.2f} without imports")


_PARETUNE = [sys.executable, "-c", "import sys; from paretune.cli.main import main; sys.exit(main())"]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


if __name__ == "__main__":
    main()
