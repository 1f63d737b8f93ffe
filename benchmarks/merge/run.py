"""Every figure of merging, measured: CPU seconds of whole processes, interleaved with the peer, medians.

    python benchmarks/merge/run.py WORK [--size 0.35B] [--repeats 3] [--only copy,mergekit,memory,selection,sweep,live]

WORK holds the generated checkpoints and the results (5 GB for 0.35B; 20 GB more for the 4 GB tensor of ``memory``).
mergekit takes part where PARETUNE_MERGEKIT_PYTHON names a python that has it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import config, make

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MERGEKIT = os.environ.get("PARETUNE_MERGEKIT_PYTHON", "")
COMMAND = [sys.executable, "-m", "paretune.cli.main", "merge"]


PEAK = """
import sys
from paretune.cli.main import main
status = main(sys.argv[1:])
with open("/proc/self/status") as stream:
    print(next(line.split()[1] for line in stream if line.startswith("VmHWM")))
sys.exit(status)
"""


def peak_mb(arguments: list[str], out: Path) -> float:
    """Peak resident MB of a merge, as the process itself sees it: what wait4 reports starts at its parent's size."""
    remove(out)
    command = [sys.executable, "-c", PEAK, "merge", *arguments, "-o", str(out), "--quiet"]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=True)
    remove(out)
    return int(done.stdout.split()[-1]) / 1024


def cpu(command: list[str], out: Path | None = None) -> float:
    """CPU seconds of a process; what it writes is removed before and after."""
    if out is not None:
        remove(out)
    process = subprocess.Popen(command, env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {error.decode()[-2000:]}")
    if out is not None:
        remove(out)
    return usage.ru_utime + usage.ru_stime


def remove(path: Path) -> None:
    for each in (path, path.with_name(path.name + ".merging")):
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink(missing_ok=True)


def warm(directories: list[Path]) -> None:
    """Read the models, so that all competitors find them in the page cache."""
    for directory in directories:
        for file in directory.glob("*.safetensors"):
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def methods(paths: list[Path]) -> dict[str, tuple[list[str], dict[str, Any], list[Path]]]:
    """Method → our arguments, mergekit's recipe, the models that are read."""
    base, a, b = map(str, paths[:3])

    def entry(model: str, **parameters: float) -> dict[str, Any]:
        return {"model": model, "parameters": parameters}

    pair = ["--model", f"{a}=0.7", "--model", f"{b}=0.3", "--base", base]
    both = {"base_model": base, "dtype": "bfloat16"}
    return {
        "linear": (
            ["linear", "--model", f"{base}=0.7", "--model", f"{a}=0.3"],
            {"merge_method": "linear", "models": [entry(base, weight=0.7), entry(a, weight=0.3)], "dtype": "bfloat16"},
            paths[:2],
        ),
        "task_arithmetic": (
            ["task_arithmetic", *pair],
            {"merge_method": "task_arithmetic", "models": [entry(a, weight=0.7), entry(b, weight=0.3)], **both},
            paths[:3],
        ),
        "dare_linear": (
            ["dare_linear", *pair, "--density", "0.5"],
            {
                "merge_method": "dare_linear",
                "models": [entry(a, weight=0.7, density=0.5), entry(b, weight=0.3, density=0.5)],
                **both,
            },
            paths[:3],
        ),
        "slerp": (
            ["slerp", "--model", base, "--model", a, "--t", "0.3"],
            {"merge_method": "slerp", "models": [{"model": base}, {"model": a}], "parameters": {"t": 0.3}, **both},
            paths[:2],
        ),
        "ties": (
            ["ties", *pair, "--density", "0.2"],
            {
                "merge_method": "ties",
                "models": [entry(a, weight=0.7, density=0.2), entry(b, weight=0.3, density=0.2)],
                **both,
            },
            paths[:3],
        ),
    }


def against_mergekit(work: Path, paths: list[Path], repeats: int) -> dict[str, Any]:
    """CPU of mergekit ÷ ours, whole processes, one after the other."""
    import yaml

    found: dict[str, Any] = {}
    driver = Path(MERGEKIT).with_name("mergekit-yaml") if MERGEKIT else None
    cases = methods(paths)
    taken: dict[str, dict[str, list[float]]] = {name: {"ours": [], "mergekit": []} for name in cases}
    for _ in range(repeats):
        for name, (arguments, recipe, read) in cases.items():
            warm(read)
            out = work / "out"
            taken[name]["ours"].append(cpu([*COMMAND, *arguments, "-o", str(out), "--quiet", "--workers", "1"], out))
            print(f"  {name}: ours {taken[name]['ours'][-1]:.2f} s", file=sys.stderr, flush=True)
            if driver is not None:
                (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
                warm(read)
                command = [str(driver), "--quiet", "--no-copy-tokenizer", str(work / "recipe.yaml"), str(out)]
                taken[name]["mergekit"].append(cpu(command, out))
                print(f"  {name}: mergekit {taken[name]['mergekit'][-1]:.2f} s", file=sys.stderr, flush=True)
    for name, both in taken.items():
        row: dict[str, Any] = {"ours_s": round(statistics.median(both["ours"]), 2)}
        if both["mergekit"]:
            ratios = [m / o for m, o in zip(both["mergekit"], both["ours"], strict=True)]
            row |= {
                "mergekit_s": round(statistics.median(both["mergekit"]), 2),
                "ratio": round(statistics.median(ratios), 2),
                "ratios": [round(ratio, 2) for ratio in ratios],
            }
        found[name] = row
        print(f"  {name}: {row}", flush=True)
    return found


ENGINE = """
import json, sys, time
from paretune.merging import merge
method, weights, base, out = json.loads(sys.argv[1])
started = time.process_time()
merge(method, weights, base, out, workers=1)
print(time.process_time() - started)
"""


def against_copy(work: Path, paths: list[Path], repeats: int) -> dict[str, Any]:
    """Work ÷ (cp one input + cat the others): CPU of a merge without starting python, and of copies around it.

    What the kernel takes for a page that it has not handed out before varies tenfold on virtual machines: more repeats.
    """
    cases = {
        "linear": ("linear", [0.7, 0.3], False),
        "task_arithmetic": ("task_arithmetic", [0.7, 0.3], True),
        "soup of 3": ("linear", [0.5, 0.3, 0.2], False),
    }
    found: dict[str, Any] = {}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(max(7, repeats)):
        for name, (method, weights, based) in cases.items():
            read = paths[: len(weights) + based]
            models = dict(zip(map(str, read[1:] if based else read), weights, strict=True))
            arguments = json.dumps([method, models, str(paths[0]) if based else None, str(work / "out")])
            warm(read)
            copies = [copied(work, read)]
            remove(work / "out")
            command = [sys.executable, "-c", ENGINE, arguments]
            done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=True)
            remove(work / "out")
            copies.append(copied(work, read))
            taken[name].append((float(done.stdout), sum(copies) / 2))
            print(f"  {name}: {float(done.stdout):.2f} s, copies {copies}", file=sys.stderr, flush=True)
    for name, pairs in taken.items():
        ratios = [round(ours / copy, 2) for ours, copy in pairs]
        found[name] = {
            "ratio": round(statistics.median(ratios), 2),
            "ours_s": round(statistics.median(ours for ours, _ in pairs), 2),
            "copy_s": round(statistics.median(copy for _, copy in pairs), 2),
            "least ÷ least": round(min(ours for ours, _ in pairs) / min(copy for _, copy in pairs), 2),
            "ratios": ratios,
        }
        print(f"  {name}: {found[name]}", flush=True)
    return found


def copied(work: Path, read: list[Path]) -> float:
    """CPU of cp of one file and cat of the others."""
    target = work / "copy"
    seconds = cpu(["cp", str(read[0] / "model.safetensors"), str(target)], target)
    return seconds + sum(cpu(["cat", str(other / "model.safetensors")]) for other in read[1:])


def sweep(work: Path, paths: list[Path], repeats: int) -> dict[str, Any]:
    """A sweep of 9 ÷ 9 single merges."""
    pair = ["linear", "--model", str(paths[0]), "--model", str(paths[1])]
    ratios = []
    for _ in range(repeats):
        warm(paths[:2])
        command = [*COMMAND, *pair, "-o", str(work / "out"), "--quiet", "--workers", "1"]
        together = cpu([*command, "--sweep", "weight=0.1:0.9:0.1"], work / "out")
        single = 0.0
        for tenth in range(1, 10):
            weighted = [f"{paths[0]}={1 - tenth / 10:.1f}", f"{paths[1]}={tenth / 10:.1f}"]
            alone = [*COMMAND, "linear", "--model", weighted[0], "--model", weighted[1]]
            single += cpu([*alone, "-o", str(work / "out"), "--quiet", "--workers", "1"], work / "out")
        ratios.append(round(together / single, 3))
    found = {"ratio": statistics.median(ratios), "ratios": ratios}
    print(f"  {found}", flush=True)
    return found


LIVE = """
import sys, time, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
import paretune as pt
pre, post = sys.argv[1:]
process = time.process_time()
loads = []
for i in range(4):
    t = time.process_time(); model = AutoModelForCausalLM.from_pretrained(post, dtype="auto")
    loads.append(time.process_time() - t)
t = time.process_time(); AutoModelForCausalLM.from_pretrained(post, dtype=torch.float32)
copied = time.process_time() - t
live = pt.LiveMerge(model, pre=pre, post=post)
live.set(0.5)  # the first one also copies the pages that from_pretrained has mapped
sets = []
for i in range(3):
    t = time.process_time(); live.set(0.1 + 0.2 * i); sets.append(time.process_time() - t)
print(process + loads[0], loads[0], sorted(loads[1:])[1], copied, sorted(sets)[1])
"""


def live(work: Path, paths: list[Path], repeats: int) -> dict[str, Any]:
    """LiveMerge.set ÷ from_pretrained."""
    del work
    rows = []
    for _ in range(repeats):
        warm(paths[:2])
        command = [sys.executable, "-c", LIVE, str(paths[0]), str(paths[1])]
        done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=True)
        rows.append(list(map(float, done.stdout.split())))
    found: dict[str, Any] = {"set_s": round(statistics.median(row[-1] for row in rows), 2)}
    names = ("a process that loads the model", "the first load", "a further load, mapped", "a further load, converted")
    for column, name in enumerate(names):
        found[name] = {
            "s": round(statistics.median(row[column] for row in rows), 2),
            "set ÷ it": round(statistics.median(row[-1] / row[column] for row in rows), 3),
        }
    print(f"  {found}", flush=True)
    return found


def selection(work: Path, paths: list[Path], repeats: int) -> dict[str, Any]:
    """The exact k-th magnitude of a task vector and all that follows from it, in ns an element: read where it lies."""
    del work, paths
    from paretune.merging.kernels import Kernel
    from paretune.merging.methods import METHODS
    from paretune.merging.selection import find_cut

    found: dict[str, Any] = {}
    kernel = Kernel(METHODS["ties"])
    for n in (1 << 22, 1 << 26):
        for kind in ("F32", "BF16"):  # hardly any ties; many
            pair = [in_memory(n, kind, seed) for seed in (1, 0)]
            magnitudes = kernel._arithmetic().magnitudes(*pair)
            times = []
            for _ in range(max(5, repeats)):
                started = time.process_time()
                cut = find_cut(magnitudes, n // 5)
                times.append((time.process_time() - started) / n * 1e9)
            name = f"{n >> 20}M elements, {kind}, {cut.tied} tie"
            found[name] = round(statistics.median(times), 2)
            print(f"  {name}: {found[name]} ns", flush=True)
    return found


def in_memory(n: int, kind: str, seed: int) -> Any:
    """A tensor that lies in memory as a checkpoint's tensor would."""
    from paretune.merging.numbers import STORED, narrow
    from paretune.merging.views import Stored

    values = np.random.default_rng(0).standard_normal(n, np.float32) * np.float32(0.02)
    if seed:
        values += np.random.default_rng(seed).standard_normal(n, np.float32) * np.float32(0.001)
    stored = np.empty(n, STORED[kind])
    narrow(values, kind, stored, np.empty(n, np.uint32))
    view = Stored.__new__(Stored)
    view.kind, view.shape, view._values, view._address = kind, (n,), stored, None
    view.release = lambda start, stop: None  # type: ignore[method-assign]
    return view


def memory(work: Path, paths: list[Path], repeats: int) -> dict[str, Any]:
    """Peak resident memory with one tensor of 4 GB: linear, DARE, and TIES with heavy ties."""
    del repeats
    found = {name: round(peak_mb(case[0], work / "out")) for name, case in methods(paths).items()}
    print(f"  {found}", flush=True)
    big = [one_tensor(work / "big" / str(seed), seed) for seed in range(3)]
    base, a, b = map(str, big)
    for name, arguments in {
        "linear": ["linear", "--model", base, "--model", a],
        "ties, heavy ties": ["ties", "--model", a, "--model", b, "--base", base, "--density", "0.2"],
    }.items():
        for workers in ("1", "2"):
            if name != "linear" and workers == "2":
                continue
            found[f"one tensor of 4 GB, {name}, {workers} workers"] = round(
                peak_mb([*arguments, "--workers", workers], work / "out")
            )
            print(f"  {found}", flush=True)
    shutil.rmtree(work / "big")
    return found


def one_tensor(directory: Path, seed: int) -> Path:
    """A model of one bf16 tensor of 4 GB; differences between the models take few values."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    rows, columns = 1 << 16, 1 << 15
    size = rows * columns * 2
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    common = base.standard_normal(1 << 22, np.float32).view(np.uint32) >> 16
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for _ in range(size // (common.size * 2)):
            moved = common + (own.integers(0, 4, common.size, dtype=np.uint32) if seed else 0)
            stream.write(moved.astype(np.uint16).tobytes())
    (directory / "config.json").write_text(json.dumps(config("tiny")))
    return directory


PARTS: dict[str, Callable[[Path, list[Path], int], dict[str, Any]]] = {
    "copy": against_copy,
    "mergekit": against_mergekit,
    "sweep": sweep,
    "live": live,
    "selection": selection,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", default="0.35B")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    paths = make(arguments.work, arguments.size, 2)
    file = arguments.work / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results |= {"size": arguments.size, "repeats": arguments.repeats}
    for name in arguments.only.split(","):
        print(name, flush=True)
        results[name] = PARTS[name](arguments.work, paths, arguments.repeats)
        file.write_text(json.dumps(results, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
