"""What the Fisher gate and the dial cost: time, peak memory, and one dial against seven merges and evaluations.

    python benchmarks/cures/gate_cost.py memory   # peak resident memory of the Fisher pass, of DPO, of a backward
    python benchmarks/cures/gate_cost.py time     # Fisher pass (samples included) ÷ a plain DPO run
    python benchmarks/cures/gate_cost.py dial     # dial of 7 points ÷ 7 runs of one point; ÷ 7 times by hand
    python benchmarks/cures/gate_cost.py dial --tiny

A Llama of 58M parameters (``--tiny``: of the tiny world's size) with random weights, whose cost is that of a trained
one, float32, one thread. Every figure is of processes of its own: CPU seconds of user and system, peak resident memory
as the kernel counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

VOCABULARY = 32_000
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
TINY = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
LENGTH, PROMPT = 96, 32  # tokens of a sequence, and of its prompt
PAIRS, STEPS = 16, 80  # of a DPO step, of the run: the tiny world's
FISHER = (160, 192)  # preferred answers, own samples
CLI = [sys.executable, "-c", "import sys; from paretune.cli.main import main; sys.exit(main())"]
LADDER = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} {% else %}<bot> {{ message['content'] }} <eos>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def build(folder: Path, shape: dict[str, int], vocabulary: int) -> None:
    """``sft`` and ``aligned``, prompts, pairs and a reward."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<eos>", "<user>", "<bot>"]
    words += [f"w{i}" for i in range(vocabulary - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, model_max_length=512, **special)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**shape, "vocab_size": vocabulary, "max_position_embeddings": 512}
    config = LlamaConfig(pad_token_id=0, eos_token_id=2, bos_token_id=None, **sizes)
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters", file=sys.stderr)
    for name in ("sft", "aligned"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=1e-3)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words[5:], k=16)) for _ in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    pairs = [dict(zip(("prompt", "chosen", "rejected"), texts[i : i + 3], strict=True)) for i in range(0, 60, 3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "reward.py").write_text(
        "def length(completions, **_):\n    return [len(str(c)) / 1e3 for c in completions]\n"
    )


def sequences(count: int, seed: int) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    mask = [0] * PROMPT + [1] * (LENGTH - PROMPT)
    return [
        {"input_ids": [rng.randrange(5, VOCABULARY) for _ in range(LENGTH)], "completion_mask": mask}
        for _ in range(count)
    ]


def model_of(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder / "sft")


# -- what is measured, each in a process of its own ----------------------------------------------------------


def forward(folder: Path) -> None:
    """The model and one sequence's log-probability, no gradient."""
    import torch

    from paretune.averaging.fisher import log_probability

    model = model_of(folder)
    with torch.no_grad():
        log_probability(model, sequences(1, 0)[0])


def backward(folder: Path) -> None:
    """One sequence's backward that keeps all gradients, as any trainer's does."""
    from paretune.averaging.fisher import log_probability

    log_probability(model_of(folder), sequences(1, 0)[0]).backward()


def fisher(folder: Path, mode: str = "tensors") -> None:
    """The gate of a few sequences: its memory does not depend on how many."""
    from paretune.averaging.fisher_gate import fisher_gate

    fisher_gate(None, model_of(folder), sequences(4, 0), sequences(4, 1), mode=mode, override=True)  # type: ignore[arg-type]


def fisher_entries(folder: Path) -> None:
    fisher(folder, "entries")


def dpo(folder: Path, steps: int = 1) -> None:
    """Plain DPO steps: AdamW, reference log-probabilities made before."""
    import torch

    from paretune.demo.align import DPOSettings, PairTensors, align

    model = model_of(folder).train()
    rows = sequences(2 * PAIRS, 2)
    ids = torch.tensor([row["input_ids"] for row in rows]).view(PAIRS, 2, LENGTH)
    marks = torch.tensor([row["completion_mask"] for row in rows]).view(PAIRS, 2, LENGTH).bool()
    pairs = PairTensors(ids, marks, torch.zeros(PAIRS, 2)).with_reference(model)
    for _ in align(model, pairs, DPOSettings(steps=steps, batch=PAIRS)):
        pass


def dpo_more(folder: Path) -> None:
    dpo(folder, 4)


def fisher_more(folder: Path) -> None:
    """A tenth of a gate, sampling included."""
    from transformers import AutoTokenizer

    from paretune.averaging.fisher_gate import fisher_gate
    from paretune.averaging.own_samples import own_samples

    model, tokenizer = model_of(folder), AutoTokenizer.from_pretrained(folder / "sft")
    own_samples(model.eval(), tokenizer, FISHER[1] // 8, max_tokens=LENGTH - PROMPT, progress=False)
    chosen, samples = sequences(FISHER[0] // 8, 0), sequences(FISHER[1] // 8, 1)
    fisher_gate(None, model, chosen, samples, mode="tensors", override=True)


PARTS = {f.__name__: f for f in (forward, backward, fisher, fisher_entries, dpo, dpo_more, fisher_more)}


def measured(command: list[str]) -> tuple[float, float]:
    """(CPU seconds, peak MB) of one process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def part(name: str, folder: Path) -> tuple[float, float]:
    return measured([sys.executable, __file__, "part", name, str(folder)])


def memory(folder: Path) -> dict[str, Any]:
    found = {name: round(part(name, folder)[1]) for name in ("forward", "backward", "dpo", "fisher", "fisher_entries")}
    command = ["average", "fisher", "--pre", str(folder / "sft"), "--preferences", str(folder / "pairs.jsonl")]
    command += ["--samples", "32", "--mode", "tensors", "--gate-only", "--override", "-o", str(folder / "gated")]
    found["paretune average fisher --mode tensors"] = round(measured([*CLI, *command, "--quiet"])[1])
    return {
        "peak MB": found,
        "per-tensor ÷ DPO step": round(found["fisher"] / found["dpo"], 3),
        "per-tensor ÷ one plain backward": round(found["fisher"] / found["backward"], 3),
        "per-tensor ÷ forward only": round(found["fisher"] / found["forward"], 3),
    }


def seconds(folder: Path) -> dict[str, Any]:
    """A tenth of each, less what starting and loading take, times ten."""
    start = part("forward", folder)[0]
    step = (part("dpo_more", folder)[0] - part("dpo", folder)[0]) / 3
    gate = 8 * (part("fisher_more", folder)[0] - start)
    run = STEPS * step
    return {
        "fisher pass": round(gate, 1),
        "DPO step": round(step, 2),
        "DPO run": round(run, 1),
        "÷": round(gate / run, 3),
    }


def dialled(folder: Path) -> dict[str, Any]:
    """One dial of 7 points; dials of one point each; merge, generate and score, which watch no agreement.

    The single runs are made at two of the scales and counted 3.5 times: each costs the same.
    """
    decoding = ["--max-new-tokens", "32", "--temperature", "1", "--batch-size", "16", "--quiet"]
    asked = ["--prompts", str(folder / "prompts.jsonl")]
    reward = ["--reward", f"{folder / 'reward.py'}:length"]
    ends = ["--pre", str(folder / "sft"), "--post", str(folder / "aligned")]
    never = ["--least-exact", "0", "--largest-kl", "1e9"]

    def dial(*scales: float) -> float:
        ladder = ["--ladder", ",".join(f"{s:g}" for s in scales)]
        return said("dial", measured([*CLI, "average", "dial", *ends, *asked, *reward, *ladder, *never, *decoding])[0])

    def by_hand(scale: float) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            model, answers = f"{out}/model", f"{out}/answers.jsonl"
            weights = ["--model", f"{folder / 'sft'}={1 - scale}", "--model", f"{folder / 'aligned'}={scale}"]
            total = measured([*CLI, "merge", "linear", *weights, "-o", model, "--quiet"])[0]
            total += measured([*CLI, "generate", model, *asked, *decoding, "-o", answers])[0]
            return said("by hand", total + measured([*CLI, "score", answers, *reward, "--quiet"])[0])

    one = dial(*LADDER)
    single = len(LADDER) / 2 * (dial(0.5) + dial(1.5))
    hand = len(LADDER) / 2 * (by_hand(0.5) + by_hand(1.5))
    found = {"dial of 7": one, "7 dials of 1": single, "÷": one / single, "7 × merge, generate, score": hand}
    return {name: round(value, 3) for name, value in (found | {"÷ (nothing watched)": one / hand}).items()}


def said(what: str, value: float) -> float:
    print(f"{what}: {value:.1f} CPU seconds", file=sys.stderr, flush=True)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in {"memory": memory, "time": seconds, "dial": dialled}.items():
        each = commands.add_parser(name)
        each.set_defaults(function=function, tiny=False)
        if function is dialled:
            each.add_argument("--tiny", action="store_true")
    one = commands.add_parser("part")  # of itself
    one.add_argument("name", choices=PARTS)
    one.add_argument("folder", type=Path)
    options = parser.parse_args()
    if "name" in options:
        PARTS[options.name](options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), *((TINY, 240) if options.tiny else (SHAPE, VOCABULARY)))
        print(json.dumps(options.function(Path(folder)), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
