"""The compiled kernels: optional, so an installation without a C compiler does without them."""

import os
import platform

from setuptools import Extension, setup

ARGUMENTS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
if platform.machine() in ("x86_64", "AMD64"):
    ARGUMENTS.append("-mprefer-vector-width=512")  # in the clones for processors that have such registers
NATIVE = "src/paretune/native/"

setup(
    ext_modules=[
        Extension(
            "paretune.native._kernels",
            [NATIVE + name for name in ("merge.c", "measure.c", "step.c", "largest.c")],
            depends=[NATIVE + name for name in ("numbers.h", "vectors.h", "adam.h")],
            extra_compile_args=ARGUMENTS,
            libraries=[] if os.name == "nt" else ["m"],
            optional=True,
        )
    ]
)
