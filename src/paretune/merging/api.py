"""`merge`: plan, stream, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..log import get
from ..native import kernels
from .methods import METHODS
from .output import Output
from .plan import SHARD_BYTES, Plan, make_plan
from .recipe import Recipe, Slice, Source, arranged, check_method, kind_of, load
from .settings import Partwise
from .stream import Progress, checked_workers, stream

_logger = get("merging")
Models = Mapping[str, Any] | Sequence[str]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        out: the directory.
        results: the directories of the results: ``out``, or one a point of a sweep.
        tensors: how many tensors each result has.
        resumed: how many of them an interrupted run had written already.
        bytes_read, bytes_written: of tensors, in this run and before.
        seconds: of this run.
        notes: decisions that the user should know of.
    """

    out: Path
    results: tuple[Path, ...]
    tensors: int
    resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report with nothing but plain values."""
        return asdict(self) | {"out": str(self.out), "results": [str(path) for path in self.results]}


def merge(
    method: str,
    models: Models | None = None,
    base: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    density: Any = None,
    seed: int = 0,
    dtype: Any = None,
    normalize: bool | None = None,
    rescale: str | None = None,
    scale: Any = None,
    t: Any = None,
    pivots: Sequence[int] | None = None,
    ratios: Sequence[float] | None = None,
    head: float | None = None,
    embeddings: float | None = None,
    norms: float | None = None,
    sweep: Mapping[str, Sequence[float]] | None = None,
    tokenizer: str | None = None,
    vocab: str = "strict",
    allow_non_finite: bool = False,
    workers: int | None = None,
    chunk: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge checkpoints on disk, in bounded memory, deterministically.

    Args:
        method: ``linear``, ``task_arithmetic``, ``dare_linear``, ``dare_ties``, ``ties``, ``slerp``, ``nuslerp``,
            ``model_stock`` or ``passthrough``; or the path of a mergekit YAML file, which then says everything.
        models: ``{path: weight}``, ``{path: {"weight": …, "density": …}}`` or a list of paths. A path is a directory,
            a file, a hub id, or ``MODEL+ADAPTER``. A weight is a number, a list (interpolated over the layers) or a
            list of ``{"filter": part of a tensor's name, "value": …}``.
        base: the base model of methods that add task vectors; for slerp, which of the two t = 0 is.
        out: the directory to write; must not exist or be empty.
        density: the kept fraction of task vectors, in (0, 1]; of all models.
        seed: of random masks.
        dtype: of the result: ``"bfloat16"``, ``"float16"``, ``"float32"`` or torch's; each tensor's own by default.
        normalize: divide by the sum of weights; by default for linear and ties.
        rescale: of sparsified task vectors: ``"none"``, ``"expectation"`` or ``"l1"``; the method's own by default.
        scale: factor of the merged task vector (mergekit's lambda).
        t: where between the two models slerp stops, in [0, 1]; from the weights by default.
        pivots, ratios, head, embeddings, norms: for linear with two models: the first one's share by blocks of
            layers (see `Partwise`).
        sweep: ``{"weight": [0.1, …]}`` (also density, lambda, t): one result for each value, read once. A weight is
            the last model's; the others share the rest in proportion.
        tokenizer: whose vocabulary the result gets: ``"base"``, ``"union"`` or a model; None touches none.
        vocab: where vocabularies differ in size: ``"strict"`` refuses, ``"pad"``, ``"truncate"``.
        allow_non_finite: merge NaN and infinity as they are.
        workers: threads; the result is the same for any number.
        chunk: elements at a time, a multiple of 65536; neither does this change the result. By default what suits
            the cache.
        shard_bytes: largest size of an output file.
        progress: called with bytes read and bytes to read.

    Returns:
        What was done.

    Raises:
        ArgumentError: an argument cannot be what it is, or the output is not empty.
        MismatchError: the models do not fit together.
        CheckpointError: a model cannot be read, holds NaN, or the disk is full.

    Reference: each method's paper is in `paretune.merging.METHODS`.

    Example:
        >>> import tempfile, torch, safetensors.torch, paretune as pt
        >>> folder = tempfile.mkdtemp()
        >>> for name in ("a", "b"):
        ...     safetensors.torch.save_file({"w": torch.full((2,), float(name == "b"))}, f"{folder}/{name}.safetensors")
        >>> report = pt.merge(
        ...     "linear", {f"{folder}/a.safetensors": 0.75, f"{folder}/b.safetensors": 0.25}, out=f"{folder}/out"
        ... )
        >>> safetensors.torch.load_file(f"{folder}/out/model.safetensors")["w"]
        tensor([0.2500, 0.2500])
    """
    if out is None:
        raise ArgumentError("out", None, "name the directory to write")
    common = {"lambda": scale, "t": t, "normalize": normalize, "rescale": rescale, "density": density}
    if models is None and os.fspath(method).endswith((".yaml", ".yml")):
        recipe = load(method, seed=seed, vocab=vocab)
    else:
        partwise = None
        if ratios is not None or pivots is not None:
            blocks = tuple(ratios or ()), tuple(pivots or ())
            partwise = Partwise(*blocks, head=head, embeddings=embeddings, norms=norms)
        recipe = build(method, models, base, common, seed, dtype, tokenizer, vocab, partwise)
    recipes, labels = swept(recipe, sweep or {})
    plan = make_plan(recipes, labels, shard_bytes)
    return carry_out(plan, out, workers=workers, chunk=chunk, allow_non_finite=allow_non_finite, progress=progress)


def build(
    method: str,
    models: Models | None,
    base: str | os.PathLike[str] | None,
    common: Mapping[str, Any],
    seed: int = 0,
    dtype: Any = None,
    tokenizer: str | None = None,
    vocab: str = "strict",
    partwise: Partwise | None = None,
) -> Recipe:
    """A recipe from arguments; see `merge`.

    Args:
        common: parameters for all models by mergekit's names; None leaves the method's own.
        partwise: the first model's share by parts, for linear with two models.
    """
    check_method(method)
    sources = _sources(models)
    parameters = {name: value for name, value in common.items() if value is not None}
    if partwise is not None:
        if method != "linear" or len(sources) != 2:
            raise ArgumentError("ratios", partwise.ratios, "ratios by parts go with method linear and two models")
        shares = (partwise, replace(partwise, rest=True))
        sources = [Source(source.model, None, {"weight": share}) for source, share in zip(sources, shares, strict=True)]
    if method == "slerp":
        if "t" not in parameters and len(sources) == 2:
            low, high = (source.parameters.get("weight", 1.0) for source in sources)
            parameters["t"] = _share(low, high)
        sources = [Source(source.model) for source in sources]
    given_base = None if base is None else os.fspath(base)
    slices: tuple[Slice, ...] = (Slice(tuple(sources)),)
    if method == "slerp" and given_base is not None:
        slices, given_base = arranged(method, slices, given_base)
    return Recipe(method, slices, given_base, parameters, kind_of(dtype), tokenizer, seed, vocab)


def _share(low: Any, high: Any) -> float:
    if not all(isinstance(each, int | float) for each in (low, high)) or low < 0 or high < 0 or low + high == 0:
        raise ArgumentError("weight", (low, high), "slerp wants two weights that are not negative, or t")
    return float(high / (low + high))


def _sources(models: Models | None) -> list[Source]:
    if not models:
        raise ArgumentError("models", models, "give {path: weight} with at least one model")
    if isinstance(models, str):
        raise ArgumentError("models", models, "give {path: weight}, or a list of paths")
    if not isinstance(models, Mapping):
        return [Source(os.fspath(model)) for model in models]
    found = []
    for model, given in models.items():
        if isinstance(given, Mapping):
            found.append(Source(os.fspath(model), None, dict(given)))
        elif given is None:
            found.append(Source(os.fspath(model)))
        else:
            found.append(Source(os.fspath(model), None, {"weight": given}))
    return found


def swept(recipe: Recipe, sweep: Mapping[str, Sequence[float]]) -> tuple[list[Recipe], list[str]]:
    """A recipe for each point of a sweep, and their names; all combinations where several parameters are swept."""
    points: list[tuple[Recipe, list[str]]] = [(recipe, [])]
    for name, values in sweep.items():
        if not values:
            raise ArgumentError("sweep", dict(sweep), f"give {name} at least one value")
        points = [
            (_point(each, name, float(value)), [*label, f"{name}={value:g}"])
            for each, label in points
            for value in values
        ]
    labels = [",".join(label) for _, label in points] if sweep else []
    if len(set(labels)) != len(labels):
        raise ArgumentError("sweep", dict(sweep), "every value may occur once")
    return [each for each, _ in points], labels


def _point(recipe: Recipe, name: str, value: float) -> Recipe:
    rule = METHODS[recipe.method]
    if recipe.method == "slerp" and name == "weight":
        name = "t"
    if name not in {*rule.per_model, *rule.common} - {"normalize", "rescale"}:
        raise ArgumentError("sweep", name, f"{recipe.method} has no such number to vary")
    if name != "weight":
        slices = tuple(
            Slice(
                tuple(replace(s, parameters=_without(s.parameters, name)) for s in each.sources),
                _without(each.parameters, name),
            )
            for each in recipe.slices
        )
        return replace(recipe, slices=slices, parameters={**recipe.parameters, name: value})
    return replace(recipe, slices=tuple(_shared(each, recipe, value) for each in recipe.slices))


def _shared(each: Slice, recipe: Recipe, value: float) -> Slice:
    """The last model gets the weight, the others share the rest in proportion to theirs."""
    *others, last = each.sources
    own = [source.parameters.get("weight", each.parameters.get("weight", 1.0)) for source in others]
    if not all(isinstance(weight, int | float) for weight in own):
        raise ArgumentError("sweep", "weight", "the models' own weights must be numbers")
    total = sum(own)
    if others and total == 0:
        raise ArgumentError("sweep", "weight", "the other models' weights sum to 0")
    weights = [(1 - value) * weight / total for weight in own] + [value]
    found = [
        replace(source, parameters={**source.parameters, "weight": weight})
        for source, weight in zip([*others, last], weights, strict=True)
    ]
    return Slice(tuple(found), each.parameters)


def _without(parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key != name}


def carry_out(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    chunk: int | None = None,
    allow_non_finite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Do what a plan says; see `merge`."""
    started = time.perf_counter()
    plan.check()
    kernels()
    workers = checked_workers(workers, chunk)
    output = Output(plan, out)
    output.check_space()
    for note in plan.notes:
        _logger.info(note)
    try:
        output.open()
        resumed = len(output.done)
        stream(
            plan,
            output,
            workers=workers,
            chunk=chunk,
            allow_non_finite=allow_non_finite,
            progress=progress,
        )
        output.publish()
    finally:
        output.close()
    results = tuple(output.out / label for label in plan.labels) or (output.out,)
    return MergeReport(
        output.out,
        results,
        len(plan.parts),
        resumed,
        plan.bytes_read,
        plan.bytes_written,
        time.perf_counter() - started,
        plan.notes,
    )
