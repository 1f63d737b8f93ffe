"""The compiled kernels are optional: without a compiler the package builds without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="an installed package has no setup.py")
@pytest.mark.parametrize("compiler", ["", "/bin/false", "/no/such/compiler"])
def test_no_compiler_is_no_error(compiler: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    environment = os.environ | ({"CC": compiler} if compiler else {})
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp"]
    done = subprocess.run(
        [*command, str(tmp_path / "temp")], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if compiler:
        assert not list(tmp_path.rglob("_kernels*.so"))
