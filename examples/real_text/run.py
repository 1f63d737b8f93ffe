"""Base, SFT and DPO on real text, all from files on disk, through the command line: see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# One thread: reproducible to the bit, and the fastest for a model of this size.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from prepare import DEMONSTRATIONS, PREFERENCES, QUICK, Sizes, prepare

HERE = Path(__file__).resolve().parent
DEFAULT_DATA = HERE.parents[1] / ".." / "shared" / "data"
METHODS: dict[str, list[str]] = {
    "dpo-adamw": ["--optimizer", "adamw"],
    "dpo-ondare": ["--optimizer", "ondare", "--density", "0.5", "--pull", "0.1"],
    "dpo-onties": ["--optimizer", "onties", "--density", "0.2", "--pull", "0.1"],
}
CONTROLS: dict[str, list[str]] = {
    # Nothing merged and nothing dropped: this must be AdamW's model.
    "dpo-control": ["--optimizer", "ondare", "--density", "1", "--weight", "0"],
    # A mask of density 0.5 makes OnDARE's update on average that of half the learning rate.
    "dpo-adamw-half": ["--optimizer", "adamw", "--learning_rate", "1.5e-4"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/real_text"), help="directory of the run")
    parser.add_argument("--quick", action="store_true", help="everything much smaller, about a minute")
    parser.add_argument("--controls", action="store_true", help="also OnDARE that merges nothing, and AdamW at half lr")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = Path(os.environ.get("PARETUNE_DATA", DEFAULT_DATA))
    missing = [name for name in (DEMONSTRATIONS, PREFERENCES) if not (source / name).is_file()]
    if missing:
        absent = " and no ".join(missing)
        print(f"PARETUNE_DATA={str(source)!r}: no {absent} there; set it to their folder", file=sys.stderr)
        return 2
    sizes = QUICK if arguments.quick else Sizes()
    results = run(source, arguments.out, sizes, arguments.seed, METHODS | (CONTROLS if arguments.controls else {}))
    print("\n" + table(results) + f"\n\nwritten: {arguments.out / 'results.json'}")
    return 0


def run(source: Path, out: Path, sizes: Sizes, seed: int, methods: dict[str, list[str]]) -> dict[str, Any]:
    """All stages; returns what ``results.json`` holds."""
    import torch
    from measure import measure
    from pretrain import pretrain

    torch.set_num_threads(1)
    seconds: dict[str, dict[str, float]] = {}
    with timed(seconds, "prepare"):
        prepare(source, out, sizes, seed)
    with timed(seconds, "base"):
        loss = pretrain(out, sizes, seed)
    print(f"base: {loss:.2f} nats a token", flush=True)
    common = ["--seed", str(seed)]
    with timed(seconds, "reference"):
        paretune("train", "sft", "--config", HERE / "sft.yaml", "--model_name_or_path", out / "base",
                 "--dataset_name", out / "data" / "sft.jsonl", "--output_dir", out / "reference", *common)  # fmt: skip
    for name, options in methods.items():
        merging = ["--base_model", out / "base"] if options[1] != "adamw" else []
        with timed(seconds, name):
            paretune("train", "dpo", "--config", HERE / "dpo.yaml", "--model_name_or_path", out / "reference",
                     *merging, "--dataset_name", out / "data" / "dpo.jsonl", "--output_dir", out / name,
                     *options, *common)  # fmt: skip
    with timed(seconds, "measure"):
        measured = measure(out, ["base", "reference", *methods], sizes, seed)
    results = {"seed": seed, "sizes": vars(sizes), "methods": methods, "models": measured, "seconds": seconds}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def paretune(*arguments: object) -> None:
    """Run one ``paretune`` command in a process of its own, and show it."""
    command = [str(argument) for argument in arguments]
    print(f"\n$ paretune {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "paretune.cli.main", *command])
    if done.returncode:
        sys.exit(done.returncode)


@contextmanager
def timed(seconds: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Note a stage's wall and processor seconds, child processes included."""

    def used() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    wall, cpu = time.monotonic(), used()
    yield
    seconds[name] = {"wall": round(time.monotonic() - wall, 1), "cpu": round(used() - cpu, 1)}


def table(results: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    lines = [
        "| model | answer perplexity | ÷ reference | log-prob accuracy | − reference | margin accuracy | train |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results["models"].items():
        shown = [
            _cell(found["perplexity"], "{:.2f}"),
            "" if name == "reference" else _cell(found["perplexity_ratio"], "{:.3f}"),
            _cell(found.get("accuracy"), "{:.1%}"),
            "" if name == "reference" else _cell(found.get("accuracy_change"), "{:+.1%}"),
            _cell(found.get("margin_accuracy"), "{:.1%}"),
            f"{found['margin_accuracy_train']:.1%}" if "margin_accuracy_train" in found else "",
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    total = {kind: sum(stage[kind] for stage in results["seconds"].values()) for kind in ("wall", "cpu")}
    return "\n".join(lines) + f"\n\n{total['wall']:.0f} s wall, {total['cpu']:.0f} s of one processor"


def _cell(value: list[float] | tuple[float, ...] | None, form: str) -> str:
    if value is None:
        return ""
    middle, low, high = (form.format(number) for number in value)
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    sys.exit(main())
