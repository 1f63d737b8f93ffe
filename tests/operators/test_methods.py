"""The published methods are pairs of operators; OnDARE and OnTIES are OnlineMerging with their pair."""

from __future__ import annotations

import re

import pytest
import torch

import paretune as pt
from paretune.operators import METHODS, mask_key

PAIRS = {
    "ondare": (pt.Random, pt.WeightedSum(), "none"),
    "onties": (pt.Magnitude, pt.SignElection(weighted=True), "none"),
    "ondare-released": (pt.Random, pt.WeightedSum(), "expectation"),
    "onties-released": (pt.Magnitude, pt.SignElection(weighted=False), "none"),
    "dare_linear": (pt.Random, pt.WeightedSum(), "expectation"),
    "ties": (pt.Magnitude, pt.SignElection(weighted=True), "none"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    sparsify, consensus, rescale = PAIRS[name]
    assert METHODS[name].sparsifier(density=0.3) == sparsify(0.3, rescale=rescale)
    assert METHODS[name].consensus == consensus


def test_linear_keeps_everything() -> None:
    x, y = torch.randn(40), torch.randn(40)
    sparsify = METHODS["linear"].sparsifier()
    assert torch.equal(sparsify(x, key=mask_key(0, 0, "update", "w")), x)
    torch.testing.assert_close(METHODS["linear"].consensus(x, y, 0.25), 0.75 * x + 0.25 * y)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_runs_and_names_its_paper(name: str) -> None:
    method = METHODS[name]
    assert re.search(r"\d{4}\.\d{5}", method.paper)
    assert 0 < method.density <= 1
    sparsify = method.sparsifier()
    a, b = (sparsify(torch.randn(500), key=mask_key(0, 0, s, "w")) for s in ("update", "tau"))
    assert method.consensus(a, b, 0.5).isfinite().all()


def test_defaults_of_the_optimizers_are_the_tables() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    tau = pt.TaskVector.between(base={"w": torch.zeros(3)}, reference={"w": torch.ones(3)})
    for name, kind in (("ondare", pt.OnDARE), ("onties", pt.OnTIES)):
        group = kind([("w", p)], tau).param_groups[0]
        assert group["density"] == METHODS[name].density
        assert group["weight"] == 5e-7
    assert METHODS["ondare"].density == 5e-4
    assert METHODS["onties"].density == 0.05
