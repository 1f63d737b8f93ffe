"""Online merging under FSDP2 without a trainer: sharded loading, DPO, checkpoints that any number of ranks resumes.

    torchrun --nproc_per_node 2 examples/fsdp2/train.py --base runs/tiny/base --reference runs/tiny/sft \\
        --pairs runs/tiny/pairs.jsonl --output runs/tiny/fsdp2 --steps 8

Runs with NCCL where there are GPUs, else with gloo on the CPU. No rank ever holds a whole model or a whole task
vector. Started again it goes on from the last checkpoint, with as many ranks as it is given.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import paretune as pt


def sharded(path: str, device: str) -> nn.Module:
    """The model, built without memory, sharded layer by layer, and then filled."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return pt.load_sharded(model, path, device)


def log_probabilities(model: nn.Module, tokens: Tensor, answer: Tensor) -> Tensor:
    """Sum over each row's answer tokens."""
    logits = model(tokens).logits[:, :-1].float()
    picked = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return (picked * answer[:, 1:]).sum(1)


def batch(rows: list[dict[str, Any]], tokenizer: Any, side: str, device: str) -> tuple[Tensor, Tensor]:
    texts = [tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False) for row in rows]
    starts = [len(tokenizer.apply_chat_template(row["prompt"], return_dict=False)) for row in rows]
    width = max(map(len, texts))
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    answer = torch.zeros(len(rows), width)
    for i, (text, start) in enumerate(zip(texts, starts, strict=True)):
        tokens[i, : len(text)] = torch.tensor(text)
        answer[i, start : len(text)] = 1
    return tokens.to(device), answer.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "reference", "pairs", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="pairs a rank and step")
    parser.add_argument("--optimizer", choices=["OnDARE", "OnTIES"], default="OnTIES")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    tokenizer = AutoTokenizer.from_pretrained(options.reference)
    pairs = [json.loads(line) for line in Path(options.pairs).read_text().splitlines()]
    policy, reference = sharded(options.reference, device), sharded(options.reference, device)
    reference.requires_grad_(False)
    tau = pt.TaskVector.between(base=options.base, reference=options.reference)
    optimizer = getattr(pt, options.optimizer)(
        policy.named_parameters(), tau, lr=1e-3, density=0.2, pull=0.05, total_steps=options.steps
    )

    done = 0
    # the index is written last: a folder without one is no checkpoint
    saved = sorted(path.parent for path in Path(options.output).glob("step-*/.metadata"))
    if saved:
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=saved[-1])
        set_state_dict(policy, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        done = int(saved[-1].name.removeprefix("step-"))

    for step in range(done, options.steps):
        rows = random.Random(step).sample(pairs, options.rows * ranks)[rank::ranks]
        margins = []
        for side in ("chosen", "rejected"):
            tokens, answer = batch(rows, tokenizer, side, device)
            with torch.no_grad():
                before = log_probabilities(reference, tokens, answer)
            margins.append(log_probabilities(policy, tokens, answer) - before)
        loss = -nn.functional.logsigmoid(0.1 * (margins[0] - margins[1])).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item():.6f}", flush=True)
        if (step + 1) % options.save_every == 0:
            model_state, optimizer_state = get_state_dict(policy, optimizer)
            dcp.save(
                {"model": model_state, "optimizer": optimizer_state},
                checkpoint_id=Path(options.output) / f"step-{step + 1:06d}",
            )
    if rank == 0:
        print(optimizer.memory_report())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
