"""``paretune train joint --rehearse``: what stands in the place of demonstrations."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from paretune.training.build import Data
from paretune.training.data import load_splits, take_split
from paretune.training.joint_arguments import JointArguments
from paretune.training.request import Request

REHEARSAL = "rehearsal.jsonl"
_logger = logging.getLogger("paretune.training")


def rehearsal(request: Request, preferences: Any) -> Data:
    """Self-made prompts with the model's own answers; those that lie in the output directory are taken again.

    Prompts like the preferences' are left out: their answers would rehearse the old style.

    Args:
        request: of trainer joint.
        preferences: its pairs.
    """
    from datasets import Dataset

    from paretune.training.rehearsal_data import make_rehearsal, prompt_texts

    script: JointArguments = request.script
    file = Path(str(request.training.output_dir)) / REHEARSAL
    if not file.exists():
        from paretune.generation import load

        seeds: list[str] = []
        if script.rehearse_seeds:
            argument = "rehearse_seeds"
            splits = load_splits(script.rehearse_seeds, argument=argument)
            seeds = prompt_texts(take_split(splits, "train", name=script.rehearse_seeds, argument=argument))
        model, tokenizer = load(request.reference_path)
        report = make_rehearsal(
            model, tokenizer, file, script.rehearse, script.rehearse_count,  # type: ignore[arg-type]
            seeds=seeds, preferences=prompt_texts(preferences), max_new_tokens=script.rehearse_max_new_tokens,
            seed=request.training.seed, progress=not request.training.disable_tqdm,
        )  # fmt: skip
        _logger.info(f"{report}, in {file}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return Data(Dataset.from_list(rows), str(file))


def rehearsal_objectives(request: Request, rows: Any, preferences: Any) -> dict[str, Any]:
    """The objectives beside the preferences': distillation, and where asked the chosen answers' likelihood."""
    from paretune.training.distill import Distill
    from paretune.training.objectives import SFT

    script: JointArguments = request.script
    settings: Any = request.training
    reference = script.reference_soup or (request.reference_path if request.other_reference else None)
    length = script.sft_max_length or settings.max_length
    found: dict[str, Any] = {
        "sft": Distill(rows, ref_model=reference, batch_size=script.sft_batch_size, max_length=length)
    }
    if script.rehearse_nll:
        found["chosen"] = SFT(
            [_chosen(row) for row in preferences if row.get("chosen") or row.get("label")],
            batch_size=script.preference_batch_size,
            max_length=settings.max_length,
        )
    return found


def _chosen(row: dict[str, Any]) -> dict[str, Any]:
    """The preferred answer of a pair, or a good one (KTO), as a demonstration."""
    answer = row.get("chosen") or row["completion"]
    if row.get("prompt"):
        return {"prompt": row["prompt"], "completion": answer}
    return {"text": answer} if isinstance(answer, str) else {"messages": answer}
