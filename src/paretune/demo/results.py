"""The demo's records of all seeds, made into results.json: points with intervals, the front, and a plain verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paretune.demo.align import DPOSettings
from paretune.demo.equal import equal_reward
from paretune.demo.scores import Scores, above_curve, as_point, interval, score
from paretune.evaluation.frontier import hypervolume, pareto_set

REFERENCE_POINT = (0.0, 0.0)


def summarize(records: Sequence[Sequence[Sequence[dict[str, Any]]]], seeds: Sequence[int]) -> dict[str, Any]:
    """The content of results.json.

    Args:
        records: [seed][row][point], as the run wrote them.
        seeds: their seeds.
    """
    flat = [[point for row in seed for point in row] for seed in records]
    scores = score(
        [[p["rewards"] for p in seed] for seed in flat],
        [[p["solved"] for p in seed] for seed in flat],
        [seed[0]["categories"] for seed in flat],
    )
    names = [point["method"] for point in flat[0]]
    reference, base = names.index("reference (SFT)"), names.index("base")
    points = [as_point(scores, i, reference, _about(flat, i)) for i in range(len(names))]
    curve = _adamw_curve(points, reference)
    for i, point in enumerate(points):
        if i not in (base, *curve):
            compared = above_curve(scores, i, curve)
            point["capability_above_adamw"] = None if compared is None else compared[0]
            point["capability_above_adamw_ci"] = None if compared is None else compared[1]
    own = [i for i in range(len(points)) if i not in (reference, base)]
    area = [(points[i]["reward"], points[i]["capability"]) for i in (reference, *own)]
    control = [(points[i]["reward"], points[i]["capability"]) for i in curve]
    front = [(reference, *own)[i] for i in pareto_set(area)]
    equal = equal_reward(points, scores, reference, curve)
    return {
        "seed": seeds[0],
        "seeds": list(seeds),
        "points": [points[i] for i in own],
        "reference": points[reference],
        "base": points[base],
        "pareto": [label(points[i]) for i in front],
        "hypervolume": {
            "reference_point": list(REFERENCE_POINT),
            "all": hypervolume(area, REFERENCE_POINT),
            "adamw": hypervolume(control, REFERENCE_POINT),
        },
        "equal_reward": equal,
        "verdict": [headline(equal, points[reference]), *verdict(points, reference, curve, scores)],
    }


def label(point: dict[str, Any]) -> str:
    """A point's method with its hyper-parameters, for tables and pictures."""
    said = ("merge", "ratio", *(("mode",) if str(point["method"]).startswith("ChildTuning") else ()))  # by the method
    if "parametrization" in point["hyperparameters"]:
        said = (*said, "ratios")  # learned, and others on every seed; so are the steps on each objective
    named = {k: v for k, v in point["hyperparameters"].items() if k not in said and not isinstance(v, dict)}
    shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in named.items())
    return f"{point['method']} ({shown})" if shown else str(point["method"])


def headline(equal: dict[str, Any], reference: dict[str, Any]) -> str:
    """The comparison at equal reward in one sentence."""
    adamw = equal["adamw"]
    kept = [each for each in equal["methods"] if each["capability"] is not None]
    told = [
        f"{label(each)} {_points(each['capability'])} {_range(each['capability_ci'])}"
        + ("" if each["removed"] is None else f", {each['removed']:.0%} of AdamW's tax removed")
        for each in kept
    ]
    never = [label(each) for each in equal["methods"] if each["capability"] is None]
    missed = f" Never reached by {', '.join(never)}." if never else ""
    return (
        f"Skills at sampled reward {_points(equal['reward'])} (reference {_points(reference['capability'])}): AdamW at "
        f"its best learning rate {_points(adamw['capability'])} {_range(adamw['capability_ci'])}; "
        f"{'; '.join(told) or 'no other method is dialled'}.{missed}"
    )


def verdict(points: list[dict[str, Any]], reference: int, curve: Sequence[int], scores: Scores) -> list[str]:
    """What the intervals allow to be said, a sentence each."""
    peak = max(curve, key=lambda i: points[i]["reward"])
    default = next((i for i in curve if points[i]["hyperparameters"].get("lr") == DPOSettings().lr), peak)
    sentences = [_gain(points, i, reference, scores) for i in dict.fromkeys((default, peak))]
    groups: dict[str, list[str]] = {"above": [], "within noise of": [], "below": []}
    beyond = []
    for i, point in enumerate(points):
        if point["family"] == "control" or "capability_above_adamw" not in point:
            continue
        if point["hyperparameters"].get("scale", 1.0) != 1.0:
            continue  # the headline has the whole ladder
        bounds = point["capability_above_adamw_ci"]
        if bounds is None:
            more = interval(scores.reward_draws[i] - scores.reward_draws[peak])
            text = f"{label(point)} {_range(more)}" + (" (within noise)" if more[0] <= 0 else "")
            beyond.append(f"{text} at tax {_points(point['tax'])} {_range(point['tax_ci'])}")
        elif bounds[0] > 0:
            groups["above"].append(f"{label(point)} by {_points(point['capability_above_adamw'])} {_range(bounds)}")
        else:
            groups["below" if bounds[1] < 0 else "within noise of"].append(label(point))
    for place, members in groups.items():
        said = "; ".join(members) if members else "none"
        sentences.append(f"At equal reward {place} AdamW's curve over learning rates: {said}.")
    if beyond:
        sentences.append(f"More reward than AdamW at its best learning rate, by: {'; '.join(beyond)}.")
    sentences += _ablation(points, scores)
    sentences.append("Intervals are of 95%, each for itself: with so many comparisons a few exclude 0 by chance.")
    return sentences


def _gain(points: list[dict[str, Any]], i: int, reference: int, scores: Scores) -> str:
    gain = points[i]["reward"] - points[reference]["reward"]
    bounds = interval(scores.reward_draws[i] - scores.reward_draws[reference])
    return (
        f"{label(points[i])} gains {_points(gain)} {_range(bounds)} points of sampled reward and pays a tax of "
        f"{_points(points[i]['tax'])} {_range(points[i]['tax_ci'])} points of capability."
    )


def _ablation(points: list[dict[str, Any]], scores: Scores) -> list[str]:
    """OnDARE against itself with weight 0, at the same density."""
    ablated = [i for i, p in enumerate(points) if p["method"] == "OnDARE, weight 0"]
    merged = [
        i
        for i, p in enumerate(points)
        if p["method"] == "OnDARE" and set(p["hyperparameters"]) == {"density", "weight"}
    ]
    sentences = []
    for i, j in zip(ablated, merged, strict=False):
        reward = interval(scores.reward_draws[j] - scores.reward_draws[i])
        capability = interval(scores.capability_draws[j] - scores.capability_draws[i])
        differs = [
            name for name, (low, high) in (("reward", reward), ("capability", capability)) if low > 0 or high < 0
        ]
        found = f"a difference in {' and '.join(differs)}" if differs else "within noise"
        sentences.append(
            f"What τ adds to OnDARE (weight {points[j]['hyperparameters']['weight']:g} against 0): "
            f"reward {_range(reward)}, capability {_range(capability)} points: {found}."
        )
    return sentences


def _adamw_curve(points: list[dict[str, Any]], reference: int) -> list[int]:
    runs = [i for i, point in enumerate(points) if point["method"] == "AdamW"]
    return [reference, *sorted(runs, key=lambda i: points[i]["hyperparameters"]["lr"])]


def _about(flat: Sequence[Sequence[dict[str, Any]]], i: int) -> dict[str, Any]:
    point = flat[0][i]
    seconds = sum(seed[i]["seconds"] for seed in flat) / len(flat)
    kept = {k: point[k] for k in ("method", "family", "hyperparameters")}
    return {**kept, "seconds": round(seconds, 2)}


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _range(bounds: Sequence[float]) -> str:
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"
