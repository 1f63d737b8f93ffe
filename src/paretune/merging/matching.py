"""Which tensor of each model belongs to which tensor of the merged one: names match names, no architecture is known."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import examples
from ..layers import in_layer, is_first, layer_of, stack_of
from .inputs import Model
from .recipe import Recipe, Slice
from .settings import Place
from .views import Stored, View
from .vocabulary import Alignment, align, is_vocabulary, resized, size_of

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Match:
    """One tensor of the merged model, the number of the recipe's slice that it belongs to, and what it is made of."""

    name: str
    place: Place
    slice: int
    sources: tuple[View, ...]
    base: View | None


@dataclass
class Matched:
    """All tensors of the merged model."""

    matches: list[Match]
    config: dict[str, Any]
    alignment: Alignment | None
    notes: list[str]
    problems: list[str]


def match(recipe: Recipe, models: Mapping[str, Model]) -> Matched:
    """Match the tensors of all models by name.

    Args:
        recipe: what to merge.
        models: by the names that the recipe gives them.
    """
    first = models[recipe.base or recipe.slices[0].sources[0].model]
    found = Matched([], copy.deepcopy(first.config), None, [], [])
    views = _untied(models, first, found)
    if recipe.tokenizer is not None:
        base = recipe.base or recipe.slices[0].sources[0].model
        found.alignment = align(recipe.tokenizer, models, base)
    sliced = recipe.slices[0].sources[0].layers is not None
    if sliced:
        _match_slices(recipe, models, views, found)
    else:
        _match_whole(recipe, models, views, found)
    return found


def _match_whole(
    recipe: Recipe, models: Mapping[str, Model], views: dict[str, dict[str, View]], found: Matched
) -> None:
    whole = recipe.slices[0]
    wanted = _roles(recipe, whole)
    names = list(views[wanted[-1]]) if recipe.base is not None else list(views[wanted[0]])
    every = {name for each in wanted for name in views[each]}
    names += sorted(every - set(names))
    for model in dict.fromkeys(wanted):
        missing = every - views[model].keys()
        if missing:
            found.problems.append(
                f"{model} lacks tensors that other models have: {examples(missing)}: are all of one architecture?"
            )
    depths = _depths(names)
    for name in names:
        if all(name in views[model] for model in wanted):
            place = Place(name, depths[name], layer_of(name))
            _add(recipe, 0, place, wanted, [views[model][name] for model in wanted], models, found)


def _match_slices(
    recipe: Recipe, models: Mapping[str, Model], views: dict[str, dict[str, View]], found: Matched
) -> None:
    """Layer by layer; what precedes the layers comes from the first slice's models, what follows from the last's."""
    counts = {name: _layer_count(name, views[name], found) for name in models}
    total = 0
    last = len(recipe.slices) - 1
    matched: list[tuple[int, Place, list[str], list[str]]] = []
    types: list[Any] = []
    for number, each in enumerate(recipe.slices):
        wanted = _roles(recipe, each)
        ranges = [source.layers or (0, 0) for source in each.sources]
        if recipe.base is not None:
            ranges.append(ranges[0])  # the base's own layers of the same numbers as the first source's
        for model, (start, stop) in zip(wanted, ranges, strict=True):
            if stop > counts[model]:
                found.problems.append(f"layer_range {[start, stop]} of {model}: it has {counts[model]} layers")
        length = ranges[0][1] - ranges[0][0]
        outer = [name for name in views[wanted[0]] if layer_of(name) is None]
        if number == 0:
            matched += [(number, Place(name, 0.0), wanted, [name] * len(wanted)) for name in outer if is_first(name)]
        for step in range(length):
            depth = step / max(1, length - 1)
            for name in views[wanted[0]]:
                if layer_of(name) == ranges[0][0] + step:
                    place = Place(in_layer(name, total + step), depth, total + step)
                    theirs = [in_layer(name, start + step) for start, _ in ranges]
                    matched.append((number, place, wanted, theirs))
        types += _layer_types(models[wanted[0]], ranges[0])
        total += length
        if number == last:
            matched += [
                (number, Place(name, 0.0), wanted, [name] * len(wanted)) for name in outer if not is_first(name)
            ]
    _check_slices(recipe, matched, views, ranges_of(recipe), found)
    for slice_number, place, wanted, theirs in matched:
        if all(name in views[model] for model, name in zip(wanted, theirs, strict=True)):
            chosen = [views[model][name] for model, name in zip(wanted, theirs, strict=True)]
            _add(recipe, slice_number, place, wanted, chosen, models, found)
    for key in _LAYER_COUNTS:
        if key in found.config:
            found.config[key] = total
    if "layer_types" in found.config and len(types) == total:
        found.config["layer_types"] = types


def ranges_of(recipe: Recipe) -> dict[str, set[int]]:
    """The layers of each model that the slices use."""
    found: dict[str, set[int]] = {}
    for each in recipe.slices:
        for source in each.sources:
            found.setdefault(source.model, set()).update(range(*(source.layers or (0, 0))))
    return found


def _check_slices(
    recipe: Recipe,
    matched: Sequence[tuple[int, Place, list[str], list[str]]],
    views: dict[str, dict[str, View]],
    used: Mapping[str, set[int]],
    found: Matched,
) -> None:
    asked: dict[str, set[str]] = {}
    for _, _, wanted, theirs in matched:
        for model, name in zip(wanted, theirs, strict=True):
            asked.setdefault(model, set()).add(name)
    for model, names in asked.items():
        missing = names - views[model].keys()
        if missing:
            found.problems.append(
                f"{model} lacks tensors that other models have: {examples(missing)}: are all of one architecture?"
            )
        layers = {name for name in views[model] if layer_of(name) in used.get(model, set())}
        extra = layers - names
        if extra:
            found.problems.append(
                f"{model} has tensors that other models lack: {examples(extra)}: are all of one architecture?"
            )


def _roles(recipe: Recipe, each: Slice) -> list[str]:
    """The models of a slice, then the base."""
    return [source.model for source in each.sources] + ([recipe.base] if recipe.base is not None else [])


def _add(
    recipe: Recipe,
    number: int,
    place: Place,
    wanted: Sequence[str],
    views: list[View],
    models: Mapping[str, Model],
    found: Matched,
) -> None:
    fitted = _fitted(recipe, place.name, wanted, views, models, found)
    if fitted is None:
        return
    if recipe.base is None:
        sources, base = fitted, None
    else:
        sources, base = fitted[:-1], fitted[-1]
    found.matches.append(Match(place.name, place, number, tuple(sources), base))


def _fitted(
    recipe: Recipe, name: str, wanted: Sequence[str], views: list[View], models: Mapping[str, Model], found: Matched
) -> list[View] | None:
    """The tensors with one shape, or None where they have none."""
    base = len(views) - 1 if recipe.base is not None else 0
    vocabulary = all(is_vocabulary(name, view, size_of(models[m])) for view, m in zip(views, wanted, strict=True))
    if found.alignment is not None and vocabulary and len({view.shape[1:] for view in views}) == 1:
        found.config["vocab_size"] = found.alignment.size
        return found.alignment.aligned(wanted, views, base)
    shapes = {view.shape for view in views}
    if len(shapes) == 1:
        return views
    listed = ", ".join(f"{list(view.shape)} in {m}" for view, m in zip(views, wanted, strict=True))
    rows_only = len({view.shape[1:] for view in views}) == 1 and layer_of(name) is None
    if not rows_only:
        found.problems.append(f"{name} has shape {listed}: are all of one architecture?")
        return None
    if recipe.vocab == "strict":
        found.problems.append(
            f"{name} has shape {listed}: the vocabularies differ; vocab=pad or vocab=truncate resizes them, "
            "tokenizer_source matches them token by token"
        )
        return None
    fitted = resized(views, base, recipe.vocab)
    if "vocab_size" in found.config:
        found.config["vocab_size"] = fitted[0].shape[0]
    found.notes.append(f"{name}: {recipe.vocab} to {fitted[0].shape[0]} rows ({listed})")
    return fitted


def _untied(models: Mapping[str, Model], first: Model, found: Matched) -> dict[str, dict[str, View]]:
    """Every model's tensors, with heads that some models store and others tie to their embedding made equal."""
    views = {name: dict(model.views) for name, model in models.items()}
    common = set.intersection(*(set(each) for each in views.values()))
    extra = {name for each in views.values() for name in each} - common
    for name in sorted(extra):
        holders = [model for model in views if name in views[model]]
        lacking = [model for model in views if name not in views[model]]
        if layer_of(name) is not None or any(models[m].config.get("tie_word_embeddings") is False for m in lacking):
            continue
        twin = next((e for e in sorted(common) if is_first(e) and _same_shapes(views, holders, name, e)), None)
        if twin is None:
            continue
        if all(_same_values(views[model][name], views[model][twin]) for model in holders):
            for model in holders:
                del views[model][name]
            found.config["tie_word_embeddings"] = True
            found.notes.append(f"{name} is a copy of {twin} in {examples(holders)}: left out, the result is tied")
        else:
            for model in lacking:
                views[model][name] = views[model][twin]
            found.config["tie_word_embeddings"] = False
            found.notes.append(f"{name} is tied to {twin} in {examples(lacking)}: the result has a head of its own")
    return views


def _same_shapes(views: Mapping[str, Mapping[str, View]], holders: Sequence[str], name: str, twin: str) -> bool:
    return all(views[model][name].shape == views[model][twin].shape for model in holders)


def _same_values(a: View, b: View) -> bool:
    if not (isinstance(a, Stored) and isinstance(b, Stored)) or a.kind != b.kind:
        return False
    n = a.values.size
    return all(np.array_equal(a.values[i : i + _CHUNK], b.values[i : i + _CHUNK]) for i in range(0, n, _CHUNK))


def _depths(names: Sequence[str]) -> dict[str, float]:
    """Every tensor's depth: by its layer within its own stack; 0 outside the layers."""
    last: dict[str | None, int] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            last[stack_of(name)] = max(last.get(stack_of(name), 0), layer)
    found = {}
    for name in names:
        layer = layer_of(name)
        if layer is None:
            found[name] = 0.0  # as mergekit has it, for what follows the layers too
        else:
            found[name] = layer / max(1, last[stack_of(name)])
    return found


def _layer_count(model: str, views: Mapping[str, View], found: Matched) -> int:
    stacks = {stack_of(name) for name in views if layer_of(name) is not None}
    if len(stacks) > 1:
        found.problems.append(
            f"slices need one stack of layers, {model} has {examples(str(stack) for stack in stacks)}: "
            "merge whole models"
        )
    return 1 + max((layer for layer in map(layer_of, views) if layer is not None), default=-1)


def _layer_types(model: Model, layers: tuple[int, int]) -> list[Any]:
    types = model.config.get("layer_types")
    return types[layers[0] : layers[1]] if isinstance(types, list) else []
