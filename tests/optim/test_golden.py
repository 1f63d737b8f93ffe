"""Trajectories of the released code of arXiv 2405.17931: the oracle first, then the optimizers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import oracles
import pytest
import torch
from builders import assert_close
from safetensors.torch import load_file
from torch import Tensor, nn

import paretune as pt

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
NAMES = sorted(INDEX)


def parts(case: str) -> tuple[dict[str, dict[str, Tensor]], dict, int]:
    """base, reference, grad.t and policy.t as dictionaries, the hyper-parameters in our names, the steps."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(GOLDEN / f"{case}.safetensors").items():
        head, _, name = key.partition(".")
        if head in {"grad", "policy"}:
            t, _, name = name.partition(".")
            head = f"{head}.{t}"
        found.setdefault(head, {})[name] = value
    h = INDEX[case]["hyperparameters"]
    ours = {
        "lr": h["lr"],
        "betas": tuple(h["betas"]),
        "eps": h["eps"],
        "weight_decay": h.get("weight_decay", 0.0),
        "density": h["reserve_p"],
        "weight": h["alpha"] if h["use_merge"] else 0.0,
        "every": h.get("online_step", 1),
        "rescale": "l1" if h.get("rescale") else None,
        "clip": h.get("clip_val", 1.0),
    }
    return found, ours, INDEX[case]["steps"]


@pytest.mark.parametrize("case", NAMES)
def test_oracle(case: str) -> None:
    found, options, steps = parts(case)
    kind = {"ondare": oracles.OnDAREReleasedOracle, "onties": oracles.OnTIESReleasedOracle}
    tau = {k: found["reference"][k] - found["base"][k] for k in found["base"]}
    oracle = kind[INDEX[case]["optimizer"]](found["reference"], tau, **options)
    for t in range(steps):
        oracle.step(found[f"grad.{t}"])
        for name, want in found[f"policy.{t + 1}"].items():
            assert_close(oracle.params[name], want, 1e-6, what=f"{name} after step {t + 1}")


@pytest.mark.parametrize("case", NAMES)
def test_optimizer(case: str) -> None:
    found, options, steps = parts(case)
    kind = {"ondare": pt.OnDARE, "onties": pt.OnTIES}[INDEX[case]["optimizer"]]
    tau = pt.TaskVector.between(base=found["base"], reference=found["reference"])
    params = {k: nn.Parameter(v.clone()) for k, v in found["reference"].items()}
    optimizer = kind(params.items(), tau, variant="released", **options)
    for t in range(steps):
        for name, p in params.items():
            p.grad = found[f"grad.{t}"][name].clone()
        optimizer.step()
        for name, want in found[f"policy.{t + 1}"].items():
            assert_close(params[name], want, 1e-6, what=f"{name} after step {t + 1}")
            assert (params[name] - want).norm() <= 1e-6 * want.norm()
    moved = {k: (found["policy.1"][k] - found["reference"][k]).abs().max() for k in params}
    assert all(torch.tensor(list(moved.values())) > 1e-5), "the trajectory is long enough to tell"


@pytest.mark.parametrize(
    "case", [c for c in NAMES if not {"online_step", "rescale"} & INDEX[c]["hyperparameters"].keys()]
)
def test_the_slow_side_of_the_benchmarks_is_the_released_arithmetic(case: str) -> None:
    found, options, steps = parts(case)
    naive = runpy.run_path(str(GOLDEN.parent.parent / "benchmarks" / "naive_released.py"))
    kind = naive["NaiveOnDARE" if INDEX[case]["optimizer"] == "ondare" else "NaiveOnTIES"]
    tau = {k: found["reference"][k] - found["base"][k] for k in found["base"]}
    params = {k: nn.Parameter(v.clone()) for k, v in found["reference"].items()}
    optimizer = kind(params.items(), tau, **{k: v for k, v in options.items() if k not in {"every", "rescale"}})
    for t in range(steps):
        for name, p in params.items():
            p.grad = found[f"grad.{t}"][name].clone()
        optimizer.step()
    for name, want in found[f"policy.{steps}"].items():
        assert_close(params[name], want, 1e-6, what=name)
