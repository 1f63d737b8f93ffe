"""What a merge will do, decided from headers alone: each tensor's sources and place, and all that does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ArgumentError, MismatchError, examples
from ..native import kernels
from .inputs import Model, itemsize
from .matching import Match, match
from .methods import MergeMethod
from .numbers import ITEMSIZE, STORED
from .recipe import Recipe
from .settings import resolve
from .views import Stored, View, numel
from .vocabulary import Alignment

SHARD_BYTES = 5_000_000_000
_ALGORITHM = 2  # part of a merge's identity: a partial result of other arithmetic is not continued
_RATE = {"sum": 3.0e9, "delta": 2.5e9, "election": 1.0e9}  # bytes read a second by one worker, for the estimate …
_EAGER = 0.35  # … of the compiled kernels; numpy's share of it


@dataclass(frozen=True)
class Settings:
    """One tensor's parameters: a weight and a density for each model, and those common to all."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    scale: float = 1.0
    rescale: str = "none"
    normalize: bool = False
    t: float | None = None


@dataclass(frozen=True)
class Part:
    """One tensor of the merged model.

    Args:
        name, shape, kind: what is written.
        sources: the models' tensors.
        base: the base model's tensor, for task vectors.
        variants: its parameters, one set for each result of a sweep.
        copied: taken as it is (whole numbers).
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    sources: tuple[View, ...]
    base: View | None
    variants: tuple[Settings, ...]
    copied: bool = False

    @property
    def numel(self) -> int:
        return numel(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * (itemsize(self.sources[0]) if self.copied else ITEMSIZE[self.kind])

    @property
    def views(self) -> tuple[View, ...]:
        """Everything that is read."""
        return self.sources if self.base is None else (*self.sources, self.base)


@dataclass(frozen=True)
class Shard:
    """One file of the merged model: its name, header and where each tensor's bytes start."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class Plan:
    """A merge, or a sweep of merges, decided.

    Args:
        recipes: one for each result.
        labels: what distinguishes each result; empty for a single one.
        models: all inputs by the names that the recipe gives them.
        parts: every tensor of the result.
        shards: the files that are written for each result.
        config: the result's ``config.json``.
        notes: decisions that the user should know of.
        problems: what does not fit; a plan with problems is not carried out.
    """

    recipes: tuple[Recipe, ...]
    labels: tuple[str, ...]
    models: Mapping[str, Model]
    parts: tuple[Part, ...]
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    alignment: Alignment | None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default_factory=tuple)

    @property
    def recipe(self) -> Recipe:
        return self.recipes[0]

    @property
    def rule(self) -> MergeMethod:
        return self.recipe.rule

    @property
    def bytes_read(self) -> int:
        return sum(numel(view.shape) * itemsize(view) for part in self.parts for view in part.views)

    @property
    def bytes_written(self) -> int:
        return sum(shard.size for shard in self.shards) * len(self.recipes)

    def memory(self, workers: int) -> int:
        """An upper estimate of the resident bytes."""
        vectors = max((len(part.views) for part in self.parts), default=0)
        room = 2 << 24 if self.rule.sparsify == "magnitude" else 0
        results = len(self.recipes) << 20
        return (64 << 20) + workers * (room + results + (vectors + 8) * (1 << 19) + vectors * (1 << 23))

    def seconds(self, workers: int) -> float:
        """A rough estimate of the time it takes with the inputs in the page cache."""
        rate = _RATE[self.rule.family] * (_EAGER if kernels() is None else 1)
        return self.bytes_read / (rate * workers) + self.bytes_written / 1.5e9

    @cached_property
    def digest(self) -> str:
        """What makes two merges the same: recipe, inputs, layout."""
        content = {
            "algorithm": _ALGORITHM,
            "recipes": [recipe.to_dict() | {"seed": recipe.seed, "vocab": recipe.vocab} for recipe in self.recipes],
            "labels": self.labels,
            "inputs": [[model.fingerprint, model.stamp] for model in self.models.values()],
            "shards": [[shard.name, hashlib.sha256(shard.header).hexdigest()] for shard in self.shards],
            "config": self.config,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def check(self) -> None:
        """Raise what does not fit, all in one line.

        Raises:
            MismatchError: the models do not fit together.
        """
        if self.problems:
            raise MismatchError(" · ".join(self.problems))


def make_plan(recipes: Sequence[Recipe], labels: Sequence[str] = (), shard_bytes: int = SHARD_BYTES) -> Plan:
    """Decide a merge from the headers of its models.

    Args:
        recipes: one, or the several of a sweep, which differ in parameters only.
        labels: one for each recipe of a sweep.
        shard_bytes: the largest size of an output file; a tensor larger than that has a file of its own.

    Raises:
        CheckpointError: a model cannot be read, or not safely.
        ArgumentError: a parameter is out of range.
    """
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ArgumentError("shard_bytes", shard_bytes, "must be a positive number of bytes")
    models = {name: Model(name, recipes[0].adds_tau) for name in recipes[0].models}
    found = match(recipes[0], models)
    problems = list(found.problems)
    parts = []
    for each in found.matches:
        part = _part(recipes, each, problems)
        if part is not None:
            parts.append(part)
    if not parts and not problems:
        problems.append("no tensor is left to merge")
    config = found.config
    if recipes[0].dtype is not None and config:
        names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
        config.pop("torch_dtype", None)
        config["dtype"] = names[recipes[0].dtype]
    return Plan(
        tuple(recipes),
        tuple(labels),
        models,
        tuple(parts),
        tuple(_layout(parts, shard_bytes)),
        config,
        found.alignment,
        tuple(found.notes),
        tuple(problems),
    )


def _part(recipes: Sequence[Recipe], each: Match, problems: list[str]) -> Part | None:
    recipe = recipes[0]
    views = each.sources if each.base is None else (*each.sources, each.base)
    kinds = {view.kind for view in views}
    if not kinds & STORED.keys():
        return _copied(each, views, problems)
    if kinds - STORED.keys():
        problems.append(
            f"{each.name} has dtype {examples(kinds - STORED.keys())}: convert the model to F32, F16 or BF16"
        )
        return None
    base = each.base if recipe.rule.base != "no" else None
    kind = recipe.dtype or (each.base or each.sources[0]).kind
    variants = tuple(_settings(recipe, each) for recipe in recipes)
    return Part(each.name, each.sources[0].shape, kind, each.sources, base, variants)


def _copied(each: Match, views: Sequence[View], problems: list[str]) -> Part | None:
    """Whole numbers are no parameters: they must agree, and are copied."""
    first = views[0]
    if any(not isinstance(view, Stored) for view in views) or first.kind == "F64":
        problems.append(f"{each.name} has dtype {first.kind}: convert the model to F32, F16 or BF16")
        return None
    if any(view.kind != first.kind or not np.array_equal(view.values, first.values) for view in views):  # type: ignore[attr-defined]
        problems.append(
            f"{each.name} holds whole numbers ({first.kind}) that differ between the models: is it one architecture?"
        )
        return None
    return Part(each.name, first.shape, first.kind, (first,), None, (), copied=True)


def _settings(recipe: Recipe, each: Match) -> Settings:
    rule, part = recipe.rule, recipe.slices[each.slice]

    def common(name: str, default: Any) -> Any:
        return resolve(name, each.place, [part.parameters, recipe.parameters], rule.defaults.get(name, default))

    def own(name: str, default: float) -> tuple[float, ...]:
        shared = [part.parameters, recipe.parameters]
        fallback = rule.defaults.get(name, default)
        values = [resolve(name, each.place, [s.parameters, *shared], fallback) for s in part.sources]
        return tuple(_number(name, value) for value in values)

    count = len(each.sources)
    weights = own("weight", 1.0)
    if recipe.method == "passthrough":
        levels = [part.sources[0].parameters, part.parameters, recipe.parameters]
        weights = (_number("scale", resolve("scale", each.place, levels, 1.0)),)
    densities = own("density", 1.0) if rule.sparsify else (1.0,) * count
    for density in densities:
        if not 0 < density <= 1:
            raise ArgumentError("density", density, "must be in (0, 1]: the fraction of entries that is kept")
    rescale = common("rescale", "none") if rule.sparsify else "none"
    if rescale not in ("none", "expectation", "l1"):
        raise ArgumentError("rescale", rescale, "choose one of none, expectation, l1")
    normalize = common("normalize", rule.normalize and recipe.method != "passthrough")
    if not isinstance(normalize, bool):
        raise ArgumentError("normalize", normalize, "give true or false")
    if normalize and rule.family != "election" and not rule.sphere:
        total = sum(weights)
        if abs(total) < 1e-12:
            raise ArgumentError("weight", weights, f"the weights of {each.name} sum to 0: give normalize=false")
        weights = tuple(weight / total for weight in weights)
    if rule.sphere == "nested_slerp" and (min(weights) < 0 or sum(weights) <= 0):
        raise ArgumentError("weight", weights, "must not be negative, and not all 0, on a sphere")
    scale = _number("lambda", common("lambda", 1.0)) if rule.family != "sum" or each.base is not None else 1.0
    t = _number("t", common("t", 0.5)) if rule.sphere == "slerp" else None
    return Settings(weights, densities, scale, rescale, normalize, t)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ArgumentError(name, value, "must be a finite number")
    return float(value)


def _layout(parts: Sequence[Part], shard_bytes: int) -> list[Shard]:
    """Which tensor lies where: files of at most ``shard_bytes``, in the models' own order."""
    groups: list[list[Part]] = []
    filled = 0
    for part in parts:
        if not groups or (filled and filled + part.bytes > shard_bytes):
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.bytes
    shards = []
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(_shard(name, group))
    return shards


def _shard(name: str, group: Sequence[Part]) -> Shard:
    # Wide numbers first: then every tensor lies at a multiple of its own item size.
    group = sorted(group, key=lambda part: -itemsize(part.sources[0]) if part.copied else -ITEMSIZE[part.kind])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    starts = {}
    for part in group:
        header[part.name] = {"dtype": part.kind, "shape": list(part.shape), "data_offsets": [at, at + part.bytes]}
        starts[part.name] = at
        at += part.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    header_bytes = len(text).to_bytes(8, "little") + text
    offsets = {each: len(header_bytes) + start for each, start in starts.items()}
    return Shard(name, header_bytes, offsets, len(header_bytes) + at)
