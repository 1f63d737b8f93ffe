"""What `paretune measure` costs beside lm-evaluation-harness itself: CPU seconds of whole processes.

python benchmarks/measure/run.py WORK [--items 1000] [--ratios 9]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORDS = "the a cat dog bird fish sees likes finds big small red blue green please thanks no yes good bad and".split()
SPECIAL = ["<pad>", "<unk>", "<eos>"]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
num_fewshot: 0
"""
GENERATE = """\
output_type: generate_until
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
generation_kwargs: {until: ["<eos>"], do_sample: false, max_gen_toks: 8}
"""
CHOOSE = """\
output_type: multiple_choice
doc_to_choice: ["please", "thanks", "no", "yes"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def make(work: Path, items: int, ratios: list[float]) -> None:
    """Two checkpoints of 0.36M parameters, their merges, two tasks with half of the items each, and a suite."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import paretune as pt

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    for seed, name in enumerate(("pre", "post")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    for ratio in ratios:
        out = work / f"merged-{ratio:g}"
        pt.merge("linear", {str(work / "pre"): ratio, str(work / "post"): 1 - ratio}, out=out, normalize=False)
        tokenizer.save_pretrained(out)
    rng = random.Random(0)
    half = items // 2
    for name, kind in (("generate", GENERATE), ("choose", CHOOSE)):
        rows = [
            {"question": " ".join(rng.choices(WORDS, k=20)), "answer": "please", "label": rng.randrange(4)}
            for _ in range(half)
        ]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (work / f"{name}.yaml").write_text(TASK.format(name=name, file=work / f"{name}.jsonl") + kind)
    (work / "suite.yaml").write_text(
        f"suite: cost\ntasks:\n"
        f"  - {{task: generate, harness: {work}/generate.yaml, metric: exact_match, category: a}}\n"
        f"  - {{task: choose, harness: {work}/choose.yaml, metric: acc, category: b}}\n"
    )
    pair = {"prompt": "the cat sees", "chosen": " please thanks", "rejected": " no"}
    (work / "pairs.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "prompt": "a dog"}) + "\n")


def cpu(command: list[str], log: Path) -> float:
    """CPU seconds (user and system) of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as file:
        subprocess.run(command, check=True, stdout=file, stderr=file)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(work: Path, ratios: list[float]) -> float:
    """All ratios, and the reference, in one process of `paretune measure`."""
    (work / "points.jsonl").unlink(missing_ok=True)
    command = [sys.executable, "-m", "paretune.cli.main", "measure", "--reference", work / "pre", "--suite"]
    command += [work / "suite.yaml", "--pre", work / "pre", "--post", work / "post", "--preferences"]
    command += [work / "pairs.jsonl", "--ratios", ",".join(f"{r:g}" for r in ratios), "-o", work / "points.jsonl"]
    return cpu([*map(str, command), "--quiet", "--device", "cpu", "--batch-size", "8"], work / "ours.log")


def theirs(work: Path, ratio: float) -> float:
    """One merged checkpoint by lm-evaluation-harness's own command."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
    command += [f"pretrained={work}/merged-{ratio:g},dtype=float32", "--tasks", f"{work}/generate.yaml"]
    command += [f"{work}/choose.yaml", "--device", "cpu", "--batch_size", "8", "--log_samples", "--output_path"]
    return cpu([*map(str, command), f"{work}/theirs-{ratio:g}"], work / "theirs.log")


def same_scores(work: Path, ratios: list[float]) -> bool:
    """Whether both said the same of every item."""
    from paretune.evaluation.points import read_points

    points = {point.label: point for point in read_points(work / "points.jsonl")}
    for ratio in ratios:
        for task, metric in (("generate", "exact_match"), ("choose", "acc")):
            (file,) = (work / f"theirs-{ratio:g}").rglob(f"samples_{task}_*.jsonl")
            rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
            if [float(row[metric]) for row in rows] != list(points[f"{ratio:g}"].capability_items[task].scores):
                return False
    return True


def overhead(work: Path) -> dict[str, float]:
    """CPU seconds of a point inside and outside lm-evaluation-harness, in one process, after a first point."""
    from lm_eval import evaluator

    from paretune.evaluation.capability import Benchmarks
    from paretune.evaluation.paired import against, measurement
    from paretune.evaluation.points import ItemScores, write_points
    from paretune.evaluation.suite import load
    from paretune.generation import load as load_model
    from paretune.generation import model_fingerprint

    benchmarks = Benchmarks(load(str(work / "suite.yaml")))
    models = {name: load_model(str(work / name), device="cpu") for name in ("pre", "post")}
    rewards = ItemScores.of([0.0, 1.0], "ab")
    reference = measurement("pre", "reference", rewards, benchmarks.measure(*models["pre"]).items)
    inside = 0.0
    evaluate = evaluator.evaluate

    def timed(*given: Any, **more: Any) -> Any:
        nonlocal inside
        started = time.process_time()
        try:
            return evaluate(*given, **more)
        finally:
            inside += time.process_time() - started

    evaluator.evaluate = timed
    try:
        started = time.process_time()
        model_fingerprint(models["post"][0])
        point = measurement("post", "offline", rewards, benchmarks.measure(*models["post"]).items)
        write_points(work / "one.jsonl", against(reference, [point]))
        total = time.process_time() - started
    finally:
        evaluator.evaluate = evaluate
    return {"harness": inside, "ours": total - inside, "overhead": (total - inside) / inside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--ratios", type=int, default=9)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    ratios = [round(i / (arguments.ratios - 1), 6) for i in range(arguments.ratios)]
    import torch

    torch.set_num_threads(1)
    make(work, arguments.items, ratios)
    facts: dict[str, Any] = {"items": arguments.items, "ratios": arguments.ratios, **overhead(work)}
    facts["one process"] = ours(work, ratios)
    runs = [theirs(work, ratio) for ratio in ratios]
    facts |= {"separate": sum(runs), "share": facts["one process"] / sum(runs), "equal": same_scores(work, ratios)}
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in facts.items()}))


if __name__ == "__main__":
    main()
