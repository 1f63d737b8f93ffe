"""Intervals cover, tests equal scipy and statsmodels, and what is paired is paired."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from paretune.errors import ArgumentError
from paretune.evaluation import student
from paretune.evaluation.halves import choose_on_half
from paretune.evaluation.paired import against, measurement
from paretune.evaluation.points import ItemScores
from paretune.evaluation.seeds import combine_seeds, crossed, mean_over_seeds
from paretune.evaluation.statistics import (
    Sample,
    _small_sample,
    bca,
    bootstrap_interval,
    holm,
    interval_verdict,
    mcnemar,
    resample,
    sign_flip_p,
    verdict,
)

Rng = np.random.Generator


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (2, 10), (10, 2), (40, 70), (600, 500), (0, 2000)])
def test_mcnemar_equals_scipy(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("seed", range(20))
def test_holm_equals_statsmodels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = (rng.random(rng.integers(1, 12)) ** 3).round(2).tolist()  # with ties
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist())


def test_student_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    for freedom, t in zip(10 ** rng.uniform(0, 6, 100), rng.uniform(0, 9, 100), strict=True):
        assert student.two_sided_p(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-6, abs=1e-14)
        assert student.quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_bca_is_near_scipys(seed: int) -> None:
    """Same method, other random draws, and ours a little wider for few items."""
    values = np.random.default_rng(seed).exponential(size=300)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, rng=seed).confidence_interval
    ours = bootstrap_interval([Sample(values)], draws=9999)
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.06 * width)


@pytest.mark.parametrize("seed", range(3))
def test_sign_flips_are_near_scipys(seed: int) -> None:
    values = np.random.default_rng(seed).normal(0.2, 1, 60)
    theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=9999, rng=1).pvalue
    assert sign_flip_p([Sample(values)])[0] == pytest.approx(theirs, abs=0.02)


def test_sign_flips_of_few_items_are_exact_in_the_long_run() -> None:
    """Of 3 equal differences 2 of 8 assignments reach the sum."""
    assert sign_flip_p([Sample(np.ones(3))], flips=40000)[0] == pytest.approx(0.25, abs=0.01)


def test_sign_flips_move_whole_clusters() -> None:
    """Two clusters of 50 equal items are 2 observations, not 100."""
    clusters = [0] * 50 + [1] * 50
    assert sign_flip_p([Sample(np.ones(100), clusters)])[0] == pytest.approx(0.5, abs=0.02)
    assert sign_flip_p([Sample(np.ones(100))])[0] < 0.001


def _normal(rng: Rng) -> Any:
    return [Sample(rng.normal(size=40))], [1.0], 0.0


def _skewed(rng: Rng) -> Any:
    return [Sample(rng.exponential(size=80))], [1.0], 1.0


def _right_and_wrong(rng: Rng) -> Any:
    u = rng.random(150)
    return [Sample(np.where(u < 0.12, 1.0, np.where(u < 0.18, -1.0, 0.0)))], [1.0], 0.06


def _passages(rng: Rng) -> Any:
    sizes = rng.integers(1, 8, 60)
    clusters = np.repeat(np.arange(60), sizes)
    return [Sample(rng.normal(size=60)[clusters] + rng.normal(size=len(clusters)), clusters.tolist())], [1.0], 0.0


def _macro_average(rng: Rng) -> Any:
    samples = [Sample(rng.normal(size=50)), Sample(rng.exponential(size=100)), Sample((rng.random(80) < 0.3) * 1.0)]
    return samples, [0.5, 0.25, 0.25], 0.325


@pytest.mark.slow
@pytest.mark.parametrize("make", [_normal, _skewed, _right_and_wrong, _passages, _macro_average])
def test_intervals_cover(make: Callable[[Rng], Any]) -> None:
    """95% intervals hold the truth in 93-97% of 2000 repetitions (standard error 0.5%)."""
    rng, hits, repetitions = np.random.default_rng(5), 0, 2000
    for seed in range(repetitions):
        samples, weights, truth = make(rng)
        low, high = bootstrap_interval(samples, weights, draws=1000, seed=seed)
        hits += low <= truth <= high
    assert 0.93 <= hits / repetitions <= 0.97


@pytest.mark.parametrize("acceleration", [0.0, 0.08, -0.15])
def test_bca_is_efrons_formula(acceleration: float) -> None:
    drawn = np.random.default_rng(3).exponential(size=4001)
    centre, z = 0.75, 2.1
    bias = stats.norm.ppf((drawn < centre).mean())
    ends = [stats.norm.cdf(bias + (bias + s * z) / (1 - acceleration * (bias + s * z))) for s in (-1, 1)]
    assert bca(drawn, centre, acceleration, z) == pytest.approx(tuple(np.quantile(drawn, ends)), rel=1e-9)


def test_few_items_are_widened_as_hesterberg_says() -> None:
    """t in place of z and √(n/(n−1)); strata of unequal size have Satterthwaite's degrees of freedom."""
    assert _small_sample([0.3], [8], 0.95) == pytest.approx(stats.t.ppf(0.975, 7) * math.sqrt(8 / 7), rel=1e-5)
    variances, sizes = [0.3, 0.1], [8, 30]
    unbiased = [v * n / (n - 1) for v, n in zip(variances, sizes, strict=True)]
    freedom = sum(unbiased) ** 2 / sum(v**2 / (n - 1) for v, n in zip(unbiased, sizes, strict=True))
    wanted = stats.t.ppf(0.975, round(freedom, 1)) * math.sqrt(sum(unbiased) / sum(variances))
    assert _small_sample(variances, sizes, 0.95) == pytest.approx(wanted, rel=1e-5)


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(50), 10)
    values = rng.normal(size=50)[clusters]
    alone = np.subtract(*bootstrap_interval([Sample(values)])[::-1])
    together = np.subtract(*bootstrap_interval([Sample(values, clusters.tolist())])[::-1])
    assert together / alone == pytest.approx(math.sqrt(10), rel=0.15)


def test_draws_of_the_same_items_are_paired() -> None:
    """Models measured in different calls, even in different processes, meet the same resampled items."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200), rng.normal(size=200)
    apart = resample(Sample(a - b, ids="x")).draws
    assert np.allclose(resample(Sample(a, ids="x")).draws - resample(Sample(b, ids="x")).draws, apart)
    assert not np.allclose(resample(Sample(a - b, ids="y")).draws, apart)
    both = resample(Sample(np.stack([a, b], 1), ids="x")).draws
    assert np.allclose(both[:, 0] - both[:, 1], apart[:, 0])


def test_wrong_statistics() -> None:
    with pytest.raises(ArgumentError, match="at least 2 items"):
        bootstrap_interval([Sample(np.ones(1))])
    with pytest.raises(ArgumentError, match="at least 2 items"):
        bootstrap_interval([Sample(np.ones(5), [0] * 5)])
    with pytest.raises(ArgumentError, match="level"):
        bootstrap_interval([Sample(np.ones(5))], level=95)
    with pytest.raises(ArgumentError, match="p_values"):
        holm([1.2])
    with pytest.raises(ArgumentError, match="counts"):
        mcnemar(-1, 3)
    assert bootstrap_interval([Sample(np.ones(5))]) == (1.0, 1.0)


def test_verdicts() -> None:
    assert verdict(0.1, 0.049) == "gain"
    assert verdict(-0.1, 0.049) == "loss"
    assert verdict(0.1, 0.05) == "within noise"
    assert [interval_verdict(*ci) for ci in ((0.1, 0.2), (-0.2, -0.1), (0.0, 0.2))] == ["gain", "loss", "within noise"]


# -- measurements --------------------------------------------------------------------------------------------


def model(name: str, seed: int, quality: float, reward: float, n: int = 120, **about: Any) -> Any:
    """Items of equal luck for all models; ``quality`` of 'math' only."""
    luck = np.random.default_rng(99)
    u, v, w = luck.random(n), luck.random(n), luck.normal(size=n)
    noise = np.random.default_rng(seed).normal(size=n) * 0.1
    return measurement(
        name,
        about.pop("family", "control"),
        ItemScores.of(reward + 0.3 * w + noise, range(n)),
        {
            "gsm8k": ItemScores.of(u < quality, range(n), "math"),
            "mbpp": ItemScores.of(v < 0.5, range(n), "code"),
            "humaneval": ItemScores.of(v[::-1] < 0.7, range(n), "code"),
        },
        **about,
    )


def test_a_point_from_items() -> None:
    point = model("sft", 0, 0.9, 0.4)
    category = point.capability_by_category
    assert point.capability == pytest.approx((category["math"] + category["code"]) / 2)
    means = {name: items.mean for name, items in point.capability_items.items()}
    assert category["code"] == pytest.approx((means["mbpp"] + means["humaneval"]) / 2)
    assert point.capability_ci[0] < point.capability < point.capability_ci[1]
    assert point.reward_ci[0] < point.reward < point.reward_ci[1]


def test_against_the_reference() -> None:
    sft, worse, same = model("sft", 0, 0.9, 0.4), model("worse", 1, 0.6, 0.6), model("same", 2, 0.9, 0.4)
    bad, good = against(sft, [worse, same])
    assert bad.tax == pytest.approx(sft.capability - worse.capability)
    assert bad.tax_ci[0] < bad.tax < bad.tax_ci[1]
    assert (bad.tax_verdict, bad.reward_verdict) == ("loss", "gain")
    assert (good.tax, good.tax_ci, good.tax_verdict) == (0.0, (0.0, 0.0), "within noise")
    assert {n: d.verdict for n, d in bad.by_category.items()} == {"math": "loss", "code": "within noise"}
    lost = sum(sft.capability_items["gsm8k"].scores) - sum(worse.capability_items["gsm8k"].scores)
    found = bad.by_benchmark["gsm8k"]
    assert found.p == pytest.approx(stats.binomtest(0, int(lost)).pvalue)
    adjusted = multipletests([d.p for d in bad.by_benchmark.values()], method="holm")[1]
    assert [d.p_adjusted for d in bad.by_benchmark.values()] == pytest.approx(adjusted.tolist())
    assert (found.test, bad.by_category["code"].test) == ("McNemar, exact", "sign flips")
    # Pairing: the gain's interval is far narrower than the two rewards'.
    width = bad.reward_gain_ci[1] - bad.reward_gain_ci[0]
    assert width < 0.5 * (bad.reward_ci[1] - bad.reward_ci[0])


def test_other_items_are_refused() -> None:
    sft, other = model("sft", 0, 0.9, 0.4), model("other", 0, 0.9, 0.4, n=100)
    with pytest.raises(ArgumentError, match=r"other: .*same items as the reference"):
        against(sft, [other])
    fewer = measurement("fewer", "x", sft.reward_items, {"gsm8k": sft.capability_items["gsm8k"]})
    with pytest.raises(ArgumentError, match="same benchmarks as the reference: gsm8k, humaneval, mbpp"):
        against(sft, [fewer])


# -- seeds ---------------------------------------------------------------------------------------------------


def test_seeds_that_have_their_own_items_give_students_interval() -> None:
    values = [0.1, 0.25, 0.3, 0.2]
    (low, high), p = mean_over_seeds(values)
    theirs = stats.ttest_1samp(values, 0)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-6)
    assert p == pytest.approx(theirs.pvalue, abs=1e-5)
    with pytest.raises(ArgumentError, match="at least 2"):
        mean_over_seeds([0.1])


@pytest.mark.slow
@pytest.mark.parametrize("spread", [(0.05, 1.0, 0.5), (1.0, 0.3, 0.3)])
def test_intervals_over_seeds_and_items_cover(spread: tuple[float, float, float]) -> None:
    of_seeds, of_items, of_both = spread
    rng, hits, repetitions = np.random.default_rng(0), 0, 1000
    for _ in range(repetitions):
        shape = (80, 3)
        values = rng.normal(size=3) * of_seeds + rng.normal(size=(80, 1)) * of_items + rng.normal(size=shape) * of_both
        (low, high), _ = crossed([Sample(values)], [1.0])
        hits += low <= 0 <= high
    assert 0.925 <= hits / repetitions <= 0.975


def test_combined_seeds() -> None:
    runs = [
        [model("sft", s, 0.9, 0.4, family="reference"), model("dpo", 10 + s, 0.7 - 0.02 * s, 0.6 + 0.01 * s)]
        for s in range(3)
    ]
    sft, dpo = combine_seeds(runs)
    assert sft.family == "reference"
    assert sft.tax is None
    assert dpo.reward == pytest.approx(np.mean([run[1].reward for run in runs]))
    assert dpo.tax == pytest.approx(np.mean([run[0].capability - run[1].capability for run in runs]))
    assert dpo.tax_ci[0] < dpo.tax < dpo.tax_ci[1]
    assert (dpo.tax_verdict, dpo.reward_verdict, dpo.by_category["math"].verdict) == ("loss", "gain", "loss")
    assert dpo.measured["seeds"] == [0, 1, 2]
    with pytest.raises(ArgumentError, match="does not share"):
        combine_seeds([runs[0], runs[1][:1]])
    with pytest.raises(ArgumentError, match="at least 2 files"):
        combine_seeds(runs[:1])


# -- halves --------------------------------------------------------------------------------------------------


def test_choosing_on_one_half_does_not_flatter_on_the_other() -> None:
    """Equal models: the best of 20 looks better on the choosing half, and is not on the other."""
    rng, luck = np.random.default_rng(0), np.random.default_rng(1).random(80)
    sft = measurement("sft", "reference", ItemScores.of(luck, range(80)), {"m": ItemScores.of(luck < 2, range(80))})
    chosen, reported = [], []
    for _ in range(6):
        points = [
            measurement(str(i), "x", ItemScores.of(luck + rng.normal(size=80), range(80)), dict(sft.capability_items))
            for i in range(20)
        ]
        found = choose_on_half(points, sft, lambda gain, tax: gain)
        assert found is not None
        chosen.append(found[1].reward_gain)
        reported.append(found[2].reward_gain)
    assert np.mean(chosen) > 0.2
    assert abs(np.mean(reported)) < 0.15
    assert choose_on_half(points, sft, lambda gain, tax: -math.inf) is None


def test_halves_keep_clusters_whole_and_share_nothing() -> None:
    clusters = [i // 4 for i in range(40)]
    items = ItemScores.of(range(40), range(40), clusters=clusters)
    from paretune.evaluation.halves import _half_of

    halves = [_half_of(items, side, seed=0) for side in (0, 1)]
    seen = [set(map(int, half.scores)) for half in halves]
    assert seen[0] | seen[1] == set(range(40))
    assert not {i // 4 for i in seen[0]} & {i // 4 for i in seen[1]}
    assert halves[0].ids != halves[1].ids
