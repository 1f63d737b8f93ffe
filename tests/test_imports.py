"""Who may import whom, and what `import paretune` may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "paretune"
# What each part may import besides itself. errors ← checkpoint ← task_vector ← operators ← {merge, …}.
FOUNDATION = ["errors", "log", "atomic", "layers", "checkpoint", "task_vector", "places", "operators"]
EVERYTHING = {"*"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "log": {"errors"},
    "atomic": set(),
    "layers": set(),
    "checkpoint": {"errors", "log"},
    "task_vector": {"errors", "log", "checkpoint"},
    "places": {"errors", "layers", "task_vector"},
    "operators": {"errors", "log", "checkpoint", "task_vector"},
    "native": {"errors"},
    "generation": set(FOUNDATION),
    **{part: {*FOUNDATION, "generation"} for part in ("averaging", "training", "evaluation")},
    "optim": {*FOUNDATION, "generation", "native"},
    "merging": {*FOUNDATION, "generation", "native"},
    "demo": EVERYTHING,
    "cli": EVERYTHING,
    "__init__": EVERYTHING,
    "__main__": EVERYTHING,
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, source: str | None = None) -> set[str]:
    """The parts of paretune that a file imports, anywhere in it; relative imports resolved."""
    here = ["paretune", *path.relative_to(PACKAGE).with_suffix("").parts][:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [start, node.module or ""]))
            modules = [f"{module}.{alias.name}" for alias in node.names] if module == "paretune" else [module]
        found |= {m.split(".")[1] for m in modules if m.startswith("paretune.")}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_direction(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import"
    if ALLOWED[part] is not EVERYTHING:
        assert imported(path) - {part} <= ALLOWED[part]


def test_the_check_can_fail() -> None:
    path = PACKAGE / "optim" / "x.py"
    assert imported(path, "def f():\n    from ..training import x") == {"training"}
    assert imported(path, "import paretune.merging.stream as s") == {"merging"}
    assert imported(path, "from paretune import evaluation") == {"evaluation"}
    assert imported(path, "from . import y\nfrom .z import w") == {"optim"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_trainers_are_imported_in_training_cli_and_demo_only(path: Path) -> None:
    """trl, transformers and peft at module level: nowhere below the training layer."""
    if part_of(path) in {"training", "evaluation", "demo", "cli"}:
        return
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert not {n.split(".")[0] for n in names} & {"trl", "transformers", "peft", "datasets", "accelerate"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    """`import paretune` and its optimizers need torch, not the trainers; nor matplotlib."""
    code = """
import sys, paretune as pt
import torch
p = torch.nn.Parameter(torch.zeros(3))
pt.OnDARE([("w", p)], None, weight=0.0)
print([m for m in ("transformers", "trl", "peft", "datasets", "accelerate", "matplotlib") if m in sys.modules])
"""
    assert python(code) == "[]"


def test_public_names() -> None:
    import paretune as pt

    contract = [
        "TaskVector",
        "OnDARE",
        "OnTIES",
        "OnlineMerging",
        "Random",
        "Magnitude",
        "WeightedSum",
        "SignElection",
        "attach",
        "PareTuneError",
        "ArgumentError",
        "CheckpointError",
        "MismatchError",
        "StateError",
        "DataError",
        "MissingExtraError",
    ]
    assert set(contract) <= set(pt.__all__)
    assert list(pt.__all__) == sorted(pt.__all__)
    assert len(set(pt.__all__)) == len(pt.__all__)
    assert all(name in dir(pt) for name in contract)


def test_import_says_nothing() -> None:
    assert python("import paretune") == ""
