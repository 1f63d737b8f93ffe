"""The root command: finds the chosen command, keeps errors to one line, sets the exit status."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from paretune.errors import PareTuneError

OK, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """Where a command lives; its module has ``add_parser(subparsers)`` and sets ``run`` by ``set_defaults``."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "average": Command("paretune.cli.average", "average the models before and after alignment, with learned ratios"),
    "demo": Command("paretune.cli.demo", "train a tiny world and show the alignment tax and its cures"),
    "diff": Command("paretune.cli.diff", "how far models are from each other, block by block"),
    "export-adapter": Command("paretune.cli.export_adapter", "one model from a LoRA adapter and the task vector"),
    "frontier": Command("paretune.cli.frontier", "the Pareto front of measured models, in one report"),
    "generate": Command("paretune.cli.generate", "a model's answers to a file of prompts"),
    "measure": Command("paretune.cli.measure", "reward and capability of models, compared with the reference"),
    "merge": Command("paretune.cli.merge", "merge checkpoints: linear, DARE, TIES, SLERP … or a mergekit recipe"),
    "rehearse": Command("paretune.cli.rehearse", "prompts and answers that a model makes itself, to train on"),
    "score": Command("paretune.cli.score", "rewards of answers that are already written"),
    "train": Command("paretune.cli.train", "align a model: DPO, KTO, SFT, GRPO or joint, with any optimizer"),
}

_EXAMPLES = """\
examples:
  paretune demo --out runs/demo
  paretune train dpo --model_name_or_path sft-model --base_model base-model \\
      --dataset_name preferences.jsonl --optimizer ondare --pull 0.05 --output_dir aligned
  paretune train dpo --help
  paretune merge linear --model sft=0.3 --model aligned=0.7 -o merged
  paretune diff base sft aligned

exit status: 0 done, 1 failed unexpectedly, 2 wrong arguments or input, 130 interrupted
"""


class UsageError(PareTuneError):
    """The command line itself is wrong."""


class OneLineParser(argparse.ArgumentParser):
    """argparse that raises `UsageError` instead of printing its usage, and takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{' '.join(message.split())} (see {self.prog} --help)")


def unknown_arguments(unknown: Sequence[str], known: Sequence[str], program: str) -> UsageError:
    """The error for arguments that nobody takes, with the nearest known one.

    Args:
        unknown: what was left over on the command line.
        known: all option strings of the command.
        program: what to call the command.
    """
    flags = [text for text in unknown if text.startswith("-")] or list(unknown)
    flag = flags[0].split("=", 1)[0]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
    mend = f"did you mean {near[0]}?" if near else f"see {program} --help"
    return UsageError(f"{' '.join(unknown)}: unknown argument, {mend}")


def version_line() -> str:
    """``paretune X, torch Y, transformers Z, trl W``, read without importing any of them."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "missing"

    return ", ".join(f"{package} {of(package)}" for package in ("paretune", "torch", "transformers", "trl"))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version_line())
        parser.exit()


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The root parser; only the chosen command's module is imported.

    Args:
        chosen: a name in :data:`COMMANDS`, or None for the list of commands alone.
    """
    parser = OneLineParser(
        prog="paretune", description="Align language models without the alignment tax.", epilog=_EXAMPLES
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        if name == chosen:
            importlib.import_module(command.module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=command.help, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1, 2 or 130.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen = next((text for text in arguments if not text.startswith("-")), None)
        parser = build_parser(chosen)
        namespace, unknown = parser.parse_known_args(arguments)
        if unknown:
            known = _option_strings(parser, namespace.command)
            raise unknown_arguments(unknown, known, f"paretune {namespace.command}")
        status = namespace.run(namespace)
        return OK if status is None else int(status)
    except SystemExit as stop:  # argparse's own --help and --version
        return stop.code if isinstance(stop.code, int) else OK
    except PareTuneError as error:
        print(f"paretune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("paretune: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout is gone (| head): point stdout elsewhere so that the interpreter's exit is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception:
        traceback.print_exc()
        return FAILED


def _option_strings(parser: argparse.ArgumentParser, command: str) -> list[str]:
    found = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices[command]._option_string_actions
            for nested in action.choices[command]._actions:
                if isinstance(nested, argparse._SubParsersAction):
                    found += [flag for each in nested.choices.values() for flag in each._option_string_actions]
    return found


if __name__ == "__main__":
    sys.exit(main())
