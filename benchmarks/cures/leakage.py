"""What rehearsal of the preferences' own prompts does, and what the policy's margins show of it.

    python benchmarks/cures/leakage.py [--seeds 4,5]

Exercises are prompts that SFT had; "guarded" leaves out those that `paretune.Leakage` finds. One line a run: reward,
and σ of the mean margin and the share of pairs ranked right over the last quarter of the preference steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import paretune as pt
from paretune.demo import align as alignment
from paretune.demo import cures
from paretune.demo.changed import world_named
from paretune.demo.measure import measure
from paretune.demo.methods import Bench
from paretune.demo.pretrain import default_cache, prepare
from paretune.demo.rehearse import distilled, own_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="4,5")
    torch.set_num_threads(1)
    for seed in map(int, parser.parse_args().seeds.split(",")):
        recipe, settings = world_named("standard", seed)
        base, reference = prepare(recipe, default_cache())
        with tempfile.TemporaryDirectory() as work:
            bench = Bench(recipe, base, reference, Path(work), settings)
            for name, prompts, temperature in cases(bench):
                run(bench, name, prompts, temperature)


def cases(bench: Bench) -> list[tuple[str, list[str], float]]:
    """Name, rehearsed prompts, temperature of their answers."""
    world = bench.recipe.world
    preferences = sorted({pair.prompt for pair in world.preferences})
    exercises = list(dict.fromkeys(turns[0]["content"] for turns in islice(world.dialogues("prompts"), 2000)))
    leaks = pt.Leakage(preferences)
    return [
        ("no rehearsal", [], 0.0),
        ("preference prompts, greedy", preferences, 0.0),
        ("preference prompts, temperature 1", preferences, 1.0),
        ("preference prompts and exercises, greedy", list(dict.fromkeys([*preferences, *exercises])), 0.0),
        ("guarded, greedy", [prompt for prompt in exercises if not leaks(prompt)], 0.0),
    ]


def run(bench: Bench, name: str, prompts: list[str], temperature: float) -> None:
    """Train, and print what came of it."""
    model: Any = bench.model()
    settings, beside = bench.settings, None
    if prompts:
        settings = replace(settings, steps=cures.TWICE * settings.steps)
        beside = distilled(model, own_answers(model, prompts, bench.seed, temperature=temperature), bench.seed)
    seen: list[torch.Tensor] = []
    loss = alignment.dpo_loss

    def watched(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float) -> torch.Tensor:
        ratios = (logps - ref_logps).detach()
        seen.append(beta * (ratios[:, 0] - ratios[:, 1]))
        return loss(logps, ref_logps, beta)

    alignment.dpo_loss = watched
    try:
        for _ in alignment.align(model, bench.pairs, settings, beside=beside):
            pass
    finally:
        alignment.dpo_loss = loss
    late = torch.stack(seen[-(len(seen) // 4) :])
    reward = statistics.mean(measure(model, bench.recipe.world).rewards)
    print(
        f"seed {bench.seed}, {name}: {len(prompts)} prompts, reward {100 * reward:.1f}, σ(margin) "
        f"{late.mean().sigmoid():.2f}, ranked right {(late > 0).float().mean():.0%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
