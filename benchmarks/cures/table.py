"""Tables from records.jsonl: skills at equal reward, by world and seed, and what share of AdamW's tax is removed.

python benchmarks/cures/table.py [--reward 85] [--records benchmarks/cures/records.jsonl]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from paretune.demo.scores import best_at

Curve = list[tuple[float, float]]


def curves(lines: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Curve]]:
    """(world, seed) -> method with its setting -> [(reward, skills)], the reference first."""
    found: dict[tuple[str, int], dict[str, Curve]] = {}
    for line in lines:
        own = found.setdefault((line["world"], line["seed"]), {})
        points = [(point["reward"], point["skills"]) for point in line["points"]]
        if line["method"] == "AdamW":
            own.setdefault("AdamW over lr", []).extend(points)
        else:
            named = [str(value) for key, value in line["setting"].items() if key not in ("merge", "density", "decay")]
            own[" ".join([line["method"], *named])] = points
    for own in found.values():
        reference = own.pop("reference (SFT)", [])
        for name in own:
            own[name] = [*reference, *own[name]]
        own["reference"] = reference
    return found


def at(curve: Curve, reward: float) -> float | None:
    """Skills where the curve reaches a reward."""
    return best_at(reward, curve) if curve else None


def interval(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """Middle 95% of the means of resampled seeds."""
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[draws // 40], means[-draws // 40 - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", type=float, default=85.0, help="in points of 100; less where AdamW reaches less")
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records.jsonl")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.records.read_text().splitlines()]
    everything = curves(lines)
    for world in dict.fromkeys(name for name, _ in everything):
        seeds = sorted(seed for name, seed in everything if name == world)
        print("\n".join(table(world, {seed: everything[world, seed] for seed in seeds}, options.reward)) + "\n")
    print("\n".join(ratios(lines)))
    print("\n".join(costs(lines)))


def table(world: str, by_seed: dict[int, dict[str, Curve]], wanted: float) -> list[str]:
    """One world's methods at equal reward."""
    # A reward that AdamW reaches: a world in which it stays short is read where it comes to.
    level = {seed: min(wanted, max(r for r, _ in own["AdamW over lr"])) for seed, own in by_seed.items()}
    names = list(dict.fromkeys(name for own in by_seed.values() for name in own))
    out = [f"### {world}", "", "sampled reward " + ", ".join(f"{r:.1f} (seed {s})" for s, r in level.items()), ""]
    out += [f"| method | {' | '.join(f'seed {seed}' for seed in by_seed)} | mean | AdamW's tax removed |",
            "|---" * (len(by_seed) + 3) + "|"]  # fmt: skip
    for name in names:
        cells, kept, shares = [], [], []
        for seed, own in by_seed.items():
            value = own[name][0][1] if name == "reference" and own[name] else at(own.get(name, []), level[seed])
            cells.append("X" if value is None else f"{value:.1f}")
            whole = own["reference"][0][1]
            paid = whole - (at(own["AdamW over lr"], level[seed]) or 0.0)
            if value is not None:
                kept.append(value)
                if paid > 5:
                    shares.append(1 - (whole - value) / paid)
        mean = f"{statistics.mean(kept):.1f}" if kept else ""
        removed = ""
        if name not in ("reference", "AdamW over lr") and shares:
            low, high = interval(shares)
            removed = f"{statistics.mean(shares):.2f} [{low:.2f}, {high:.2f}] ({len(shares)} seeds)"
        out.append(f"| {name} | {' | '.join(cells)} | {mean} | {removed} |")
    return out


def ratios(lines: list[dict[str, Any]]) -> list[str]:
    """The gate's warning sign by world."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if line["method"] == "Fisher gate" and line["setting"] == {"weight": 1.0}:
            found.setdefault(line["world"], []).append(f"{line['points'][0]['ratio']:.2f}")
    return ["ΣF_s/ΣF_p: " + "; ".join(f"{world} {', '.join(values)}" for world, values in found.items())]


def costs(lines: list[dict[str, Any]]) -> list[str]:
    """Seconds of each method over those of a plain run of the same world and seed."""
    plain = {(line["world"], line["seed"]): line["points"][0]["seconds"] for line in lines if line["method"] == "AdamW"}
    found: dict[str, list[float]] = {}
    for line in lines:
        if (line["world"], line["seed"]) in plain and line["method"] in ("Fisher gate", "self-rehearsal", "replay"):
            key = " ".join([line["method"], *(str(value) for value in line["setting"].values())])
            share = line["points"][0]["seconds"] / plain[line["world"], line["seed"]]
            found.setdefault(key, []).append(share)
    return ["CPU seconds ÷ plain DPO: " + "; ".join(f"{k} {statistics.mean(v):.2f}" for k, v in found.items())]


if __name__ == "__main__":
    main()
