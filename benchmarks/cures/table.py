"""Tables from records.jsonl: skills at equal reward, by world and seed, and what share of AdamW's tax is removed.

python benchmarks/cures/table.py [--reward 85] [--level adamw|common] [--records benchmarks/cures/records.jsonl]

A world's reward is read per seed: --reward, or less where AdamW over its learning rates reaches less; with `--level
common` also less where self-rehearsal or real replay reach less, so that none of the three is missing.
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


def removed(taxes: list[tuple[float, float]], draws: int = 4000) -> str:
    """1 − Σ tax ÷ Σ AdamW's tax over seeds, with the middle 95% of resampled seeds; nothing where AdamW pays little."""
    if not taxes or statistics.mean(paid for _, paid in taxes) < 2:
        return ""
    rng = random.Random(0)
    whole = sorted(_share(rng.choices(taxes, k=len(taxes))) for _ in range(draws))
    low, high = whole[draws // 40], whole[-draws // 40 - 1]
    spread = f" [{low:.2f}, {high:.2f}]" if len(taxes) > 2 else ""
    return f"{_share(taxes):.2f}{spread} ({len(taxes)} seeds)"


def _share(taxes: list[tuple[float, float]]) -> float:
    paid = sum(each for _, each in taxes)
    return 1 - sum(tax for tax, _ in taxes) / paid if paid > 0 else float("-inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", type=float, default=85.0, help="in points of 100; less where AdamW reaches less")
    parser.add_argument("--level", choices=("adamw", "common"), default="adamw")
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records.jsonl")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.records.read_text().splitlines()]
    everything = curves(lines)
    for world in dict.fromkeys(name for name, _ in everything):
        seeds = sorted(seed for name, seed in everything if name == world)
        print("\n".join(table(world, {seed: everything[world, seed] for seed in seeds}, options)) + "\n")
    print("\n".join(beside_replay(everything, options.reward)) + "\n")
    print("\n".join(gate_beside_scaling(everything, lines)) + "\n")
    print("\n".join(costs(lines)))


COMPARED = ("AdamW over lr", "self-rehearsal raw-fragments", "self-rehearsal prompt-model", "replay real data")


def table(world: str, by_seed: dict[int, dict[str, Curve]], options: argparse.Namespace) -> list[str]:
    """One world's methods at equal reward."""
    # A reward that is reached: a world in which they stay short is read where they come to.
    reach = COMPARED if options.level == "common" else COMPARED[:1]
    level = {
        seed: min(options.reward, *(max(r for r, _ in own[name]) for name in reach if own.get(name)))
        for seed, own in by_seed.items()
    }
    names = list(dict.fromkeys(name for own in by_seed.values() for name in own))
    out = [f"### {world}", "", "sampled reward " + ", ".join(f"{r:.1f} (seed {s})" for s, r in level.items()), ""]
    out += [f"| method | {' | '.join(f'seed {seed}' for seed in by_seed)} | mean | AdamW's tax removed |",
            "|---" * (len(by_seed) + 3) + "|"]  # fmt: skip
    for name in names:
        cells, kept, taxes = [], [], []
        for seed, own in by_seed.items():
            value = own[name][0][1] if name == "reference" and own[name] else at(own.get(name, []), level[seed])
            cells.append("X" if value is None else f"{value:.1f}")
            whole = own["reference"][0][1]
            paid = whole - (at(own["AdamW over lr"], level[seed]) or 0.0)
            if value is not None:
                kept.append(value)
                taxes.append((whole - value, paid))
        mean = f"{statistics.mean(kept):.1f}" if kept else ""
        share = "" if name in ("reference", "AdamW over lr") else removed(taxes)
        out.append(f"| {name} | {' | '.join(cells)} | {mean} | {share} |")
    return out


def highest(own: dict[str, Curve], names: tuple[str, ...]) -> float:
    """The most reward that all of them reach."""
    return min(max(reward for reward, _ in own[name]) for name in names)


def beside_replay(everything: dict[tuple[str, int], dict[str, Curve]], wanted: float) -> list[str]:
    """Self-rehearsal's skills minus real replay's, at the most reward that both and AdamW reach."""
    out = ["| world | raw fragments − real replay | prompt model − real replay |", "|---|---|---|"]
    for world in dict.fromkeys(name for name, _ in everything):
        cells = []
        for source in ("raw-fragments", "prompt-model"):
            names = ("AdamW over lr", f"self-rehearsal {source}", "replay real data")
            gaps = []
            for (name, _), own in everything.items():
                if name == world and all(each in own for each in names):
                    level = min(wanted, highest(own, names))
                    gaps.append((at(own[names[1]], level) or 0) - (at(own[names[2]], level) or 0))
            cells.append(f"{statistics.mean(gaps):+.1f} ({', '.join(f'{gap:+.1f}' for gap in gaps)})" if gaps else "")
        out.append(f"| {world} | {' | '.join(cells)} |")
    return out


def gate_beside_scaling(everything: dict[tuple[str, int], dict[str, Curve]], lines: list[dict[str, Any]]) -> list[str]:
    """The gate's skills minus scaling back's, at the most reward that both reach, in order of its warning sign."""
    found = []
    for line in lines:
        if line["method"] != "Fisher gate" or line["setting"] != {"weight": 1.0}:
            continue
        own, cells = everything[line["world"], line["seed"]], []
        for gate in ("Fisher gate 1.0", "Fisher gate 3.0", "Fisher gate 1.0 tensors"):
            if gate in own and "scaled back" in own:
                level = highest(own, (gate, "scaled back"))
                cells.append(
                    f"{(at(own[gate], level) or 0) - (at(own['scaled back'], level) or 0):+.1f} at {level:.0f}"
                )
            else:
                cells.append("")
        found.append((line["points"][0]["ratio"], f"{line['world']} {line['seed']}", cells))
    out = ["| ΣF_s/ΣF_p | world, seed | λ=1 − scaled back | λ=3 | one factor a tensor |", "|---" * 5 + "|"]
    return out + [f"| {ratio:.2f} | {where} | {' | '.join(cells)} |" for ratio, where, cells in sorted(found)]


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
