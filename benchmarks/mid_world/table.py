"""Tables from records.jsonl: one for each world of the mid world, all methods at equal reward.

python benchmarks/mid_world/table.py [--seed 0] [--reward 85] [--records benchmarks/mid_world/records.jsonl]

Skills are read at --reward, and at the most that AdamW reaches over its learning rates.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from cures.table import Curve, at, curves

LOSS = 3.0  # points of skills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward", type=float, default=85.0, help="in points of 100")
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records.jsonl")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.records.read_text().splitlines()]
    lines = [line for line in lines if line["seed"] == options.seed]
    for (world, _), own in curves(lines).items():
        if "AdamW over lr" in own:
            members = [line for line in lines if line["world"] == world]
            print("\n".join(table(world, own, members, options.reward)) + "\n")


def table(world: str, own: dict[str, Curve], lines: list[dict[str, Any]], wanted: float) -> list[str]:
    """One world's methods."""
    whole = own["reference"][0]
    # In the order of learning rates, whenever each was run.
    adamw = sorted((line["lr"], line["points"][0]) for line in lines if line["method"] == "AdamW")
    own["AdamW over lr"] = [whole, *((point["reward"], point["skills"]) for _, point in adamw)]
    top = max(reward for reward, _ in own["AdamW over lr"])
    levels = sorted({min(wanted, top), top})
    out = [
        f"### {world}: reference {whole[0]:.1f} reward, {whole[1]:.1f} skills",
        "",
        f"| method | {' | '.join(f'skills at {level:.1f}' for level in levels)} "
        f"| undialled: reward, skills | most reward within {LOSS:.0f} points |",
        "|---" * (3 + len(levels)) + "|",
    ]
    scaled = {_name(line): line["points"] for line in lines}
    for name, curve in own.items():
        if name == "reference":
            continue
        kept = [at(curve, level) for level in levels]
        cells = ["X" if skills is None else f"{skills:.1f}" for skills in kept]
        plain = [f"{p['reward']:.1f}, {p['skills']:.1f}" for p in scaled.get(name, []) if p["scale"] == 1.0]
        near = max(reward for reward, skills in curve if skills >= whole[1] - LOSS)
        out.append(f"| {name} | {' | '.join(cells)} | {plain[0] if plain else ''} | {near:.1f} |")
    out += ["", "AdamW: " + "; ".join(f"{lr:g} {p['reward']:.1f}, {p['skills']:.1f}" for lr, p in adamw)]
    gates = [line for line in lines if line["method"] == "Fisher gate"]
    if gates:
        out += [f"ΣF_s/ΣF_p {gates[0]['points'][0]['ratio']}, refused: {gates[0]['points'][0]['refused']}"]
    plain_seconds = [line["points"][0]["seconds"] for line in lines if line["method"] == "AdamW"]
    for line in lines:
        point = line["points"][0]
        if line["method"] in ("Fisher gate", "self-rehearsal", "replay") and plain_seconds:
            seconds = point["seconds"] + point.get("sampling_seconds", 0.0)
            out.append(f"{_name(line)}: {seconds / max(plain_seconds):.2f} plain DPO runs")
    skills = [line["points"][0]["by_category"] for line in lines if line["method"] == "reference (SFT)"]
    return out + [f"reference by skill: {each}" for each in skills]


def _name(line: dict[str, Any]) -> str:
    named = [str(value) for key, value in line["setting"].items() if key not in ("merge", "density", "decay")]
    return " ".join([line["method"], *named])


if __name__ == "__main__":
    main()
