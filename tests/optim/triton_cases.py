"""What `test_triton_step` runs in Triton's interpreter, in a process of its own: prints JSON, case → finding.

    PYTHONPATH=tests TRITON_INTERPRET=1 python tests/optim/triton_cases.py [slow]

A finding is "" where the Triton step gave the bits of the eager one: parameters, low halves and moments.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

import paretune as pt
from paretune.optim.kernels import triton_step

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = {
    "pages": (301, 223),  # a page and a tail that no tile divides
    "page": (65_536,),
    "row": (20_003,),
    "odd": (17, 5),
    "one": (1,),
    "small": (16_384,),
    "next": (16_385,),
    "none": (0, 3),
}
RAN: dict[str, int] = {}


def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z rounded once, as on a card; the interpreter's own rounds twice."""
    product, addend = x.data.astype(numpy.float64) * y.data, z.data.astype(numpy.float64)  # exact
    wide = product + addend
    behind = wide - product
    lost = (product - (wide - behind)) + (addend - behind)  # exact, if finite
    # rounded to odd, so that the second rounding sees on which side of a tie the sum was
    even = wide.view(numpy.int64) & 1 == 0
    aside = numpy.nextafter(wide, numpy.where(lost > 0, numpy.inf, -numpy.inf))
    wide = numpy.where(even & ((lost > 0) | (lost < 0)), aside, wide)
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        RAN[name] = RAN.get(name, 0) + 1
        return function(*arguments)

    return call


def gradients(kind: str, steps: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)

    def draw(shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=generator) * 1e-3
        if kind == "rows":  # most of an embedding has no gradient
            x[torch.rand(shape, generator=generator) < 0.99] = 0
        if kind == "ties":
            x = x.sign() * 0.25
        if kind == "wild":
            x *= torch.exp2(torch.randint(-40, 60, shape, generator=generator).float())
            x[torch.rand(shape, generator=generator) < 0.01] = torch.nan
        return x

    return [{name: draw(shape) for name, shape in SHAPES.items()} for _ in range(steps)]


def trajectory(choice: str, method: str, kind: str, dtype: torch.dtype, options: dict[str, Any], tau: bool) -> Any:
    """Parameters and state after five steps, as bits; one parameter is frozen and one has no gradient at times."""
    os.environ["PARETUNE_KERNELS"] = choice
    generator = torch.Generator().manual_seed(1)
    reference = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    reference["row"][:100] = -0.0
    base = {name: x + torch.randn(x.shape, generator=generator) * 1e-2 for name, x in reference.items()}
    vector = pt.TaskVector.between(base=base, reference=reference) if tau else None
    params = {name: torch.nn.Parameter(x.to(dtype)) for name, x in reference.items()}
    if kind == "mixed":
        params["row"] = torch.nn.Parameter(reference["row"].bfloat16())
        params["page"] = torch.nn.Parameter(reference["page"].view(256, 256).t())
        vector = vector and pt.TaskVector.between(
            base={**base, "page": base["page"].view(256, 256)},
            reference={**reference, "page": reference["page"].view(256, 256)},
        )
    params["small"].requires_grad_(False)
    optimizer = getattr(pt, method)(params.items(), vector, **options)
    for step, some in enumerate(gradients(kind, 5)):
        for name, p in params.items():
            if p.requires_grad:
                p.grad = None if name == "odd" and step == 1 else some[name].view(p.shape).to(p.dtype)
        if kind == "clipped":
            torch.nn.utils.clip_grad_norm_(params.values(), 0.1)
        optimizer.step()
    found = {}
    for name, p in params.items():
        for key, x in [("θ", p.detach()), *sorted(optimizer.state[p].items())]:
            kinds = {F32: torch.int32, BF16: torch.int16, torch.int16: torch.int16}
            x = x if x.dtype == torch.int16 else x.nan_to_num(torch.nan)
            found[f"{name}.{key}"] = x.contiguous().view(kinds[x.dtype])
    return found


def compare(
    method: str, kind: str, dtype: torch.dtype, options: dict[str, Any], merged: str = "triton", tau: bool = True
) -> str:
    """``merged``: "triton", "both" where some merges are left to the eager form, "eager" for all of them."""
    eager = trajectory("eager", method, kind, dtype, options, tau)
    RAN.clear()
    found = trajectory("triton", method, kind, dtype, options, tau)
    ran = {("merge", "eagerly"): "both", ("merge",): "triton"}.get(tuple(sorted(RAN, reverse=True)), "eager")
    if ran != merged:
        return f"merged by {ran}, not {merged}"
    wrong = {name: int((x != eager[name]).sum()) for name, x in found.items()}
    return "; ".join(f"{name}: {count} of {found[name].numel()} differ" for name, count in wrong.items() if count)


def part() -> str:
    """A rank's part of a parameter, which begins and ends within a page: mask and τ are those of the whole."""
    from paretune.operators import METHODS
    from paretune.optim.adamw import AdamUpdate
    from paretune.optim.parts import Part
    from paretune.optim.rule import Piece, Rule
    from paretune.optim.tau import Tau
    from paretune.optim.weights import Weights

    n, start, stop = 250_000, 70_001, 150_003
    generator = torch.Generator().manual_seed(3)
    whole, base = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    tau = Tau(pt.TaskVector.between(base={"w": base}, reference={"w": whole}))
    rule = Rule(METHODS["ondare"].sparsifier(0.01, "none"), METHODS["ondare"].consensus, seed=4)
    results = []
    for cut in (Part(n, n, (0, 1), (start, stop)), Part(n, n, (0, 1), (0, n))):
        theta, g = whole[cut.range[0] : cut.range[1]].clone(), base[cut.range[0] : cut.range[1]].clone()
        update = AdamUpdate(torch.zeros(cut.n), torch.zeros(cut.n), 1.0, 1e-2, (0.9, 0.999), 1e-8, rounded=True)
        triton_step.Triton("cpu").merge(rule, [Piece("w", update, cut)], [Weights(theta)], [g], tau, 0.3, 7)
        results.append(theta)
    alone, of_whole = results[0], results[1][start:stop]
    moved = int((alone != whole[start:stop]).sum())
    return "" if torch.equal(alone, of_whole) and moved > 1000 else f"differs in {int((alone != of_whole).sum())}"


def golden(case: str) -> str:
    """A trajectory of the released code."""
    import test_golden

    os.environ["PARETUNE_KERNELS"] = "triton"
    RAN.clear()
    test_golden.test_optimizer(case)
    return "" if RAN.get("merge") else "the kernels did not run"


DARE = {"density": 0.01, "weight": 0.3}
TIES = {"density": 0.05, "weight": 0.3}
RELEASED = {"variant": "released", "weight_decay": 0.1}
CASES: dict[str, Callable[[], str]] = {
    "dare 5e-4": partial(compare, "OnDARE", "plain", F32, {"density": 5e-4, "weight": 0.3}),
    "dare bfloat16": partial(compare, "OnDARE", "clipped", BF16, {**DARE, "weight_decay": 0.1}),
    "dare density 1": partial(compare, "OnDARE", "plain", F32, {"density": 1.0, "weight": 0.3}, merged="eager"),
    "dare part": part,
    "ties 0.01": partial(compare, "OnTIES", "clipped", F32, {"density": 0.01, "weight": 5e-7, "weight_decay": 0.1}),
    "ties bfloat16": partial(compare, "OnTIES", "plain", BF16, {**TIES, **RELEASED}),
    "ties that tie": partial(compare, "OnTIES", "ties", F32, {**TIES, "density": 0.1}, merged="both"),
    "ties recorded": partial(golden, "onties_p05"),
}
SLOW: dict[str, Callable[[], str]] = {
    "dare weight 0": partial(compare, "OnDARE", "plain", F32, {"density": 0.01, "weight": 0.0}, tau=False),
    "dare released": partial(compare, "OnDARE", "plain", F32, {**DARE, **RELEASED, "density": 0.06, "clip": 0.1}),
    "ties recorded, weight decay": partial(golden, "onties_p20_weight_decay"),
    "dare mixed": partial(compare, "OnDARE", "mixed", F32, DARE),
    "ties mixed": partial(compare, "OnTIES", "mixed", F32, TIES),
    "dare expectation": partial(compare, "OnDARE", "rows", BF16, {**DARE, "rescale": "expectation", "eps": 0.0}),
    "ties expectation": partial(compare, "OnTIES", "plain", F32, {**TIES, "rescale": "expectation", "eps": 0.05}),
    "ties rows": partial(compare, "OnTIES", "rows", F32, {**TIES, "density": 0.002}),
    "ties rows, bfloat16": partial(compare, "OnTIES", "rows", BF16, {**TIES, "density": 0.24}),
    "ties that tie, bfloat16": partial(compare, "OnTIES", "ties", BF16, {**TIES, "density": 0.01}, merged="both"),
    "dare wild": partial(compare, "OnDARE", "wild", BF16, {**DARE, **RELEASED, "betas": (0.3, 0.9)}),
    "ties wild": partial(compare, "OnTIES", "wild", F32, {**TIES, "betas": (0.3, 0.9)}, merged="both"),
    "ties wild, bfloat16": partial(compare, "OnTIES", "wild", BF16, {**TIES, **RELEASED}, merged="both"),
    "dare learning rate 0": partial(compare, "OnDARE", "plain", F32, {**DARE, "lr": 0.0}),
    "ties learning rate 0": partial(compare, "OnTIES", "plain", F32, {**TIES, "lr": 0.0}),
    "dare every second step": partial(compare, "OnDARE", "plain", F32, {**DARE, "every": 2}, merged="eager"),
    "ties l1": partial(compare, "OnTIES", "plain", F32, {**TIES, "rescale": "l1"}, merged="eager"),
}


def main() -> None:
    logging.getLogger("paretune").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # numpy's, where the numbers are not finite
    torch.set_num_threads(1)
    interpreter.InterpreterBuilder.create_fma = fused
    triton_step._TOGETHER = 1 << 14  # several batches
    triton_step.Triton.merge = counted("merge", triton_step.Triton.merge)  # type: ignore[method-assign]
    triton_step._merge_eagerly = counted("eagerly", triton_step._merge_eagerly)
    findings = {}
    for name, run in (SLOW if "slow" in sys.argv else CASES).items():
        begin = time.process_time()
        try:
            findings[name] = run()
        except Exception:
            findings[name] = traceback.format_exc()
        print(f"{name}: {time.process_time() - begin:.1f} s", file=sys.stderr)
    print(json.dumps(findings))


if __name__ == "__main__":
    main()
