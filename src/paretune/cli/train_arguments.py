"""The arguments of ``paretune train``: TRL's flags and YAML files with ours beside them, errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from paretune.cli.main import UsageError, unknown_arguments
from paretune.errors import ArgumentError, PareTuneError

if TYPE_CHECKING:
    from paretune.training.request import Request

TRAINERS = {
    "dpo": "direct preference optimization (also IPO: --loss_type ipo) on chosen and rejected answers",
    "kto": "Kahneman-Tversky optimization on answers labelled good or bad, or on pairs",
    "sft": "supervised fine-tuning on demonstrations",
    "grpo": "group relative policy optimization on prompts and rewards",
    "joint": "SFT and a preference loss in one run: mixed, ALRIGHT, MAXRIGHT or one after the other",
}
EXAMPLES = """\
examples:
  paretune train {name} --model_name_or_path sft-model --base_model base-model --dataset_name {data} \\
      --optimizer ondare --density 5e-4 --pull 0.05 --learning_rate 1e-6 --output_dir aligned
  paretune train {name} --config recipe.yaml --dry-run
  paretune train {name} --config recipe.yaml --sweep learning_rate=1e-6,3e-6 --sweep density=1e-3,1e-2
  paretune train {name} --config recipe.yaml --resume_from_checkpoint true
"""
JOINT_EXAMPLES = """\
examples:
  paretune train joint --model_name_or_path sft-model --sft_dataset chats.jsonl --preference_dataset pairs.jsonl \\
      --schedule alright --weight_preference 0.5 --learning_rate 1e-6 --output_dir joint
  paretune train joint --config recipe.yaml --schedule maxright --measure_ideals true --refresh_every 10
  paretune train joint --config recipe.yaml --schedule alright --sweep weights.dpo=0.01,0.25,0.5,0.75,0.99
  paretune train joint --config recipe.yaml --optimizer ondare --base_model base-model --pull 0.05
"""
# Without an accelerator TRL's own defaults stop the run or slow it down.
_OURS_FIRST = ("command", "paretune", "joint training")
_ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


@dataclass
class Parsed:
    """A parsed command line.

    Args:
        request: the run.
        sweep: axes, ``name=value,value`` each.
        json: print one JSON value on stdout.
        dry_run: print the plan only.
        cpu_defaults: what was set because there is no accelerator.
        overridden: notices about arguments that another one overrides.
        argv: without the program's name and the trainer's.
    """

    request: Request
    sweep: list[str]
    json: bool
    dry_run: bool
    cpu_defaults: dict[str, bool]
    overridden: list[str]
    argv: list[str]


def parse(trainer: str, argv: list[str], overrides: Sequence[str] = ()) -> Parsed:
    """Parse the arguments of one trainer.

    Args:
        trainer: a name in :data:`TRAINERS`.
        argv: the command line after the trainer's name.
        overrides: further arguments that win, as a sweep's point gives them.

    Raises:
        UsageError, ArgumentError: one line that names the argument.
    """
    _no_telemetry()
    import torch

    from paretune.training.arguments import check
    from paretune.training.joint_arguments import check_joint
    from paretune.training.request import Request

    parser = make_parser(trainer)
    everything = [*argv, *overrides]
    if "-h" in everything or "--help" in everything:
        parser.print_help()
        parser.exit()
    config = _read_config(_value_of(everything, "--config"))
    on_command_line = _given(parser, everything)
    config_names = _check_config(parser, config)
    cpu_defaults: dict[str, bool] = {}
    has_accelerator = torch.accelerator.is_available()
    if not has_accelerator or on_command_line.get("use_cpu", config.get("use_cpu")):
        unset = {name for name in _ON_CPU if name not in on_command_line and name not in config_names}
        cpu_defaults = {name: value for name, value in _ON_CPU.items() if name in unset}
    parser.set_defaults(report_to="none", **cpu_defaults)
    os.environ.update({name: str(value) for name, value in config.get("env", {}).items()})
    parser.set_defaults_with_config(**{name: value for name, value in config.items() if name != "env"})
    namespace = parser.parse_args(everything)
    overridden = _resolve_optim(namespace, on_command_line, config)
    parts = [_build(kind, namespace) for kind in parser.dataclass_types]
    # Joint training has no mixture: it names its two data sets.
    script, training, model, mixture, own = parts if len(parts) == 5 else [*parts[:3], None, parts[3]]
    given = {**{name: getattr(namespace, name, None) for name in config_names}, **on_command_line}
    for ours in ("json", "dry_run", "sweep", "config"):
        given.pop(ours, None)
    request = Request(
        trainer=trainer, script=script, training=training, model=model, mixture=mixture, own=own, given=given,
        command=["train", trainer, *everything],
    )  # fmt: skip
    if not namespace.sweep:  # what goes together is known of each point only, and a point is parsed as a run
        check(own, trainer=trainer, uses_peft=bool(model.use_peft), model=model.model_name_or_path)
        if trainer == "joint":
            check_joint(script, training)
    return Parsed(request, namespace.sweep or [], namespace.json, namespace.dry_run, cpu_defaults, overridden, argv)


def make_parser(trainer: str) -> Any:
    """TRL's parser for one trainer with our arguments, without abbreviations, one line an error.

    Args:
        trainer: a name in :data:`TRAINERS`.
    """
    from paretune.training.arguments import RunArguments
    from paretune.training.trl_classes import argument_classes, trl

    class Parser(trl().TrlParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{' '.join(message.split())} (see {self.prog} --help)")

        def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
            found, unknown = self.parse_known_args(args, namespace)
            if unknown:
                raise unknown_arguments(unknown, list(self._option_string_actions), self.prog)
            return found

    data = {"dpo": "pairs.jsonl", "kto": "labelled.jsonl", "sft": "chats.jsonl", "grpo": "prompts.jsonl"}
    examples = EXAMPLES.format(name=trainer, data=data[trainer]) if trainer in data else JOINT_EXAMPLES
    parser = Parser(
        (*(kind for kind in argument_classes(trainer) if kind is not None), RunArguments),
        prog=f"paretune train {trainer}",
        usage=f"paretune train {trainer} [--config YAML] [--ARGUMENT VALUE ...]",
        description=TRAINERS[trainer],
        epilog=examples,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    command = parser.add_argument_group("command")
    command.add_argument("--config", help="YAML file with any of these arguments; the command line wins.")
    command.add_argument(
        "--sweep", action="append", metavar="NAME=V,V", default=None,
        help="Train at each value; several make a grid. Finished points are kept when the command is repeated.",
    )  # fmt: skip
    command.add_argument("--dry-run", "--dry_run", action="store_true", help="Print the plan and stop.")
    command.add_argument("--json", action="store_true", help="Print one JSON value on stdout.")
    # Ours first: TRL brings more than two hundred arguments.
    parser._action_groups.sort(key=lambda group: group.title not in _OURS_FIRST)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help of arguments, examples as they are written."""


def _build(kind: Any, namespace: argparse.Namespace) -> Any:
    """One dataclass from the parsed values; what it refuses becomes one line."""
    values = {field.name: getattr(namespace, field.name) for field in fields(kind) if field.init}
    try:
        with warnings.catch_warnings():
            # transformers deprecates arguments that TRL itself still sets.
            warnings.simplefilter("ignore", FutureWarning)
            return kind(**values)
    except PareTuneError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError(f"{kind.__name__}: {' '.join(str(error).split())}") from error


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError("config", path, f"cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ArgumentError("config", path, f"is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not isinstance(config.get("env", {}), dict):
        raise ArgumentError("config", path, "it must hold a mapping of argument names to values")
    return config


def _check_config(parser: Any, config: dict[str, Any]) -> set[str]:
    """The names that a YAML file sets, refused where no argument has that name."""
    known = {action.dest for action in parser._actions} - {"help", "config"}
    unknown = [name for name in config if name not in known and name != "env"]
    if unknown:
        raise unknown_arguments([f"--{name}" for name in unknown], list(parser._option_string_actions), parser.prog)
    return set(config) - {"env"}


def _given(parser: Any, argv: list[str]) -> dict[str, Any]:
    """What the command line sets, apart from all defaults."""
    kept = [(action, action.default, action.required) for action in parser._actions]
    defaults = dict(parser._defaults)
    try:
        for action, _, _ in kept:
            action.default, action.required = argparse.SUPPRESS, False
        parser._defaults.clear()
        return dict(vars(parser.parse_args(argv)))
    finally:
        for action, default, required in kept:
            action.default, action.required = default, required
        parser._defaults.update(defaults)


def _resolve_optim(namespace: argparse.Namespace, on_command_line: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """``--optimizer`` is ours, ``--optim`` TRL's: both at once contradict each other."""
    if namespace.optimizer is None:
        return []
    if "optim" in on_command_line and "optimizer" in on_command_line:
        raise ArgumentError("optim", on_command_line["optim"], f"--optimizer {namespace.optimizer} chooses; drop one")
    if "optim" in config and namespace.optimizer is not None:
        return [f"--optimizer {namespace.optimizer} overrides optim={config['optim']} of the YAML file"]
    return []


def _value_of(argv: list[str], flag: str) -> str | None:
    for position, text in enumerate(argv):
        if text == flag:
            if position + 1 == len(argv):
                raise UsageError(f"argument {flag}: expected one argument")
            return argv[position + 1]
        if text.startswith(f"{flag}="):
            return text.split("=", 1)[1]
    return None


def _no_telemetry() -> None:
    """Off unless the user set the variable; also where huggingface_hub was imported before."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DISABLE_TELEMETRY", "1")
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None and os.environ["HF_HUB_DISABLE_TELEMETRY"].lower() in ("1", "true", "yes", "on"):
        constants.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]
