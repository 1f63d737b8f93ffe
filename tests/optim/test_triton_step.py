"""The Triton step gives the bits of the eager one in Triton's interpreter, and compiles for the cards it is meant for.

Needs a python that has Triton: PARETUNE_TRITON_PYTHON, or this one. Nothing here runs on a card.
"""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import paretune as pt
from paretune import native
from paretune.errors import ArgumentError
from paretune.operators import METHODS
from paretune.optim.kernels import compiled, entries
from paretune.optim.parts import whole
from paretune.optim.rule import DenseUpdate, Piece, Rule
from paretune.optim.tau import Tau

HERE = Path(__file__).parent
PYTHON = os.environ.get("PARETUNE_TRITON_PYTHON") or (sys.executable if find_spec("triton") else "")
needs_triton = pytest.mark.skipif(
    not PYTHON, reason="Triton is not installed, and PARETUNE_TRITON_PYTHON names no python that has it"
)


def _names(variable: str) -> list[str]:
    """The keys of a dictionary in `triton_cases`, which this python may not be able to import."""
    for node in ast.parse((HERE / "triton_cases.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict) and node.target.id == variable:  # type: ignore[union-attr]
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise LookupError(variable)


def _run(script: str, *arguments: str, interpret: bool, cache: Path) -> dict[str, Any]:
    own = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(HERE.parent)}
    environment = {**os.environ, **own}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [PYTHON, str(HERE / script), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _run("triton_cases.py", interpret=True, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def slow_findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _run("triton_cases.py", "slow", interpret=True, cache=tmp_path_factory.mktemp("cache"))


@needs_triton
@pytest.mark.parametrize("case", _names("CASES"))
def test_same_bits(findings: dict[str, str], case: str) -> None:
    assert findings[case] == ""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", _names("SLOW"))
def test_same_bits_more(slow_findings: dict[str, str], case: str) -> None:
    assert slow_findings[case] == ""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_as_meant(tmp_path: Path, capability: int) -> None:
    found = _run("triton_binaries.py", str(capability), interpret=False, cache=tmp_path)
    for name, counts in found.items():
        assert counts["binary"] > 0
        assert counts["approximate"] == 0, name
        # two for each element that a thread has of a tile, with and without a mask; the loads of the latter are wide
        each = {"advance": 2 * 2 * 8, "advance_and_collect": 2 * 2 * 8, "sample": 2 * 8}.get(name.split()[0], 0)
        assert counts["fused"] == each, f"{name}: torch's roundings are not kept"
        assert counts["wide"] >= 5 or not name.startswith("advance")


@pytest.mark.parametrize("density", [5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1 / 16])
def test_masks_do_not_depend_on_whose_logarithm_it_is(density: float) -> None:
    """⌊log u / log(1−p)⌋ is the same for every u that can be drawn if log u is right to two units in the last place."""
    if numpy.finfo(numpy.longdouble).nmant < 63:
        pytest.skip("no wider numbers than float64 here")
    factor = numpy.longdouble(1 / math.log1p(-density))
    steps = numpy.arange(1, int(33 * math.log(2) * abs(float(factor))), dtype=numpy.longdouble)
    # the draws next to where the quotient is a whole number: u = (i + ½)/2³²
    nearest = numpy.floor(numpy.exp(steps / factor) * 2**32 - 0.5)
    for i in (nearest + offset for offset in (-1, 0, 1, 2)):
        inside = (i >= 0) & (i < 2**32)
        quotient = numpy.log((i[inside] + 0.5) / 2**32) * factor
        off = numpy.abs(quotient - steps[inside]) / steps[inside]
        assert off.min() > 3 * 2.0**-52


@pytest.mark.parametrize("name", ["ondare", "ondare-released"])
def test_entries_read_ahead_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(entries, "_BATCH", 300)  # several batches
    shapes = {"a": (70_001,), "b": (3,), "c": (100, 200)}
    reference = {key: torch.randn(shape) for key, shape in shapes.items()}
    tau = Tau(pt.TaskVector.between(base={key: x + 1 for key, x in reference.items()}, reference=reference))
    rule = Rule(METHODS[name].sparsifier(0.01, "none"), METHODS[name].consensus, seed=2, released=name != "ondare")
    pieces = [Piece(key, DenseUpdate(x.view(-1)), whole(x.numel())) for key, x in reference.items()]
    for call in (0, 1, 2, 7, 8, 3, 4):  # on, forward and back
        for some in (pieces, pieces[:2]):
            found = entries.drawn(some, rule, tau, call, torch.device("cpu"))
            _, index, values = rule.drawn(some, tau, call)
            assert found.counts == [one.numel() for one in index]
            assert torch.equal(found.places, torch.cat(index).int())
            assert torch.equal(found.values, values)
    assert len(entries._AHEAD[tau]) == 2


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in ("paretune.optim.kernels.triton_step", "paretune.optim.kernels.triton_kernels"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = pt.OnDARE([("w", p)], None, density=0.01, weight=0.0)
    p.grad = torch.ones(3)
    with pytest.raises(ArgumentError, match=r"PARETUNE_KERNELS.*triton.*pip install triton"):
        optimizer.step()
    assert not optimizer.state[p]["exp_avg"].any()
    assert native.kernels() is native._loaded()  # merging has no such kernels


@needs_triton
def test_without_a_card_it_is_refused(tmp_path: Path) -> None:
    code = """
import os, torch
os.environ["PARETUNE_KERNELS"] = "triton"
torch.cuda.is_available = lambda: False
from paretune.operators import METHODS
from paretune.optim.kernels import compiled, entries
from paretune.optim.parts import whole
from paretune.optim.rule import DenseUpdate, Piece, Rule
from paretune.optim.tau import Tau
try:
    compiled()
except ValueError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "there is no CUDA device" in done.stdout


def test_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "compile")
    with pytest.raises(ArgumentError, match=r"PARETUNE_KERNELS.*compile.*slower"):
        compiled()
