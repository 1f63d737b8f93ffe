"""Peak resident memory stays small whatever the size of a tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import paretune as pt
from paretune import native

ROWS, COLUMNS = 1 << 15, 7_000  # 459 MB in bf16, 918 MB in float32
PEAK = """
import sys
from paretune.cli.main import main
assert main(sys.argv[1:]) == 0
with open("/proc/self/status") as stream:
    print(next(line.split()[1] for line in stream if line.startswith("VmHWM")))
"""


def one_tensor(directory: Path, seed: int) -> str:
    """A model of one tensor; the models' differences take few values, so that task vectors tie heavily."""
    directory.mkdir()
    size = ROWS * COLUMNS * 2
    header = json.dumps({"w": {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    common = np.random.default_rng(0).standard_normal(1 << 20, np.float32).view(np.uint32) >> 16
    moved = (common + np.random.default_rng(seed).integers(0, 4 if seed else 1, common.size)).astype(np.uint16)
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        left = ROWS * COLUMNS
        while left:
            stream.write(moved[:left].tobytes())
            left -= min(left, moved.size)
    (directory / "config.json").write_text("{}")
    return str(directory)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("kernels", ["eager", "native"])
def test_a_tensor_larger_than_the_limit(kernels: str, tmp_path: Path) -> None:
    if kernels == "native" and native._loaded() is None:
        pytest.skip("the kernels are not built")
    base, a, b = (one_tensor(tmp_path / str(seed), seed) for seed in range(3))
    pair = ["--model", a, "--model", b]
    sources = str(Path(pt.__file__).parent.parent)
    environment = os.environ | {native.VARIABLE: kernels, "PYTHONPATH": sources, "OPENBLAS_NUM_THREADS": "1"}
    merges = {"ties": ["ties", *pair, "--base", base, "--density", "0.2"]}
    if kernels == "native":
        merges |= {"slerp": ["slerp", *pair], "dare": ["dare_ties", *pair, "--base", base, "--rescale", "l1"]}
    for name, arguments in merges.items():
        command = ["merge", *arguments, "-o", str(tmp_path / name), "--quiet", "--workers", "2"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1]) / 1024 < 350, name
        (tmp_path / name / "model.safetensors").unlink()
