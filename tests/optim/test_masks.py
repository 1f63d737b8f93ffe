"""The counter-based masks: rate, independence of everything they should not depend on, no global state."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from builders import gradients, pair, parameters, project_masks, run
from hypothesis import given, settings
from hypothesis import strategies as st

import paretune as pt
from paretune.operators import mask_key, sampled_indices

N = 1 << 20


def sample(n: int, density: float, seed: int = 0, step: int = 0, stream: str = "update", name: str = "w"):
    return sampled_indices(mask_key(seed, step, stream, name), n, density, 0, n)


@pytest.mark.parametrize("density", [5e-4, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_rate_within_four_sigma(density: float) -> None:
    sigma = math.sqrt(N * density * (1 - density))
    counts = [sample(N, density, step=s).numel() for s in range(8)]
    assert all(abs(c - N * density) <= 4 * sigma for c in counts), counts
    assert abs(sum(counts) - 8 * N * density) <= 4 * sigma * math.sqrt(8)
    spread = np.std(counts, ddof=1)
    assert 0.2 * sigma < spread < 2.5 * sigma, "binomial, neither a fixed count nor over-dispersed"


@pytest.mark.parametrize("density", [0.003, 0.2, 0.6])
@pytest.mark.parametrize(
    "other",
    [{"step": 1}, {"step": 2**31}, {"seed": 1}, {"seed": 2**40}, {"stream": "tau"}, {"name": "v"}, {"name": "w2"}],
    ids=str,
)
def test_independent_of_each_other(density: float, other: dict) -> None:
    """Two masks overlap on p² of the entries: 4σ of the binomial; so do they after a shift by one."""
    a, b = torch.zeros(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool)
    a[sample(N, density)] = True
    b[sample(N, density, **other)] = True
    expected, sigma = N * density**2, math.sqrt(N * density**2 * (1 - density**2))
    for shift in (0, 1, 2, 4, 256, 4096, 65536):
        overlap = (a & b.roll(shift)).sum().item()
        assert abs(overlap - expected) <= 4 * sigma, f"shift {shift}"


@pytest.mark.parametrize("density", [0.003, 0.2, 0.6])
def test_entries_are_independent(density: float) -> None:
    mask = torch.zeros(N, dtype=torch.bool)
    mask[sample(N, density)] = True
    expected, sigma = N * density**2, math.sqrt(N * density**2 * (1 - density**2))
    for shift in (1, 2, 3, 4, 7, 8, 64, 256, 1024, 4096, 65536):
        assert abs((mask & mask.roll(shift)).sum().item() - expected) <= 4.5 * sigma, f"lag {shift}"


@pytest.mark.parametrize("density", [5e-4, 0.05, 0.5])
def test_every_position_has_its_chance(density: float) -> None:
    """χ² of the kept entries over residues and over places: no period, no favoured end of a block."""
    found = torch.cat([sample(1 << 18, density, step=s) for s in range(12)])
    for modulus in (2, 3, 4, 16, 256):
        counts = torch.bincount(found % modulus, minlength=modulus).double()
        share = torch.bincount(torch.arange(1 << 18) % modulus, minlength=modulus).double() / (1 << 18)
        expected = found.numel() * share
        chi = ((counts - expected) ** 2 / (expected * (1 - density))).sum().item()
        assert abs(chi - (modulus - 1)) <= 5 * math.sqrt(2 * (modulus - 1)) + 3, f"residues of {modulus}: {chi}"
    counts = torch.bincount(found // (1 << 12), minlength=64).double()
    chi = ((counts - counts.mean()) ** 2 / (counts.mean() * (1 - density))).sum().item()
    assert abs(chi - 63) <= 5 * math.sqrt(126)


def test_each_entry_is_drawn_afresh_each_step() -> None:
    """Over 400 steps every entry is kept about p·400 times: the counts are binomial."""
    n, steps, p = 4096, 400, 0.1
    counts = torch.zeros(n)
    for s in range(steps):
        counts[sample(n, p, step=s)] += 1
    variance = counts.var().item() / (steps * p * (1 - p))
    assert abs(counts.mean().item() - steps * p) < 4 * math.sqrt(steps * p * (1 - p) / n)
    assert abs(variance - 1) < 4 * math.sqrt(2 / n) + 0.02


@settings(max_examples=80)
@given(
    n=st.one_of(st.integers(0, 5000), st.integers(60_000, 140_000)),
    density=st.one_of(st.sampled_from([1.0, 0.5, 5e-4]), st.floats(1e-4, 1.0)),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    key=st.integers(0, 2**62),
)
def test_shards_concatenate_to_the_whole(n: int, density: float, cuts: list[float], key: int) -> None:
    whole = sampled_indices(key, n, density, 0, n)
    edges = [0, *sorted(int(c * n) for c in cuts), n]
    parts = [sampled_indices(key, n, density, a, b) for a, b in itertools.pairwise(edges)]
    assert whole.dtype == torch.int64
    assert torch.equal(torch.cat(parts), whole)
    assert (whole[1:] > whole[:-1]).all()
    assert whole.numel() == 0 or (whole[0] >= 0 and whole[-1] < n)
    if density == 1:
        assert whole.numel() == n


@pytest.mark.parametrize("density", [5e-4, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (17, 3), (700, 300)])
def test_dense_operator_and_indices_are_one_mask(density: float, shape: tuple[int, ...]) -> None:
    key = mask_key(3, 5, "tau", "some.name")
    x = torch.randn(shape)
    kept = torch.zeros(x.numel())
    index = sampled_indices(key, x.numel(), density, 0, x.numel())
    kept[index] = x.flatten()[index]
    assert torch.equal(pt.Random(density)(x, key=key), kept.view(shape))


def test_keys_are_stable_and_distinct() -> None:
    keys = {
        mask_key(seed, step, stream, name)
        for seed in range(3)
        for step in range(50)
        for stream in ("update", "tau")
        for name in ("a", "b", "a.b", "ab")
    }
    assert len(keys) == 3 * 50 * 2 * 4
    assert mask_key(1, 2, "tau", "x") == mask_key(1, 2, "tau", "x")


def test_optimizer_draws_fresh_masks_for_both_streams() -> None:
    """What moved is what the two masks say, at every step: read off a step with lr 1 and huge, known τ."""
    n, p, alpha = 20_000, 0.2, 0.25
    start = {"w": torch.zeros(n)}
    tau = pt.TaskVector.between(base={"w": torch.zeros(n)}, reference={"w": torch.full((n,), 64.0)})
    params = parameters(start)
    optimizer = pt.OnDARE(params.items(), tau, lr=1.0, betas=(0.0, 0.5), eps=0.0, density=p, weight=alpha, seed=7)
    masks = project_masks({"w": (n,)}, p, seed=7)
    seen = []
    for t in range(4):
        before = params["w"].detach().clone()
        run(optimizer, params, [{"w": torch.ones(n)}])
        change = params["w"].detach() - before
        both = torch.stack([masks(t, "update", "w"), masks(t, "tau", "w")])
        assert torch.equal(change != 0, both.any(0))
        assert torch.equal(change > 8, both[1]), "α·τ = 16 moves the τ mask"
        assert torch.allclose(change[both[0] & ~both[1]], torch.tensor(-0.75))
        seen += list(both)
    sigma = math.sqrt(n * p**2 * (1 - p**2))
    for i in range(len(seen)):
        for j in range(i):
            assert abs((seen[i] & seen[j]).sum().item() - n * p**2) < 4 * sigma


def test_same_seed_same_run_other_seed_other_run() -> None:
    reference, _, tau = pair()
    results = []
    for seed in (0, 0, 1):
        params = parameters(reference)
        run(pt.OnDARE(params.items(), tau, lr=1e-3, density=0.5, weight=0.1, seed=seed), params, gradients(3))
        results.append(params["embed.weight"].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_masks_do_not_depend_on_the_order_of_parameters() -> None:
    reference, _, tau = pair()
    one, other = parameters(reference), parameters(reference)
    options = {"lr": 1e-3, "density": 0.5, "weight": 0.1}
    run(pt.OnDARE(one.items(), tau, **options), one, gradients(3))
    run(pt.OnDARE(reversed(list(other.items())), tau, **options), other, gradients(3))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("kind", ["OnDARE", "OnTIES"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_global_generators_are_untouched(kind: str, variant: str) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    reference, _, tau = pair()
    params = parameters(reference)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    optimizer = getattr(pt, kind)(params.items(), tau, lr=1e-3, density=0.3, weight=0.1, variant=variant)
    run(optimizer, params, gradients(3))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()


@pytest.mark.parametrize("density", [1e-18, 1e-12, 1e-7])
def test_vanishing_densities(density: float) -> None:
    found = torch.cat([sample(200_000, density, step=s) for s in range(20)])
    assert found.numel() <= 8
    assert ((found >= 0) & (found < 200_000)).all()


@pytest.mark.parametrize("density", [1 - 1e-6, 1 - 1e-12, 0.0625, 0.06250001])
def test_densities_at_the_edges_of_the_generator(density: float) -> None:
    n = 1 << 17
    found = sample(n, density)
    assert abs(found.numel() - n * density) <= 4 * math.sqrt(n * density * (1 - density)) + 1
    kept = pt.Random(density)(torch.ones(n), key=mask_key(0, 0, "update", "w")).nonzero().flatten()
    assert torch.equal(kept, found)


@pytest.mark.parametrize("density", [0.06, 0.3])
def test_first_and_last_entries_of_a_page_have_their_chance(density: float) -> None:
    n, draws = 65_538, 1500
    counts = torch.zeros(n)
    for step in range(draws):
        counts[sample(n, density, step=step)] += 1
    allowed = 4.5 * math.sqrt(draws * density * (1 - density))
    for position in (0, 1, 2, 65_534, 65_535, 65_536, 65_537):
        assert abs(counts[position].item() - draws * density) <= allowed, position
