"""What a step of learning ratios costs: CPU time and peak memory against a plain forward and backward pass.

    python benchmarks/averaging/ratio_step.py WORK [--rows 1] [--tokens 128] [--rounds 7] [--steps 3] [--json]

WORK keeps the two 87M-parameter checkpoints (700 MB). Every case is a process of its own, one thread; cases take turns.

plain       forward and backward of the samples' loss, gradients of all weights
ratios K=3  dial the model to the ratios, forward, backward with the inner products: everything of a step but Adam on K
ratios K=24 the same with a ratio a layer
autograd    the released way: both models in memory, autograd through interpolated weights
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = ("plain", "ratios K=3", "ratios K=24", "autograd")
LAYERS, VOCABULARY = 24, 32000


def make(work: Path) -> None:
    """``pre`` and ``post``: 24 layers, 87M parameters, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=448, intermediate_size=1216, num_hidden_layers=LAYERS, num_attention_heads=7,
        num_key_value_heads=7, max_position_embeddings=1024, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name in ("pre", "post"):
        model.save_pretrained(work / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))


def status(field: str) -> float:
    """A field of /proc/self/status, in MB."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(field)) / 1024


def step_of(case: str, work: Path, rows: int, tokens: int) -> tuple[Callable[[], Any], int]:
    """One step of a case, and the model's number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from paretune.averaging.blocks import lay_out
    from paretune.averaging.dialled import DialledModel
    from paretune.averaging.ends import Ends
    from paretune.averaging.samples import Sample, collate, nll

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, tokens))
    batch = collate([Sample(tuple(row), tokens // 4) for row in ids.tolist()])
    learned = int(batch["learned"].sum())

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32).eval()

    model = load("post")
    size = sum(parameter.numel() for parameter in model.parameters())
    if case == "plain":

        def plain() -> None:
            model.zero_grad(set_to_none=True)
            (nll(model, batch) / learned).backward()

        return plain, size
    ratio = torch.tensor(0.2, requires_grad=True)
    if case == "autograd":
        pre = {name: value.detach() for name, value in load("pre").named_parameters()}
        post = {name: value.detach() for name, value in model.named_parameters()}
        model.requires_grad_(False)

        class Loss(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> torch.Tensor:
                return nll(self.model, batch) / learned

        inner = Loss()

        def through_weights() -> None:
            ratio.grad = None
            between = {f"model.{name}": ratio * pre[name] + (1 - ratio) * post[name] for name in post}
            torch.func.functional_call(inner, between, ()).backward()

        return through_weights, size
    ends = Ends(work / "pre", work / "post")
    count = int(case.split("=")[1])
    dialled = DialledModel(
        model, ends, lay_out(ends.shapes, count), dict.fromkeys(("head", "embeddings", "norms"), 0.2)
    )
    ratios = torch.linspace(0.1, 0.3, count).tolist()

    def learn() -> None:
        dialled.dial(ratios)
        dialled.zero()
        (nll(model, batch) / learned).backward()

    return learn, size


def measure(case: str, work: Path, rows: int, tokens: int, steps: int) -> dict[str, Any]:
    """In this process: median CPU seconds of a step, and the peak of resident memory over the steps, in MB."""
    step, size = step_of(case, work, rows, tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on: loading is the same for all
    before = status("VmRSS")
    step()
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {"case": case, "parameters": size, "seconds": statistics.median(seconds), "peak": status("VmHWM"),
            "loaded": before}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(arguments.case, arguments.work, arguments.rows, arguments.tokens, arguments.steps)))
        return 0
    if not (arguments.work / "post" / "model.safetensors").exists():
        make(arguments.work)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for turn in range(arguments.rounds):
        for case in CASES[turn % len(CASES) :] + CASES[: turn % len(CASES)]:  # nobody is always first
            command = [sys.executable, __file__, str(arguments.work), "--case", case]
            command += [
                "--rows",
                str(arguments.rows),
                "--tokens",
                str(arguments.tokens),
                "--steps",
                str(arguments.steps),
            ]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[case].append(json.loads(done.stdout.splitlines()[-1]))
    middle = {
        case: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak", "loaded")}
        for case, runs in found.items()
    }
    if arguments.json:
        print(json.dumps({"parameters": found["plain"][0]["parameters"], "median": middle, "runs": found}))
        return 0
    plain = middle["plain"]
    print(
        f"{found['plain'][0]['parameters'] / 1e6:.1f}M parameters, {arguments.rows} x {arguments.tokens} tokens a step"
    )
    print(f"{'':12} {'s a step':>9} {'/ plain':>8} {'peak MB':>8} {'/ plain':>8}")
    for case, figures in middle.items():
        print(
            f"{case:12} {figures['seconds']:9.3f} {figures['seconds'] / plain['seconds']:8.3f} "
            f"{figures['peak']:8.0f} {figures['peak'] / plain['peak']:8.3f}"
        )
    print(f"K=24 / K=3, time: {middle['ratios K=24']['seconds'] / middle['ratios K=3']['seconds']:.3f}")
    print(f"ratios K=3 / autograd, peak: {middle['ratios K=3']['peak'] / middle['autograd']['peak']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
