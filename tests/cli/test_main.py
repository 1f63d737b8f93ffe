"""The root command: help, versions, exit status, one-line errors."""

from __future__ import annotations

import argparse
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from paretune.cli import main as root
from paretune.errors import DataError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], int | None]], None]:
    """Registers a command ``probe`` that runs a function."""

    def register(run: Callable[[argparse.Namespace], int | None]) -> None:
        module = types.ModuleType("paretune_probe_command")

        def add_parser(subparsers: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
            parser = subparsers.add_parser("probe", help="for tests")
            parser.add_argument("--weight", type=float)
            parser.set_defaults(run=run)

        module.add_parser = add_parser  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "paretune_probe_command", module)
        monkeypatch.setitem(root.COMMANDS, "probe", root.Command("paretune_probe_command", "for tests"))

    return register


def raiser(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(_: argparse.Namespace) -> int:
        raise error

    return run


def test_help_lists_commands_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert root.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in root.COMMANDS)
    assert "examples:" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert root.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("paretune ")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["tarin"], "invalid choice: 'tarin'"),
        (["probe", "--weigth", "1"], "--weigth 1: unknown argument, did you mean --weight?"),
        (["probe", "--weight", "x"], "argument --weight: invalid float value: 'x'"),
        (["probe", "--we", "1"], "--we 1: unknown argument"),  # no abbreviations
        (["probe", "extra"], "extra: unknown argument"),
    ],
)
def test_wrong_use(command: Callable, capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    command(lambda _: None)
    assert root.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert err.startswith("paretune: error: ")


def test_exit_status(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    for returned, status in ((None, 0), (0, 0), (1, 1)):
        command(lambda _, returned=returned: returned)
        assert root.main(["probe"]) == status
    assert capsys.readouterr() == ("", "")


def test_expected_errors_are_one_line(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    command(raiser(DataError("data='x':\n  is empty")))
    assert root.main(["probe"]) == 2
    assert capsys.readouterr().err == "paretune: error: data='x': is empty\n"


def test_unexpected_errors_show_where(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    command(raiser(ZeroDivisionError("oops")))
    assert root.main(["probe"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: oops" in err


def test_interrupt(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    command(raiser(KeyboardInterrupt()))
    assert root.main(["probe"]) == 130
    assert capsys.readouterr().err == "paretune: interrupted\n"


def test_the_command_exists_and_help_is_light() -> None:
    """No torch, no trainers for ``paretune --help``."""
    code = "import sys; from paretune.cli.main import main; main(['--help']); "
    code += "sys.exit([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules] or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: paretune" in done.stdout


@pytest.mark.parametrize("name", root.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert root.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: paretune {name}" in shown
    assert "examples:" in shown
