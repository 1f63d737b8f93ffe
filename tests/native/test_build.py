"""The compiled kernels are optional: no compiler is no error, and another compiler gives the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import gradients, pair, parameters, run
from safetensors.torch import load_file, save_file
from torch import Tensor

import paretune as pt
from paretune import native

ROOT = Path(__file__).parents[2]


there = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="an installed package has no setup.py")


def build(compiler: str, folder: Path) -> list[Path]:
    pytest.importorskip("setuptools")
    environment = os.environ | ({"CC": compiler} if compiler else {})
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp"]
    done = subprocess.run(
        [*command, str(folder / "temp")], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(folder.rglob("_kernels*.so"))


@pytest.mark.slow
@there
@pytest.mark.parametrize("compiler", ["", "/bin/false", "/no/such/compiler"])
def test_no_compiler_is_no_error(compiler: str, tmp_path: Path) -> None:
    built = build(compiler, tmp_path)
    assert not (compiler and built)


@pytest.mark.slow
@there
@pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
def test_clang_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (built,) = build("clang", tmp_path)
    monkeypatch.setattr(native, "__file__", str(built))
    library = native._loaded.__wrapped__()
    assert library is not None
    monkeypatch.setattr(native, "_loaded", lambda: library)
    reference, dense, tau = pair(0, {"w": (300, 211), "b": (300,)})
    for side, values in (("a", reference), ("base", {name: reference[name] - dense[name] for name in reference})):
        save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / f"{side}.safetensors")

    def found(choice: str) -> list[Tensor]:
        monkeypatch.setenv(native.VARIABLE, choice)
        out = []
        for kind in ("OnDARE", "OnTIES"):
            params = parameters(reference)
            optimizer = getattr(pt, kind)(params.items(), tau, density=0.05, weight=0.1)
            run(optimizer, params, gradients(3, {name: tuple(value.shape) for name, value in reference.items()}))
            out += [p.detach() for p in params.values()]
        for method in ("ties", "dare_linear"):
            out_folder = tmp_path / f"{method}-{choice}"
            a, base = (str(tmp_path / f"{side}.safetensors") for side in ("a", "base"))
            pt.merge(method, {a: 0.7}, base=base, out=out_folder, density=0.3)
            merged = load_file(next(out_folder.glob("*.safetensors")))
            out += [merged[name] for name in sorted(merged)]
        return out

    for eager, compiled in zip(found("eager"), found("native"), strict=True):
        assert torch.equal(eager, compiled)
