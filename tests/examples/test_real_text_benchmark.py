"""``benchmarks/real_text``: its rules, and on 20 rows that all of its pieces run."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "real_text"
DATA = Path(os.environ.get("PARETUNE_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_text_rules", FOLDER / "rules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_rules_examples(rules: ModuleType) -> None:
    assert doctest.testmod(rules).failed == 0


def test_what_a_model_wrote_is_never_run(rules: ModuleType) -> None:
    wild = [
        "<<__import__('os').abort()=1>>",
        "<<9**9**9**9=1>>",
        f"<<{'(' * 5000}=1>>",
        "<<1/0=1>>",
        "<<=>>",
        "<<1e999=1>>",
    ]
    for text in wild:
        assert rules.sums(text) == (1, 0)


def test_weights_are_those_of_a_logistic_regression(rules: ModuleType) -> None:
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    texts = ["\n".join(["1+1=<<1+1=2.0>>2"] * rng.integers(1, 5) + [f"A: {rng.integers(1, 3)}"]) for _ in range(80)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    x = np.stack([rules.features(a) - rules.features(b) for a, b in pairs])
    found = minimize(lambda w: np.logaddexp(0, -x @ w).sum() + 0.5 * w @ w, np.zeros(4), tol=1e-10)
    np.testing.assert_allclose(rules.Rules.learnt(pairs).weights, found.x, atol=1e-4)


def run(tmp_path: Path, *arguments: str, data: Path = DATA) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--out", str(tmp_path / "out")]
    command += ["--records", str(tmp_path / "records.jsonl"), *arguments]
    environment = {**os.environ, "PARETUNE_DATA": str(data)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_says_where_the_data_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, data=tmp_path)
    assert done.returncode == 2
    assert "PARETUNE_DATA" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def needs_data() -> None:
    if not (DATA / "gsm8k_preferences.jsonl.gz").is_file():
        pytest.skip(f"no data set in {DATA}: set PARETUNE_DATA to the folder with gsm8k_*.jsonl.gz")


def test_runs_on_twenty_rows(tmp_path: Path) -> None:
    needs_data()
    done = run(tmp_path, "--methods", "AdamW,scaled back")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["reference", "AdamW", "scaled back"]
    (reference,) = lines[0]["points"]
    assert reference["ratio"] == [1.0, 1.0, 1.0]
    assert reference["margin"] == [0.0, 0.0, 0.0]
    # Of four features none tells two equal answers apart.
    assert reference["reward"][0] == pytest.approx(0.5 * reference["finished"])
    ladder = {point["scale"]: point["margin"][0] for point in lines[2]["points"]}
    assert 0 < ladder[0.25] < ladder[0.5] < lines[1]["points"][0]["margin"][0]


@pytest.mark.slow
def test_every_method_runs_and_is_kept(tmp_path: Path) -> None:
    needs_data()
    assert run(tmp_path).returncode == 0
    kept = (tmp_path / "records.jsonl").read_text()
    assert len({json.loads(line)["method"] for line in kept.splitlines()}) == 10
    assert run(tmp_path).returncode == 0
    assert (tmp_path / "records.jsonl").read_text() == kept
    table = subprocess.run(
        [sys.executable, str(FOLDER / "table.py"), "--records", str(tmp_path / "records.jsonl")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "AdamW over lr" in table
