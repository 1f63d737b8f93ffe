"""Commands on the pages docs/train*.md and docs/averaging.md run, in their order, after ``examples/tiny/make.py``."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paretune.cli.main import main

ROOT = Path(__file__).parents[2]
# The SFT model of the first page is the model of all others.
PAGES = ("train-sft.md", "train-dpo.md", "train-kto.md", "train-grpo.md", "train-joint.md", "training.md")


def commands(page: str) -> list[list[str]]:
    """The ``paretune`` commands of a page's bash blocks, without the program's name."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    return [shlex.split(line)[1:] for line in lines if line.startswith("paretune ")]


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_a_command(page: str) -> None:
    trainer = page.removeprefix("train-").removesuffix(".md") if page != "training.md" else "dpo"
    assert ["train", trainer] in [command[:2] for command in commands(page)]


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    subprocess.run([sys.executable, str(ROOT / "examples" / "tiny" / "make.py"), "runs/tiny"], check=True)
    for page in PAGES:
        for command in commands(page):
            assert main([*command, "--disable_tqdm", "true"]) == 0, shlex.join(command)
            output = tmp_path / command[command.index("--output_dir") + 1]
            if "--dry-run" in command:
                assert not output.exists()
            elif "--sweep" in command:
                assert len((output / "sweep.jsonl").read_text().splitlines()) == 4
            else:
                assert json.loads((output / "training.json").read_text())["status"] == "finished"
    tiny = tmp_path / "runs" / "tiny"
    for command in commands("averaging.md"):
        assert main([*command, "--quiet"]) == 0, shlex.join(command)
        assert (tmp_path / command[command.index("-o") + 1]).exists()
    assert len(list((tiny / "averages" / "models").iterdir())) == 5 + 3  # uniform from 0 to 1, adaptive between
    # what training.md says of resuming
    assert (tiny / "ema/model.safetensors").read_bytes() == (tiny / "ema-again/model.safetensors").read_bytes()
    # and of the plan of pairs in kto
    assert "rows: 64; batch 8; optimizer steps: 48" in capsys.readouterr().out
