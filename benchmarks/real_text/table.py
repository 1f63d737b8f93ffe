"""Tables of records.jsonl: every point, and what each method keeps at equal reward.

python benchmarks/real_text/table.py [--seed 0] [--margin 1.5] [--steps 4.5]
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--margin", type=float, help="held-out margin, in nats, to compare at; else half of AdamW's most"
    )
    parser.add_argument("--steps", type=float, help="steps an answer, likewise")
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records.jsonl")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.records.read_text().splitlines()]
    lines = [line for line in lines if line["seed"] == options.seed]
    print("\n".join(points(lines)) + "\n")
    for axis, given in (("margin", options.margin), ("steps", options.steps)):
        adamw = [where(axis, point) for line in lines if line["method"] == "AdamW" for point in line["points"]]
        start = where(axis, lines[0]["points"][0])
        print("\n".join(equal(lines, axis, (start + max(adamw)) / 2 if given is None else given)) + "\n")


def where(axis: str, point: dict[str, Any]) -> float:
    """A point's place on an axis: the held-out margin, or the steps of its answers."""
    return float(point["margin"][0] if axis == "margin" else point["features"][0])


def points(lines: list[dict[str, Any]]) -> list[str]:
    """Every point of every method."""
    out = [
        "| method | s | margin, nats | margin accuracy | DPO loss | perplexity ÷ reference | format | sums right "
        "| wins by rule | ended | steps | characters |",
        "|---" * 12 + "|",
    ]
    for line in lines:
        for p in line["points"]:
            cells = [
                named(line), f"{p['scale']:g}", _interval(p["margin"], 1), _interval(p["margin_accuracy"], 1, 100),
                f"{p['loss']:.3f}", _interval(p["ratio"], 3), _interval(p["format"], 0, 100),
                _interval(p["sums"], 0, 100), _interval(p["reward"], 1, 100), f"{100 * p['finished']:.0f}",
                f"{p['features'][0]:.1f}", f"{p['characters']:.0f}",
            ]  # fmt: skip
            out.append("| " + " | ".join(cells) + " |")
    return out


def equal(lines: list[dict[str, Any]], axis: str, wanted: float) -> list[str]:
    """What each method's curve has kept where it first reaches a reward."""
    own: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        own.setdefault("AdamW over lr" if line["method"] == "AdamW" else named(line), []).extend(line["points"])
    start = own.pop("reference")
    # The policy that scaling back starts from is AdamW's.
    full = [line["points"][0] for line in lines if line["method"] == "AdamW"][:1]
    out = [f"Where {'the held-out margin' if axis == 'margin' else 'steps an answer'} come to {wanted:.2f} (X: never):",
           "", "| method | perplexity ÷ reference | AdamW's tax removed | format | sums right | wins by rule | ended |",
           "|---" * 7 + "|"]  # fmt: skip
    taxes: dict[str, float] = {}
    for name, members in own.items():
        members = members + full if name.startswith("scaled back") else members
        curve = [*start, *sorted(members, key=lambda point: where(axis, point))]
        log_ratio = first(wanted, [(where(axis, p), math.log(p["ratio"][0])) for p in curve])
        if log_ratio is None:
            out.append(f"| {name} | X | | | | | |")
            continue
        taxes[name] = log_ratio
        removed = "" if name == "AdamW over lr" else f"{1 - log_ratio / taxes['AdamW over lr']:.2f}"
        others = [first(wanted, [(where(axis, p), p[key][0]) for p in curve]) for key in ("format", "sums", "reward")]
        others.append(first(wanted, [(where(axis, p), p["finished"]) for p in curve]))
        cells = [f"{100 * (value or 0):.0f}" for value in others]
        out.append(f"| {name} | {math.exp(log_ratio):.3f} | {removed} | {' | '.join(cells)} |")
    return out


def first(margin: float, curve: list[tuple[float, float]]) -> float | None:
    """What a curve of (margin, value) has where it first reaches a margin, straight between its points."""
    for (low, before), (high, after) in pairwise(curve):
        if low < margin <= high:
            return before + (after - before) * (margin - low) / (high - low)
    return None


def named(line: dict[str, Any]) -> str:
    """A method with its setting, and the gate's sign."""
    values = [str(value) if isinstance(value, str) else f"{key} {value:g}" for key, value in line["setting"].items()]
    if line["method"] in ("OnDARE", "OnTIES"):
        values = values[1:]
    refused = {True: ", refused", False: ""}[line.get("refused", False)]
    sign = f" (ΣF_s/ΣF_p {line['ratio']:.2f}{refused})" if "ratio" in line else ""
    return " ".join([line["method"], *values]) + sign


def _interval(value: list[float], digits: int, times: float = 1.0) -> str:
    middle, low, high = (f"{times * number:.{digits}f}" for number in value)
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    main()
