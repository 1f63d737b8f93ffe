"""Alignment tax on real text, and its cures: GSM8K questions, a base of 5 million parameters made here, DPO.

    python benchmarks/real_text/run.py --seed 0
    python benchmarks/real_text/table.py

Everything goes through paretune's public interface, as a user would type it. One thread; each method is made once and
dialled, θ(s) = θ_ref + s·(θ − θ_ref); a line of records.jsonl for each method; what is there is not made again.
See docs/real-text.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
                  TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")  # fmt: skip
HERE = Path(__file__).resolve().parent
# Data, tokenizer and base are those of the example.
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples" / "real_text")]

from setting import QUICK, STANDARD, Setting  # noqa: E402

DEFAULT_DATA = HERE.parents[1] / ".." / "shared" / "data"
Made = tuple[str, dict[str, Any], Callable[["Bench", dict[str, Any]], dict[str, Any]], tuple[float, ...]]


class Bench:
    """Base and reference of one seed, and how policies are made from them.

    Args:
        out: of the run; models lie in its sub-directories.
        source: the folder with the data sets.
        setting: how much of everything.
        seed: of all draws.
    """

    def __init__(self, out: Path, source: Path, setting: Setting, seed: int) -> None:
        from prepare import prepare, read_rows
        from pretrain import pretrain
        from transformers import AutoTokenizer

        self.out, self.setting, self.seed = out, setting, seed
        self.seconds: dict[str, float] = {}
        if not (out / "tokenizer").is_dir():
            prepare(source, out, setting.sizes, seed)
        if not (out / "base" / "config.json").is_file():
            before = time.process_time()
            pretrain(out, setting.sizes, seed)
            self.seconds["base"] = time.process_time() - before
        self.tokenizer: Any = AutoTokenizer.from_pretrained(out / "tokenizer")
        self.sft = str(out / "data" / "sft.jsonl")
        self.pairs = str(out / "data" / "dpo.jsonl")
        self.questions = [row["prompt"][0]["content"] for row in read_rows(Path(self.sft))]
        self.asked = sorted({row["prompt"][0]["content"] for row in read_rows(Path(self.pairs))})
        self._rehearsal: dict[str, Any] = {}
        if not (out / "reference" / "config.json").is_file():
            from paretune import SFT

            before = time.process_time()
            self.train("base", "reference", {"sft": SFT(self.sft)}, setting.sft_lr, setting.sft_steps)
            self.seconds["reference"] = time.process_time() - before

    def train(self, start: str, name: str, objectives: dict[str, Any], lr: float, steps: int, **further: Any) -> Any:
        """One run of the joint trainer, from one model's directory to another's."""
        from transformers import PrinterCallback, TrainingArguments

        import paretune as pt

        arguments = TrainingArguments(
            str(self.out / name), learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=min(5, steps),
            max_steps=steps, per_device_train_batch_size=8, per_device_eval_batch_size=16, max_grad_norm=1.0,
            seed=self.seed, use_cpu=True, bf16=self.setting.sizes.bf16, save_strategy="no", report_to="none",
            disable_tqdm=True, logging_steps=25,
        )  # fmt: skip
        trainer = pt.JointTrainer(
            str(self.out / start), arguments, objectives=objectives, processing_class=self.tokenizer, **further
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
        return trainer

    def dpo(self) -> Any:
        """The preference objective: the same for all methods."""
        import paretune as pt

        return pt.DPO(self.pairs, beta=self.setting.beta, cache_dir=self.out / "cache")

    def rehearsal(self, source: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Self-made prompts with the reference's answers."""
        import paretune as pt

        model = self.model("reference")
        options: dict[str, Any] = {"seed": self.seed, "batch_size": self.setting.batch, "progress": False}
        seeds = self.questions[: self.setting.seeds] if source != "raw-fragments" else ()
        made = pt.self_prompts(
            model, self.tokenizer, source, self.setting.prompts, seeds=seeds, preferences=self.asked,  # type: ignore[arg-type]
            max_tokens=100, **options,
        )  # fmt: skip
        options |= {"max_new_tokens": self.setting.max_tokens, "temperature": self.setting.temperature}
        rows = pt.self_answers(model, self.tokenizer, made.prompts, **options)
        said = {"said": str(made), "rows": len(rows), "example": [m["content"] for m in rows[0]["messages"]]}
        return rows, said

    def model(self, name: str) -> Any:
        """One of the run's models, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.out / name).eval()


def trained(bench: Bench, options: dict[str, Any]) -> dict[str, Any]:
    """DPO alone: AdamW, an online merging optimizer, or AdamW with an average of its policies."""
    import paretune as pt

    lr = options.get("lr", bench.setting.lr)
    name = "-".join(["dpo", *(f"{value:g}" if isinstance(value, float) else value for value in options.values())])
    further: dict[str, Any] = {}
    if "optimizer" in options:
        tau = pt.TaskVector.between(base=bench.out / "base", reference=bench.out / "reference")
        optimizer = {"ondare": pt.OnDARE, "onties": pt.OnTIES}[options["optimizer"]]
        merging = {"density": options["density"], "pull": options["pull"]}
        further["optimizer"] = lambda groups, total_steps: optimizer(groups, tau, total_steps=total_steps, **merging)
    if "decay" in options:
        further["callbacks"] = [pt.EMACallback(lambda named: pt.EMA(named, decay=options["decay"]))]
    bench.train("reference", name, {"dpo": bench.dpo()}, lr, bench.setting.sizes.dpo_steps, **further)
    return {"policy": name}


def plain(bench: Bench, options: dict[str, Any]) -> dict[str, Any]:
    """AdamW's policy of the common learning rate: the method is the dial alone."""
    name = f"dpo-{options['lr']:g}"
    return {"policy": name} if (bench.out / name / "config.json").is_file() else trained(bench, options)


def ties(bench: Bench, options: dict[str, Any]) -> dict[str, Any]:
    """Offline TIES of reference and AdamW's policy over the base."""
    import shutil

    import paretune as pt

    policy = plain(bench, {"lr": bench.setting.lr})["policy"]
    shutil.rmtree(bench.out / "ties", ignore_errors=True)
    pt.merge(
        "ties", {str(bench.out / "reference"): 1 - options["weight"], str(bench.out / policy): options["weight"]},
        base=bench.out / "base", out=bench.out / "ties", density=options["density"],
    )  # fmt: skip
    return {"policy": "ties"}


def gated(bench: Bench, options: dict[str, Any]) -> dict[str, Any]:
    """AdamW's policy behind the Fisher gate, which is made even where it refuses itself; the refusal is recorded."""
    from measure import encode
    from prepare import read_rows

    import paretune as pt

    policy = plain(bench, {"lr": bench.setting.lr})["policy"]
    reference = bench.model("reference")
    chosen = [
        {"input_ids": [*asked, *answer], "completion_mask": [0] * len(asked) + [1] * len(answer)}
        for asked, answer in encode(bench.tokenizer, read_rows(Path(bench.pairs))[: bench.setting.pairs], "chosen")
    ]
    samples = pt.own_samples(
        reference, bench.tokenizer, bench.setting.samples, max_tokens=bench.setting.max_tokens, seed=bench.seed,
        batch_size=bench.setting.batch, progress=False,
    )  # fmt: skip
    gate = pt.fisher_gate(bench.out / policy, reference, chosen, samples, override=True, **options)
    return {"policy": policy, "gate": gate, "ratio": round(gate.ratio, 3), "refused": not gate.trusted}


def joint(bench: Bench, options: dict[str, Any]) -> dict[str, Any]:
    """ALRIGHT at one half beside the preferences: self-made data distilled, or the SFT data themselves."""
    import paretune as pt

    source, said = options["source"], {}
    if source == "real data":
        beside: Any = pt.SFT(bench.sft)
    else:
        rows, said = bench.rehearsal(source)
        beside = pt.Distill(rows, "forward", top_k=32, cache_dir=bench.out / "cache")
    name = "joint-" + source.replace(" ", "-")
    # ALRIGHT halves the steps on preferences: it gets twice as many.
    steps = 2 * bench.setting.sizes.dpo_steps
    bench.train(
        "reference", name, {"beside": beside, "dpo": bench.dpo()}, bench.setting.lr, steps, schedule=pt.Alright()
    )
    return {"policy": name, **said}


def methods(setting: Setting) -> Iterator[Made]:
    """Name, hyper-parameters, how it is made, and at which scales it is judged."""
    rates = [factor * setting.lr for factor in setting.factors]
    for lr in rates[:2]:
        yield "AdamW", {"lr": lr}, trained, (1.0,)
    yield "scaled back", {"lr": setting.lr}, plain, (0.25, 0.5)
    yield "replay", {"source": "real data"}, joint, (0.5, 1.0)
    yield "self-rehearsal", {"source": "raw-fragments"}, joint, (0.5, 1.0)
    yield "Fisher gate", {"weight": 1.0}, gated, (1.0, 2.0)
    yield "TIES", {"weight": 0.7, "density": 0.7}, ties, (1.0,)
    yield "EMA", {"decay": 0.02}, trained, (1.0,)
    yield "OnDARE", {"optimizer": "ondare", "density": 0.5, "pull": 0.1}, trained, (1.0,)
    yield "OnTIES", {"optimizer": "onties", "density": 0.2, "pull": 0.1}, trained, (1.0,)
    yield "self-rehearsal", {"source": "prompt-model"}, joint, (0.5, 1.0)
    for lr in rates[2:]:
        yield "AdamW", {"lr": lr}, trained, (1.0,)
    yield "self-rehearsal", {"source": "mutate"}, joint, (0.5, 1.0)
    yield "Fisher gate", {"weight": 3.0}, gated, (1.0, 2.0)


def dialled(bench: Bench, made: dict[str, Any], ladder: tuple[float, ...]) -> Iterator[tuple[float, Any]]:
    """The policy at each scale, in one model."""
    import torch

    import paretune as pt

    model = bench.model("reference")
    if "gate" in made:
        reference = {name: p.detach().clone() for name, p in model.named_parameters()}
        policy = dict(bench.model(made["policy"]).named_parameters())
        for scale in ladder:
            merged = made["gate"].merged(reference, policy, scale)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(merged[name])
            yield scale, model
        return
    live = pt.LiveMerge(model, pre=bench.out / "reference", post=bench.out / made["policy"])
    for scale in ladder:
        live.set(1 - scale)
        yield scale, model


def run(out: Path, source: Path, setting: Setting, seed: int, records: Path, wanted: list[str] | None) -> None:
    """All methods of one seed."""
    import torch
    from judge import Judge

    torch.set_num_threads(1)
    bench = Bench(out, source, setting, seed)
    judge = Judge(out, bench.tokenizer, setting, seed)
    before = time.process_time()
    points = [{"scale": 0.0, **judge(bench.model("reference"))}]
    lines = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    known = {(each["method"], json.dumps(each["setting"])) for each in lines if each["seed"] == seed}

    def keep(method: str, options: dict[str, Any], seconds: float, points: list[dict[str, Any]], **about: Any) -> None:
        line = {"seed": seed, "method": method, "setting": options, "seconds": round(seconds, 1), **about}
        with records.open("a") as stream:
            stream.write(json.dumps(line | {"points": points}) + "\n")
        print(f"{method} {options} {about} {seconds:.0f} s", flush=True)
        for each in points:
            print("   ", {k: v[0] if isinstance(v, tuple) else v for k, v in each.items()}, flush=True)

    if ("reference", "{}") not in known:
        weights = dict(
            zip(("steps", "annotations", "decimals", "repeats"), map(float, judge.rules.weights.round(3)), strict=True)
        )
        about = {"rules": weights, "rules_accuracy": judge.rules_accuracy, "base": judge.base(bench.model("base"))}
        about |= {"made_seconds": bench.seconds, "sizes": asdict(setting)}
        keep("reference", {}, time.process_time() - before, points, **about)
    for method, options, make, ladder in methods(setting):
        if (method, json.dumps(options)) in known or (wanted is not None and method not in wanted):
            continue
        torch.manual_seed(seed)
        before = time.process_time()
        made = make(bench, options)
        seconds = time.process_time() - before
        found = [{"scale": scale, **judge(model)} for scale, model in dialled(bench, made, ladder)]
        said = {key: value for key, value in made.items() if key not in ("policy", "gate")}
        keep(method, options, seconds, found, **said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", help="only these, separated by commas")
    parser.add_argument("--out", type=Path, help="where models lie (runs/real-text-SEED)")
    parser.add_argument("--records", type=Path, default=HERE / "records.jsonl")
    parser.add_argument("--quick", action="store_true", help="20 rows, seconds, to see that all of it runs")
    options = parser.parse_args()
    source = Path(os.environ.get("PARETUNE_DATA", DEFAULT_DATA))
    missing = [name for name in ("gsm8k_demonstrations.jsonl.gz", "gsm8k_preferences.jsonl.gz")
               if not (source / name).is_file()]  # fmt: skip
    if missing:
        print(f"PARETUNE_DATA={str(source)!r}: no {' and no '.join(missing)} there; set it to their folder")
        return 2
    out = options.out or Path("runs") / f"real-text-{options.seed}"
    wanted = None if options.methods is None else options.methods.split(",")
    run(out, source, QUICK if options.quick else STANDARD, options.seed, options.records, wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
