"""Does adaptive averaging beat uniform averaging at equal reward? Measured on the tiny world.

    python benchmarks/averaging/tiny_world.py [--seeds 0,1,2] [--out runs/averaging]

For each seed: reference and policy of the demo, the policy's best-of-8 samples, then for each mean ratio the uniform
average (MA) and the adaptive one (AMA, both parametrisations), all measured on the same prompts and exercises. A
finished point is a line of OUT/points.jsonl, so that a run goes on; the summary is printed and written to
OUT/summary.json: what the best adaptive average has more of capability than the best uniform one at equal reward, with
95% intervals over items and seeds. The column "above uniform" compares each point with the uniform curve's best at no
less reward; where the policy is over-optimised it is low for every small ratio, uniform ones too.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from paretune.averaging import Ratios
from paretune.demo.adaptive import best_samples, dial, end_points, learned
from paretune.demo.measure import measure
from paretune.demo.methods import Bench
from paretune.demo.pretrain import Recipe, default_cache, prepare
from paretune.demo.scores import above_curve, best_at, interval, score
from paretune.demo.world import World

MEANS = [round(0.1 * i, 1) for i in range(11)]
CURVES = ("uniform", "adaptive, projection", "adaptive, sigmoid")


def points(bench: Bench, finished: set[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """Every point of one seed that is not there yet."""
    ends = end_points(bench)
    model = bench.model()
    for curve in CURVES:
        for mean in MEANS:
            if (curve, mean) in finished or (curve != "uniform" and mean in (0.0, 1.0)):
                continue  # means of 0 and 1 leave nothing to learn
            if curve == "uniform":
                ratios = Ratios.by_hand(ends.shapes, ratios=[mean], tied=ends.tied)
            else:
                ratios = learned(bench, model, mean, curve.split(", ")[1])
            dial(model, ends, ratios)
            found = measure(model, bench.recipe.world)  # type: ignore[arg-type]
            yield {
                "seed": bench.seed,
                "curve": curve,
                "mean": mean,
                "ratios": list(ratios.ratios),
                "rewards": found.rewards,
                "solved": found.solved,
                "categories": [item.category for item in bench.recipe.world.items],
            }


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Reward and capability of every point, and adaptive against uniform at equal reward."""
    seeds = sorted({line["seed"] for line in lines})
    by_place = {(line["seed"], line["curve"], line["mean"]): line for line in lines}
    names = [(curve, mean) for curve in CURVES for mean in MEANS if (seeds[0], curve, mean) in by_place]
    table = [[by_place[seed, curve, mean] for curve, mean in names] for seed in seeds]
    scores = score(
        [[line["rewards"] for line in row] for row in table],
        [[line["solved"] for line in row] for row in table],
        [row[0]["categories"] for row in table],
    )
    uniform = [i for i, (curve, _) in enumerate(names) if curve == "uniform"]
    found: dict[str, Any] = {"seeds": seeds, "points": [], "adaptive minus uniform at equal reward": {}}
    for i, (curve, mean) in enumerate(names):
        compared = None if curve == "uniform" else above_curve(scores, i, uniform)
        found["points"].append(
            {
                "curve": curve,
                "mean": mean,
                "reward": float(scores.reward[i]),
                "reward_ci": interval(scores.reward_draws[i]),
                "capability": float(scores.capability[i]),
                "capability_ci": interval(scores.capability_draws[i]),
                "above_uniform": None if compared is None else compared[0],
                "above_uniform_ci": None if compared is None else compared[1],
                "ratios": [by_place[seed, curve, mean]["ratios"] for seed in seeds],
            }
        )
    for curve in CURVES[1:]:
        ends = [i for i in uniform if names[i][1] in (0.0, 1.0)]
        own = sorted([*ends, *(i for i, (name, _) in enumerate(names) if name == curve)], key=lambda i: names[i][1])
        found["adaptive minus uniform at equal reward"][curve] = between(scores, own, uniform)
    return found


def between(scores: Any, curve: list[int], control: list[int], grid: int = 9) -> dict[str, Any]:
    """The best capability of a curve minus a control curve's, at rewards that both reach: each at its own best ratio.

    Args:
        scores: of all points.
        curve, control: their points in order.
        grid: rewards between the largest least reward and the least largest one, ends excluded.
    """
    lowest = max(min(scores.reward[i] for i in members) for members in (curve, control))
    highest = min(max(scores.reward[i] for i in members) for members in (curve, control))
    rewards = numpy.linspace(lowest, highest, grid + 2)[1:-1]

    def gaps(reward: Any, capability: Any) -> list[float]:
        curves = [[(reward[i], capability[i]) for i in members] for members in (curve, control)]
        reached = [[best_at(r, points) for r in rewards] for points in curves]
        # In a bootstrap draw a curve may end short of a reward: then its end counts.
        best = [[max(p)[1] if c is None else c for c in row] for row, p in zip(reached, curves, strict=True)]
        return [a - b for a, b in zip(*best, strict=True)]

    draws = [
        gaps(scores.reward_draws[:, d], scores.capability_draws[:, d]) for d in range(scores.reward_draws.shape[1])
    ]
    each = gaps(scores.reward, scores.capability)
    return {
        "rewards": rewards.tolist(),
        "capability": each,
        "capability_ci": [interval(column) for column in numpy.asarray(draws).T],
        "mean": float(numpy.mean(each)),
        "mean_ci": interval(numpy.mean(draws, 1)),
    }


def text(found: dict[str, Any]) -> str:
    """A table, in points of 100."""
    lines = [
        f"Seeds {', '.join(map(str, found['seeds']))}; points of 100 with 95% intervals.",
        "",
        "| curve | mean | reward | capability | above uniform at equal reward |",
        "|---|---|---|---|---|",
    ]
    for point in found["points"]:
        above = "" if point["above_uniform"] is None else f"{100 * point['above_uniform']:+.1f}"
        bounds = "" if not above else f" [{', '.join(f'{100 * b:.1f}' for b in point['above_uniform_ci'])}]"
        lines.append(
            f"| {point['curve']} | {point['mean']:g} | {100 * point['reward']:.1f} | "
            f"{100 * point['capability']:.1f} | {above}{bounds} |"
        )
    for curve, gap in found["adaptive minus uniform at equal reward"].items():
        low, high = (100 * bound for bound in gap["mean_ci"])
        said = "better" if low > 0 else "worse" if high < 0 else "within noise"
        first, last = (100 * gap["rewards"][i] for i in (0, -1))
        lines.append(
            f"\n{curve} against uniform, each at its own best ratio, mean over rewards {first:.0f} to {last:.0f}: "
            f"{100 * gap['mean']:+.2f} [{low:.2f}, {high:.2f}] points of capability: {said}."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/averaging"))
    options = parser.parse_args()
    logging.getLogger("paretune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    records = options.out / "points.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    for seed in map(int, options.seeds.split(",")):
        recipe = Recipe(World(seed=seed))
        base, reference = prepare(recipe, default_cache(), lambda name: lambda done, steps: None)
        bench = Bench(recipe, base, reference, options.out)
        finished = {(line["curve"], line["mean"]) for line in lines if line["seed"] == seed}
        for line in points(bench, finished):
            with records.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            lines.append(line)
            mean_reward = sum(line["rewards"]) / len(line["rewards"])
            shown = ", ".join(f"{ratio:.2f}" for ratio in line["ratios"])
            print(f"seed {seed}: {line['curve']} {line['mean']:g} ({shown}): reward {mean_reward:.3f}", flush=True)
        print(f"seed {seed}: {len(best_samples(bench))} samples", flush=True)
    found = summary(lines)
    (options.out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "summary.md").write_text(text(found))
    print(text(found))


if __name__ == "__main__":
    main()
