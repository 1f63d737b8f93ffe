"""Compiles every Triton kernel for a CUDA architecture, without a card: prints JSON, kernel → what its PTX holds.

python tests/optim/triton_binaries.py 90
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paretune.optim.kernels import triton_kernels as kernels
from paretune.optim.kernels.triton_step import _OPTIONS

TYPES = {
    **dict.fromkeys(("table", "prefixes"), "*i64"),
    **dict.fromkeys(("owner", "places", "bounds", "found", "index", "out", "thresholds", "counts"), "*i32"),
    **dict.fromkeys(("numbers", "values", "chosen"), "*fp32"),
    **dict.fromkeys(("slope", "keep", "add", "eps", "own", "weight", "density", "clip", "factor"), "fp32"),
    "scale": "*fp64",
    "taken": "*i8",
    "theta": "*i16",
    "low": "*i16",
    "n": "i32",
}
PATTERNS = {
    "wide": r"ld\.global\.v4",
    "fused": r"fma\.rn\.f32",
    "approximate": r"div\.full|(div|sqrt|rcp|lg2|ex2)\.approx(\.ftz)?\.f32",
}


def counts(kernel: Any, capability: int, **constants: Any) -> dict[str, int]:
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else TYPES[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=_OPTIONS)
    ptx = compiled.asm["ptx"]
    return {"binary": len(compiled.asm["cubin"]), **{k: len(re.findall(p, ptx)) for k, p in PATTERNS.items()}}


def main() -> None:
    capability = int(sys.argv[1])
    found = {}
    for half in (False, True):
        common = {"NEAR": True, "HALF": half}
        for draws in (0, 128, 1024):
            constants = {**common, "SPLIT": half, "ALIGNED": True, "DRAWS": draws, "KIND": 0}
            found[f"advance {half} {draws}"] = counts(kernels.advance, capability, **constants)
        found[f"advance_and_collect {half}"] = counts(kernels.advance_and_collect, capability, **common, ALIGNED=True)
        found[f"sample {half}"] = counts(kernels.sample, capability, **common, SAMPLES=4096)
        for kind in (0, 1, 2):
            found[f"add_rest {half} {kind}"] = counts(kernels.add_rest, capability, SPLIT=half, KIND=kind)
            found[f"add_chosen {half} {kind}"] = counts(kernels.add_chosen, capability, SPLIT=half, KIND=kind)
    for shift, bits in ((20, 11), (0, 10)):
        found[f"tally {shift}"] = counts(kernels.tally, capability, SHIFT=shift, BITS=bits)
    found["scale_split"] = counts(kernels.scale_split, capability)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
