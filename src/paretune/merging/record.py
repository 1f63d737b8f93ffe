"""What lies beside the merged weights: configuration, tokenizer, index, the recipe's record and a model card."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..atomic import sync
from ..checkpoint import INDEX_NAME
from .plan import Plan

RECORD = "paretune.json"


def write_companions(plan: Plan, number: int, directory: Path) -> None:
    """Write everything but the weights; the index last, because with it the model can be loaded.

    Args:
        plan: the merge.
        number: which result of a sweep.
        directory: where the weights are.
    """
    first = plan.models[plan.recipe.base or plan.recipe.slices[0].sources[0].model]
    for name, file in first.other_files().items():
        _copy(file, directory / name)
    tokenizer: dict[str, Any] = dict(plan.alignment.files) if plan.alignment is not None else {}
    if not tokenizer:
        named = plan.models.get(plan.recipe.tokenizer or "", first)
        tokenizer = dict(named.tokenizer_files())
    for name, content in tokenizer.items():
        if isinstance(content, bytes):
            _write(directory / name, content)
        else:
            _copy(content, directory / name)
    _write(directory / RECORD, _json(record(plan, number)))
    _write(directory / "README.md", card(plan, number).encode())
    if plan.config:
        _write(directory / "config.json", _json(plan.config))
    if len(plan.shards) > 1:
        weight_map = {name: shard.name for shard in plan.shards for name in shard.offsets}
        total = sum(part.bytes for part in plan.parts)
        _write(directory / INDEX_NAME, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def record(plan: Plan, number: int) -> dict[str, Any]:
    """The content of ``paretune.json``: enough to do the merge again and to know whether it is the same."""
    recipe = plan.recipes[number]
    return {
        "merge": recipe.to_dict(),
        "seed": recipe.seed,
        "vocab": recipe.vocab,
        "label": plan.labels[number] if plan.labels else None,
        "inputs": [
            {"model": model.given, "fingerprint": model.fingerprint, "bytes": model.bytes}
            for model in plan.models.values()
        ],
        "tensors": len(plan.parts),
        "notes": list(plan.notes),
        "plan": plan.digest,
        "versions": {
            "paretune": _version("paretune"),
            "numpy": _version("numpy"),
            "python": platform.python_version(),
        },
    }


def card(plan: Plan, number: int) -> str:
    """A model card: what was merged, how, and how to do it again."""
    import yaml

    recipe = plan.recipes[number]
    models = [model.given for model in plan.models.values()]
    front = {"base_model": models, "library_name": "transformers", "tags": ["merge", "paretune", recipe.method]}
    weights = "\n".join(f"- `{model}`" for model in models)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# Merged model\n\nMade by paretune with the method `{recipe.method}` ({recipe.rule.paper}) from\n\n"
        f"{weights}\n\n"
        f"```yaml\n{yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)}```\n\n"
        f"Seed {recipe.seed}. Fingerprints of the inputs are in `{RECORD}`.\n"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False, default=list).encode() + b"\n"


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    sync(target)


def _write(target: Path, content: bytes) -> None:
    target.write_bytes(content)
    sync(target)
