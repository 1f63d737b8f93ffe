"""From a request to a TRL trainer: data, models, rewards, checked before anything is loaded that is large."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import ArgumentError, CheckpointError, DataError, MissingExtraError, PareTuneError
from paretune.training.data import check_columns, fingerprint, load_splits, take_split
from paretune.training.request import Request, evaluates
from paretune.training.trl_classes import trainer_class, trl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

_LOOKED_AT = 256  # prepared rows


@dataclass
class Data:
    """The training split and, where evaluation is on, the evaluation split, with the names they were asked by."""

    train: Any
    train_name: str
    evaluation: Any = None
    evaluation_name: str | None = None

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.evaluation is not None

    def record(self) -> dict[str, Any]:
        """What ``training.json`` says of it."""
        evaluation = {"name": self.evaluation_name, **fingerprint(self.evaluation)} if self.evaluates else None
        return {"train": {"name": self.train_name, **fingerprint(self.train)}, "evaluation": evaluation}


def load_data(request: Request) -> Data:
    """Load and check the data of a request.

    Args:
        request: names files, folders, hub ids or (in YAML) TRL's mixture.

    Raises:
        DataError: data that cannot be read or trained on.
        ArgumentError: no data set was named, or a split is missing.
    """
    script, own = request.script, request.own
    if request.mixture.datasets:
        if script.dataset_name:
            raise ArgumentError("dataset_name", script.dataset_name, "`datasets` of the YAML file says it; drop one")
        name, splits = "datasets", _load_mixture(request)
    elif script.dataset_name:
        name = script.dataset_name
        splits = load_splits(name, config=script.dataset_config, streaming=script.dataset_streaming)
    else:
        raise ArgumentError("dataset_name", None, "give a hub id, a .json/.jsonl/.parquet file or a folder")
    other = None
    if evaluates(request.training) and own.eval_dataset_name:
        other = own.eval_dataset_name, load_splits(own.eval_dataset_name, streaming=script.dataset_streaming)
    return choose_splits(request, splits, request.trainer, name=name, other=other)


def choose_splits(
    request: Request,
    splits: dict[str, Any],
    kind: str,
    *,
    name: str,
    argument: str = "dataset_name",
    other: tuple[str, dict[str, Any]] | None = None,
    other_argument: str = "eval_dataset_name",
) -> Data:
    """The split to train on and, where the run evaluates, the one to evaluate on, both checked.

    Args:
        request: names the splits.
        splits: of the data set.
        kind: what the data must be good for: ``dpo``, ``kto``, ``sft`` or ``grpo``.
        name, argument: the data set's name and the argument that gave it, for messages.
        other: name and splits of a data set of its own to evaluate on.
        other_argument: the argument that gave that.

    Raises:
        DataError: data that cannot be trained on.
        ArgumentError: a split is missing.
    """
    script = request.script
    train = take_split(splits, script.dataset_train_split, name=name, argument="dataset_train_split")
    check_columns(train, kind, name=name, argument=argument)
    data = Data(train, name)
    if not evaluates(request.training):
        return data
    if other is not None:
        data.evaluation_name, others = other
        # A file of its own has one split, which datasets calls train.
        split = next(iter(others)) if len(others) == 1 else script.dataset_test_split
        data.evaluation = take_split(others, split, name=data.evaluation_name, argument="dataset_test_split")
    else:
        if script.dataset_test_split not in splits:
            raise ArgumentError(
                "dataset_test_split",
                script.dataset_test_split,
                f"{name!r} has only the splits {', '.join(sorted(splits))}; name one, give --{other_argument}, or "
                "set --eval_strategy no",
            )
        data.evaluation, data.evaluation_name = splits[script.dataset_test_split], name
    check_columns(data.evaluation, kind, name=str(data.evaluation_name), argument=argument)
    return data


def check_model(request: Request) -> dict[str, Any]:
    """Refuse a model that is not there before data and trainers are built.

    Args:
        request: names the model, and perhaps another reference.

    Returns:
        The configuration of the model to train, as a dictionary.

    Raises:
        CheckpointError: a directory without a readable configuration or tokenizer, or a hub id that cannot be had.
    """
    paths = {"model_name_or_path": request.model_path, "reference_model": request.own.reference_model}
    for argument, path in paths.items():
        if path is not None and _is_local(path) and not os.path.isdir(path):
            raise CheckpointError(f"{argument}={path!r}: no such directory; give a model directory or a hub id")
    return load_config(request).to_dict()


def load_config(request: Request) -> Any:
    """The configuration of the model to train.

    Args:
        request: names the model and its revision.

    Raises:
        CheckpointError: it cannot be had.
    """
    from transformers import AutoConfig

    path = request.model_path
    try:
        return AutoConfig.from_pretrained(
            path, revision=request.model.model_revision, trust_remote_code=request.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"model_name_or_path={path!r}: {first_sentence(error)}") from error


def make_trainer(request: Request, data: Data, callbacks: list[Any]) -> Trainer:
    """The TRL trainer of a request, as TRL's own script would build it.

    Args:
        request: checked.
        data: from :func:`load_data`.
        callbacks: added to the trainer's own.

    Raises:
        PareTuneError: TRL refuses the arguments, models or data.
    """
    from transformers import set_seed

    kind = trainer_class(request.trainer)
    options: dict[str, Any] = {
        "args": request.training,
        "train_dataset": data.train,
        "eval_dataset": data.evaluation,
        "callbacks": callbacks,
        "peft_config": peft_config(request),
    }
    request.training.model_init_kwargs = model_options(request)  # type: ignore[attr-defined]
    if request.trainer == "kto":
        # Before TRL made KTO stable, its trainer did not load a tokenizer by itself.
        options["processing_class"] = load_tokenizer(request)
    if request.trainer == "grpo":
        options["reward_funcs"] = load_rewards(request)
    elif request.other_reference and request.trainer in ("dpo", "kto"):
        options["ref_model"] = _load_reference(request)
    set_seed(request.training.seed)  # early TRL 1.x drew a new adapter's weights before it set the seed
    try:
        trainer = kind(model=request.model_path, **options)
    except PareTuneError:
        raise
    except (ValueError, OSError, NotImplementedError) as error:
        raise PareTuneError(f"{kind.__name__} refuses this: {first_sentence(error, 400)}") from error
    if request.trainer in ("dpo", "kto", "sft") and hasattr(trainer.train_dataset, "__len__"):
        _check_prepared(request, trainer, data)
    if request.script.ignore_bias_buffers:
        import torch

        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


def load_rewards(request: Request) -> list[Any]:
    """The reward functions and models of a grpo run: TRL's names, import paths, model paths, ``file.py:function``.

    Args:
        request: of trainer grpo.

    Raises:
        ArgumentError: no reward was given, or one cannot be loaded.
    """
    rewards: list[Any] = []
    if request.script.reward_model_name_or_path:
        rewards.append(request.script.reward_model_name_or_path)
    rewards += [_named_reward(name) for name in request.script.reward_funcs or []]
    rewards += [_reward_from_file(text) for text in request.own.reward_function or []]
    if not rewards:
        raise ArgumentError(
            "reward_funcs",
            None,
            "grpo needs a reward: --reward_funcs, --reward_model_name_or_path or --reward_function path.py:function",
        )
    return rewards


def first_sentence(error: BaseException, limit: int = 240) -> str:
    """The first line or sentence of an exception's text, for a one-line message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _load_mixture(request: Request) -> dict[str, Any]:
    try:
        return dict(trl().get_dataset(request.mixture))
    except Exception as error:
        raise DataError(f"datasets: cannot be read: {first_sentence(error)}") from error


def model_options(request: Request) -> dict[str, Any]:
    model = request.model
    options: dict[str, Any] = {
        "revision": model.model_revision,
        "trust_remote_code": request.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    options.update(request.training.model_init_kwargs or {})  # type: ignore[attr-defined]
    if model.load_in_8bit or model.load_in_4bit:
        options["quantization_config"] = trl().get_quantization_config(model)
    return options


def peft_config(request: Request) -> Any:
    if not request.model.use_peft:
        return None
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "peft")
    return trl().get_peft_config(request.model)


def load_tokenizer(request: Request) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            request.model_path,
            revision=request.model.model_revision,
            trust_remote_code=request.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model_name_or_path={request.model_path!r}: no tokenizer: {first_sentence(error)}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_reference(request: Request) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    options = dict(request.training.model_init_kwargs or {})  # type: ignore[attr-defined]
    if isinstance(options.get("dtype"), str) and options["dtype"] != "auto":
        options["dtype"] = getattr(torch, options["dtype"])
    options.pop("revision", None)  # it is the policy's
    try:
        return AutoModelForCausalLM.from_pretrained(request.reference_path, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"reference_model={request.reference_path!r}: {first_sentence(error)}") from error


def _check_prepared(request: Request, trainer: Trainer, data: Data) -> None:
    """Refuse data of which truncation leaves no answer; newer TRL drops such rows, early 1.x trained on them."""
    arguments: Any = request.training
    rows: Any = trainer.train_dataset
    limit = getattr(arguments, "max_length", None)
    seen = rows[:_LOOKED_AT].get("prompt_ids", []) if len(rows) else []
    keeps_start = getattr(arguments, "truncation_mode", "keep_start") == "keep_start"
    nothing_left = limit is not None and keeps_start and bool(seen) and all(len(ids) >= limit for ids in seen)
    if len(rows) == 0 or nothing_left:
        raise DataError(
            f"dataset_name={data.train_name!r}: the prompts alone fill max_length={limit}; raise --max_length"
        )


def _named_reward(name: str) -> Callable[..., Any]:
    if "." not in name:
        rewards = importlib.import_module("trl.rewards")
        function = getattr(rewards, name, None)
        if not callable(function):
            known = ", ".join(found for found in sorted(dir(rewards)) if "reward" in found or "punish" in found)
            raise ArgumentError("reward_funcs", name, f"TRL has {known}; or give an import path such as pkg.module.fn")
        # A factory in TRL's own script as well, with these values.
        is_factory = name == "get_soft_overlong_punishment"
        return function(max_completion_len=1280, soft_punish_cache=256) if is_factory else function
    module, _, attribute = name.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ArgumentError("reward_funcs", name, f"cannot be imported: {first_sentence(error)}") from error


def _reward_from_file(text: str) -> Callable[..., Any]:
    file, separator, function = text.rpartition(":")
    path = Path(file).expanduser()
    if not separator or not path.is_file() or not function:
        raise ArgumentError("reward_function", text, "give an existing Python file and a function as path.py:function")
    name = f"paretune_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ArgumentError("reward_function", text, "give a Python file ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ArgumentError("reward_function", text, f"the file fails: {first_sentence(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ArgumentError("reward_function", text, f"{path.name} has no function {function}")
    return found


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path)
