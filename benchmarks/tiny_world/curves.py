"""How density, pull, every and β move reward and skills on the tiny world, beside AdamW over learning rates.

    python benchmarks/tiny_world/curves.py [--seeds 0,1,2] [--out benchmarks/tiny_world]

Small versions of Figures 2-4 and Table 2 of arXiv 2405.17931. Every setting is one alignment run of the demo's DPO on
the demo's models, measured by the demo's reward and skills. Resumable: a finished run is a line of curves.jsonl.
Writes curves.jsonl, curves.md and curves.png; docs/choosing.md shows them.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import paretune as pt
from paretune.demo.align import DPOSettings, PairTensors, adamw, align
from paretune.demo.measure import measure
from paretune.demo.pretrain import Recipe, default_cache, load_model, prepare
from paretune.demo.world import World

LR = DPOSettings().lr
Setting = dict[str, Any]


def settings() -> Iterator[tuple[str, Setting]]:
    """(curve, setting) of every run. ``density`` without ``rescale`` makes AdamW at density·lr the control."""
    for factor in (0.07, 0.15, 0.35, 0.5, 0.7, 1.0):
        yield "AdamW: learning rate", {"optimizer": "adamw", "lr": factor * LR}
    for density in (0.15, 0.35, 0.5, 0.7):
        yield "OnDARE: density", {"optimizer": "ondare", "density": density, "pull": 0.02}
    yield (
        "OnDARE, rescaled: density",
        {"optimizer": "ondare", "density": 0.5, "pull": 0.02, "rescale": "expectation"},
    )
    for density in (0.02, 0.05, 0.1, 0.2):
        yield "OnTIES: density", {"optimizer": "onties", "density": density, "pull": 0.02}
    for pull in (0.0, 0.04, 0.12, 0.25, 0.4):
        yield "OnDARE: pull", {"optimizer": "ondare", "density": 0.5, "pull": pull}
        yield "OnTIES: pull", {"optimizer": "onties", "density": 0.2, "pull": pull}
    for every in (1, 5, 20, 80):
        yield "OnDARE: every", {"optimizer": "ondare", "density": 0.5, "pull": 0.02, "every": every}
        yield "OnTIES: every", {"optimizer": "onties", "density": 0.2, "pull": 0.02, "every": every}
    for beta in (0.05, 0.25, 0.5, 2.0):
        yield "AdamW: beta", {"optimizer": "adamw", "lr": LR, "beta": beta}
        yield "OnDARE: beta", {"optimizer": "ondare", "density": 0.5, "pull": 0.02, "beta": beta}


def factory(setting: Setting, tau: pt.TaskVector) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer factory of one setting."""
    if setting["optimizer"] == "adamw":
        return adamw
    kind = pt.OnDARE if setting["optimizer"] == "ondare" else pt.OnTIES
    options = {k: v for k, v in setting.items() if k in ("density", "pull", "every", "rescale")}

    def make(named: Any, run: DPOSettings) -> torch.optim.Optimizer:
        return kind(named, tau, lr=run.lr, betas=run.betas, total_steps=run.steps, seed=run.seed, **options)

    return make


def run(setting: Setting, seed: int, base: Path, reference: Path, recipe: Recipe) -> dict[str, float]:
    """Align from the reference and measure."""
    torch.manual_seed(seed)
    model = load_model(reference)
    pairs = PairTensors.encode(recipe.world.preferences).with_reference(model)
    options = {k: v for k, v in setting.items() if k in ("lr", "beta")}
    tau = pt.TaskVector.between(base=base, reference=reference)
    for _ in align(model, pairs, replace(DPOSettings(seed=seed), **options), factory(setting, tau)):
        pass
    return scores(model, recipe.world)


def scores(model: Any, world: World) -> dict[str, float]:
    """Mean sampled reward and mean of the skills' categories, in points of 100."""
    found = measure(model, world)
    by_category: dict[str, list[bool]] = {}
    for item, solved in zip(world.items, found.solved, strict=True):
        by_category.setdefault(item.category, []).append(solved)
    skills = statistics.mean(statistics.mean(solved) for solved in by_category.values())
    return {"reward": 100 * statistics.mean(found.rewards), "skills": 100 * skills}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    logging.getLogger("paretune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    records = options.out / "curves.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    finished = {(line["seed"], json.dumps(line["setting"], sort_keys=True)) for line in lines}
    for seed in map(int, options.seeds.split(",")):
        recipe = Recipe(World(seed=seed))
        base, reference = prepare(recipe, default_cache(), lambda name: lambda done, steps: None)
        jobs = [("reference", {"optimizer": "none"}), *settings()]
        for number, (curve, setting) in enumerate(jobs):
            if (seed, json.dumps(setting, sort_keys=True)) in finished:
                continue
            if setting["optimizer"] == "none":
                found = scores(load_model(reference), recipe.world)
            else:
                found = run(setting, seed, base, reference, recipe)
            finished.add((seed, json.dumps(setting, sort_keys=True)))
            lines.append({"seed": seed, "curve": curve, "setting": setting, **found})
            with records.open("a") as stream:
                stream.write(json.dumps(lines[-1]) + "\n")
            print(f"seed {seed}: {number + 1}/{len(jobs)} {curve} {setting} {found}", flush=True)
    (options.out / "curves.md").write_text(table(lines))
    draw(lines, options.out / "curves.png")


def means(lines: list[dict[str, Any]]) -> dict[str, tuple[float, float, float, float]]:
    """By setting: mean reward, its spread over seeds (standard deviation), mean skills, its spread."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps(line["setting"], sort_keys=True), []).append(line)
    found = {}
    for key, group in groups.items():
        r, s = [line["reward"] for line in group], [line["skills"] for line in group]
        spread = statistics.stdev if len(group) > 1 else lambda _: 0.0
        found[key] = (statistics.mean(r), spread(r), statistics.mean(s), spread(s))
    return found


def skills_of_adamw_at(reward: float, lines: list[dict[str, Any]]) -> float | None:
    """Skills that AdamW's curve over learning rates has at this reward; None beyond its ends."""
    mean = means(lines)
    keys = [json.dumps(s, sort_keys=True) for curve, s in settings() if curve == "AdamW: learning rate"]
    keys.insert(0, json.dumps({"optimizer": "none"}))
    points = [(mean[key][0], mean[key][2]) for key in keys if key in mean]
    for (r0, s0), (r1, s1) in pairwise(points):
        if min(r0, r1) <= reward <= max(r0, r1) and r0 != r1:
            return s0 + (s1 - s0) * (reward - r0) / (r1 - r0)
    return None


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a table for each curve, each point beside AdamW's skills at the same reward."""
    mean = means(lines)
    r, _, s, _ = mean[json.dumps({"optimizer": "none"})]
    seeds = sorted({line["seed"] for line in lines})
    out = [f"Seeds {', '.join(map(str, seeds))}; points of 100, mean ± standard deviation over seeds.",
           f"Reference: reward {r:.1f}, skills {s:.1f}."]  # fmt: skip
    for curve in dict.fromkeys(name for name, _ in settings()):
        out += [
            "",
            f"### {curve}",
            "",
            "| setting | reward | skills | AdamW's skills at that reward |",
            "|---|---|---|---|",
        ]
        for name, setting in settings():
            key = json.dumps(setting, sort_keys=True)
            if name != curve or key not in mean:
                continue
            reward, dr, skills, ds = mean[key]
            control = skills_of_adamw_at(reward, lines)
            text = ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}"
                             for k, v in setting.items() if k != "optimizer")  # fmt: skip
            beside = "beyond its curve" if control is None else f"{control:.1f}"
            out.append(f"| {text} | {reward:.1f} ± {dr:.1f} | {skills:.1f} ± {ds:.1f} | {beside} |")
    return "\n".join(out) + "\n"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Reward against skills: one panel for each knob, AdamW's learning-rate curve in all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mean = means(lines)
    panels = {"density": "density", "pull": "pull", "every": "every", "beta": "β"}
    figure, axes = plt.subplots(1, 4, figsize=(15, 4), sharey=True, layout="constrained")
    for axis, (knob, title) in zip(axes, panels.items(), strict=True):
        curves = [
            "AdamW: learning rate",
            *(c for c in dict.fromkeys(n for n, _ in settings()) if c.endswith(f": {knob}")),
        ]
        colours = ["#555555", "#0072B2", "#D55E00", "#009E73"]
        for curve, colour, marker in zip(curves, colours, "sovD", strict=False):
            points = [(*mean[json.dumps(s, sort_keys=True)], s) for name, s in settings() if name == curve]
            axis.errorbar([p[0] for p in points], [p[2] for p in points], xerr=[p[1] for p in points],
                          yerr=[p[3] for p in points], color=colour, marker=marker, ms=4, lw=1, elinewidth=0.4,
                          label=curve.split(":")[0] + (" over lr" if curve.startswith("AdamW: l") else ""))  # fmt: skip
            for x, _, y, _, setting in points:
                if curve != curves[0]:
                    axis.annotate(f"{setting[knob]:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axis.set(title=title, xlabel="sampled reward")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("skills")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
