"""Measurements from item-wise scores, and their comparison with the reference on the same items."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from paretune.errors import ArgumentError
from paretune.evaluation.points import Difference, ItemScores, Measurement
from paretune.evaluation.statistics import (
    Resampled,
    Sample,
    holm,
    interval_verdict,
    intervals,
    mcnemar,
    resample,
    sign_flip_p,
    verdict,
)


def measurement(
    name: str,
    family: str,
    reward: ItemScores,
    capability: Mapping[str, ItemScores],
    **about: Any,
) -> Measurement:
    """One model's point from its item-wise scores.

    Capability is the mean over categories of the mean over the category's benchmarks.

    Args:
        name, family: as in :class:`Measurement`.
        reward: the reward of each answer; answers to one prompt belong to one cluster.
        capability: the scores on each benchmark, by its name.
        about: further fields of :class:`Measurement`.

    Raises:
        ArgumentError: where there is no benchmark, or one with fewer than 2 items.

    Example:
        >>> right = ItemScores.of([1, 0, 1, 1], "abcd", category="math")
        >>> measurement("sft", "reference", ItemScores.of([0.2, 0.4], "xy"), {"gsm8k": right}).capability
        0.75
    """
    weights = benchmark_weights(capability)
    rewards = resample(_sample([reward]))
    parts = {name: resample(_sample([items])) for name, items in capability.items()}
    shares = [weights[name] for name in parts]
    return Measurement(
        name=name,
        family=family,
        reward=float(rewards.means[0]),
        reward_ci=intervals([rewards])[0],
        capability=float(sum(w * part.means[0] for w, part in zip(shares, parts.values(), strict=True))),
        capability_ci=intervals(list(parts.values()), shares)[0],
        capability_by_category={
            category: float(numpy.mean([parts[name].means[0] for name in names]))
            for category, names in _categories(capability).items()
        },
        reward_items=reward,
        capability_items=dict(capability),
        **about,
    )


def benchmark_weights(capability: Mapping[str, ItemScores]) -> dict[str, float]:
    """What each benchmark's mean counts for in the macro-average over categories.

    Raises:
        ArgumentError: where there is none.
    """
    categories = _categories(capability)
    if not categories:
        raise ArgumentError("capability", dict(capability), "give the scores of at least one benchmark")
    return {name: 1 / len(categories) / len(names) for names in categories.values() for name in names}


def against(reference: Measurement, points: Iterable[Measurement]) -> list[Measurement]:
    """The points with tax, reward gain and verdicts, compared with the reference item by item.

    Single benchmarks: McNemar's exact test where every score is 0 or 1 and items are independent, random sign flips of
    whole clusters otherwise; Holm's correction over the benchmarks (and over the categories) of a point. The intervals
    are of 95% each, without correction.

    Args:
        reference: with item-wise scores.
        points: those without item-wise scores, and the reference itself, come back with plain differences only.

    Raises:
        ArgumentError: where a point was measured on other items than the reference.

    Example:
        >>> items = [ItemScores.of(s, range(40), category="math") for s in ([1] * 40, [1] * 20 + [0] * 20)]
        >>> sft, dpo = (measurement(n, "x", ItemScores.of([0, 1], "ab"), {"gsm8k": i}) for n, i in zip("rp", items))
        >>> [point.tax_verdict for point in against(sft, [dpo])]
        ['loss']
    """
    given = list(points)
    found = {point.name: _plain_difference(reference, point) for point in given}
    rewarded = {p.name: p.reward_items for p in given if p.name != reference.name and p.reward_items}
    if rewarded and reference.reward_items:
        part = _paired("reward_items", reference.reward_items, rewarded).part
        gains = [found[name].reward - reference.reward for name in rewarded]
        for name, gain, bounds in zip(rewarded, gains, intervals([part]), strict=True):
            said: dict[str, Any] = {
                "reward_gain": gain,
                "reward_gain_ci": bounds,
                "reward_verdict": interval_verdict(*bounds),
            }
            found[name] = dataclasses.replace(found[name], **said)
    capable = [p for p in given if p.name != reference.name and p.capability_items and reference.capability_items]
    if capable:
        for point, fields in zip(capable, _capability(reference, capable), strict=True):
            found[point.name] = dataclasses.replace(found[point.name], **fields)
    return [found[point.name] for point in given]


@dataclass(frozen=True)
class _Paired:
    """Differences of several models on one benchmark."""

    sample: Sample
    part: Resampled
    binary: bool


def _capability(reference: Measurement, points: Sequence[Measurement]) -> list[dict[str, Any]]:
    names = list(reference.capability_items)
    for point in points:
        if set(point.capability_items) != set(names):
            raise ArgumentError(
                f"{point.name}.capability_items",
                sorted(point.capability_items),
                f"measure the same benchmarks as the reference: {', '.join(sorted(names))}",
            )
    paired = {
        name: _paired(
            f"capability_items[{name!r}]",
            reference.capability_items[name],
            {point.name: point.capability_items[name] for point in points},
        )
        for name in names
    }
    weights = benchmark_weights(reference.capability_items)
    whole = intervals([paired[name].part for name in names], [weights[name] for name in names])
    by_benchmark = [_differences([paired[name]]) for name in names]
    by_category = {
        c: _differences([paired[n] for n in own]) for c, own in _categories(reference.capability_items).items()
    }
    fields = []
    for i, (low, high) in enumerate(whole):
        fields.append(
            {
                "tax": reference.capability - points[i].capability,
                "tax_ci": (-high, -low),
                "tax_verdict": interval_verdict(low, high),
                "by_benchmark": _corrected({name: by_benchmark[b][i] for b, name in enumerate(names)}),
                "by_category": _corrected({category: each[i] for category, each in by_category.items()}),
            }
        )
    return fields


def _differences(paired: Sequence[_Paired]) -> list[Difference]:
    """One for each model, of the plain mean of some benchmarks."""
    bounds = intervals([each.part for each in paired])
    exact = len(paired) == 1 and paired[0].binary
    if exact:
        test, p_values = (
            "McNemar, exact",
            [mcnemar(int((d > 0).sum()), int((d < 0).sum())) for d in paired[0].sample.values.T],
        )
    else:
        test, p_values = "sign flips", sign_flip_p([each.sample for each in paired])
    means = numpy.mean([each.part.means for each in paired], 0)
    items = sum(len(each.sample.values) for each in paired)
    return [
        Difference(float(mean), ci, p, items=items, test=test)
        for mean, ci, p in zip(means, bounds, p_values, strict=True)
    ]


def _corrected(differences: dict[str, Difference]) -> dict[str, Difference]:
    """With p after Holm's correction, and the verdict that follows."""
    adjusted = holm([each.p if each.p is not None else 1.0 for each in differences.values()])
    return {
        name: dataclasses.replace(each, p_adjusted=p, verdict=verdict(each.difference, p))
        for (name, each), p in zip(differences.items(), adjusted, strict=True)
    }


def _paired(field: str, reference: ItemScores, others: Mapping[str, ItemScores]) -> _Paired:
    columns = []
    base = numpy.asarray(reference.scores)
    binary = reference.clusters is None and bool(numpy.isin(base, (0, 1)).all())
    for name, other in others.items():
        if other.ids != reference.ids or len(other.scores) != len(base):
            raise ArgumentError(
                f"{name}: {field}.ids",
                other.ids,
                f"measure it on the same items as the reference ({reference.ids}), in the same order",
            )
        values = numpy.asarray(other.scores)
        binary = binary and bool(numpy.isin(values, (0, 1)).all())
        columns.append(values - base)
    sample = Sample(numpy.stack(columns, 1), reference.clusters, reference.ids)
    return _Paired(sample, resample(sample), binary)


def _plain_difference(reference: Measurement, point: Measurement) -> Measurement:
    """What needs no items: the differences themselves, kept where the point already has them."""
    return dataclasses.replace(
        point,
        tax=reference.capability - point.capability if point.tax is None else point.tax,
        reward_gain=point.reward - reference.reward if point.reward_gain is None else point.reward_gain,
    )


def _sample(items: Sequence[ItemScores]) -> Sample:
    return Sample(numpy.stack([numpy.asarray(each.scores) for each in items], 1), items[0].clusters, items[0].ids)


def _categories(capability: Mapping[str, ItemScores]) -> dict[str, list[str]]:
    """The benchmarks of each category; one without a category is its own."""
    found: dict[str, list[str]] = {}
    for name, items in capability.items():
        found.setdefault(items.category or name, []).append(name)
    return found
