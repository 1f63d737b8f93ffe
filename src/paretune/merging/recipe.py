"""What to merge and how: built from arguments, or read from mergekit's YAML as it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .methods import METHODS, MergeMethod
from .settings import Partwise, PerTensor

_TOP = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source"}
_TOP |= {"tokenizer", "name"}
_IGNORED = {"int8_mask"}  # a way of saving memory, without a meaning for the result
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Source:
    """One model's contribution to a slice: the model, a range of its layers (None: all), its parameters."""

    model: str
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the merged model: what they are made of, and parameters for all sources."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge: method, models, parameters.

    Args:
        method: a name in `METHODS`.
        slices: what the merged model is made of; one slice without layer ranges for whole models.
        base: the base model.
        parameters: for all models and tensors.
        dtype: of the result (BF16, F16, F32); None keeps each tensor's own.
        tokenizer: whose tokenizer and vocabulary the result gets: None (the base's or first model's, no vocabulary
            is touched), ``base``, ``union``, or a model.
        seed: of random masks.
        vocab: what to do where vocabularies differ in size: ``strict``, ``pad`` or ``truncate``.
        adds_tau: the recipe has the part of the task vector that an adapter among its models was trained beside.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    tokenizer: str | None = None
    seed: int = 0
    vocab: str = "strict"
    adds_tau: bool = False

    def __post_init__(self) -> None:
        if self.vocab not in ("strict", "pad", "truncate"):
            raise ArgumentError("vocab", self.vocab, "choose 'strict', 'pad' or 'truncate'")
        check_method(self.method)
        if not self.slices or not all(each.sources for each in self.slices):
            raise ArgumentError("models", [], "give at least one model")
        rule = self.rule
        if rule.base == "required" and self.base is None:
            raise ArgumentError("base", None, f"{self.method} adds task vectors to a base model: name it")
        if rule.base == "no" and self.base is not None and self.method not in ("linear", "passthrough"):
            raise ArgumentError("base", self.base, f"{self.method} takes no base model")
        for each in self.slices:
            low, high = rule.models
            if len(each.sources) < low or (high is not None and len(each.sources) > high):
                wanted = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
                given = [source.model for source in each.sources]
                raise ArgumentError("models", given, f"{self.method} merges {wanted}")
            lengths = {source.layers[1] - source.layers[0] for source in each.sources if source.layers}
            if len(lengths) > 1:
                raise ArgumentError(
                    "layer_range", sorted(lengths), "the sources of a slice must have equally many layers"
                )
        self._check_names()

    @property
    def rule(self) -> MergeMethod:
        """The method."""
        return METHODS[self.method]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model named, the base first, each once."""
        named = [self.base] if self.base is not None else []
        named += [source.model for each in self.slices for source in each.sources]
        return tuple(dict.fromkeys(named))

    def _check_names(self) -> None:
        known = {*self.rule.per_model, *self.rule.common, *_IGNORED}
        if self.method == "passthrough":
            known.add("scale")
        levels = [self.parameters, *(each.parameters for each in self.slices)]
        levels += [source.parameters for each in self.slices for source in each.sources]
        for level in levels:
            for name in level:
                if name not in known:
                    listed = ", ".join(sorted(known - _IGNORED))
                    raise ArgumentError(name, level[name], f"not a parameter of {self.method}, which takes {listed}")

    def to_dict(self) -> dict[str, Any]:
        """The recipe in mergekit's form, for the record."""
        found: dict[str, Any] = {"merge_method": self.method}
        if self.slices[0].sources[0].layers is None:
            found["models"] = [
                {"model": source.model} | ({"parameters": _plain(source.parameters)} if source.parameters else {})
                for source in self.slices[0].sources
            ]
        else:
            found["slices"] = [
                {
                    "sources": [
                        {"model": source.model, "layer_range": list(source.layers or ())}
                        | ({"parameters": _plain(source.parameters)} if source.parameters else {})
                        for source in each.sources
                    ]
                }
                | ({"parameters": _plain(each.parameters)} if each.parameters else {})
                for each in self.slices
            ]
        if self.base is not None:
            found["base_model"] = self.base
        if self.parameters:
            found["parameters"] = _plain(self.parameters)
        if self.dtype is not None:
            found["dtype"] = {kind: name for name, kind in _DTYPES.items()}[self.dtype]
        if self.tokenizer is not None:
            found["tokenizer_source"] = self.tokenizer
        return found


def check_method(name: str) -> None:
    """Refuse a method that is not known."""
    if name not in METHODS:
        raise ArgumentError("method", name, f"choose one of {', '.join(METHODS)}")


def kind_of(dtype: Any, argument: str = "dtype") -> str | None:
    """The format's name of a dtype given as ``"bfloat16"`` or ``torch.bfloat16``; None for None."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ArgumentError(argument, dtype, f"choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load(path: str | os.PathLike[str], *, seed: int = 0, vocab: str = "strict") -> Recipe:
    """Read a mergekit configuration.

    Args:
        path: of the YAML file.
        seed: of random masks.
        vocab: what to do where vocabularies differ in size.

    Raises:
        ArgumentError: the file is not YAML of that form, or asks for something that is not supported, which is named.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError("recipe", str(path), f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ArgumentError("recipe", str(path), f"is not YAML ({' '.join(str(error).split())[:160]})") from None
    return from_dict(content, seed=seed, vocab=vocab)


def from_dict(content: Any, *, seed: int = 0, vocab: str = "strict") -> Recipe:
    """A recipe from the content of a mergekit configuration; see `load`."""
    content = _mapping(content, "recipe")
    for key in content:
        if key not in _TOP:
            raise ArgumentError(
                str(key), content[key], f"not supported in a recipe, which has {', '.join(sorted(_TOP))}"
            )
    if "merge_method" not in content:
        raise ArgumentError("merge_method", None, f"choose one of {', '.join(METHODS)}")
    method = str(content["merge_method"])
    if method not in METHODS:
        raise ArgumentError("merge_method", method, f"not supported: choose one of {', '.join(METHODS)}")
    base = content.get("base_model")
    base = None if base is None else _model(base)
    if ("models" in content) == ("slices" in content):
        raise ArgumentError("models, slices", sorted(content), "give exactly one of the two")
    if "models" in content:
        sources = tuple(_source(each) for each in _list(content["models"], "models"))
        slices: tuple[Slice, ...] = (Slice(sources),)
        if any(source.layers for source in sources):
            raise ArgumentError("layer_range", content["models"], "ranges belong in slices")
    else:
        slices = tuple(_slice(each) for each in _list(content["slices"], "slices"))
    parameters = dict(_mapping(content.get("parameters") or {}, "parameters"))
    slices, base = arranged(method, slices, base)
    recipe = Recipe(
        method,
        tuple(_mergekit_rescale(method, each) for each in slices),
        base,
        _defaults(method, parameters),
        kind_of(content.get("out_dtype", content.get("dtype"))),
        _tokenizer(content),
        seed,
        vocab,
    )
    return recipe


def arranged(method: str, slices: tuple[Slice, ...], base: str | None) -> tuple[tuple[Slice, ...], str | None]:
    """The base is often listed among the models: it adds nothing to itself; for slerp it says which end t = 0 is."""
    if METHODS[method].base != "no" and base is not None:
        slices = tuple(
            Slice(tuple(s for s in each.sources if s.model != base) or each.sources, each.parameters) for each in slices
        )
    if method == "slerp":
        if base is None:
            raise ArgumentError("base_model", None, "slerp starts from it at t = 0: name one of the two models")
        arranged = []
        for each in slices:
            sources = sorted(each.sources, key=lambda source: source.model != base)
            if sources[0].model != base:
                sources.insert(0, Source(base, sources[0].layers))
            arranged.append(Slice(tuple(sources), each.parameters))
        return tuple(arranged), None
    return slices, base


def _defaults(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """mergekit's defaults where they differ from ours, and its true and false for the kind of rescaling."""
    rule = METHODS[method]
    if "rescale" in rule.common:
        parameters.setdefault("rescale", rule.sparsify == "random")
        parameters["rescale"] = _rescale(parameters["rescale"])
        if "density" not in parameters:
            parameters["density"] = 1.0
    return parameters


def _mergekit_rescale(method: str, each: Slice) -> Slice:
    if "rescale" not in each.parameters:
        return each
    return Slice(each.sources, {**each.parameters, "rescale": _rescale(each.parameters["rescale"])})


def _rescale(value: Any) -> Any:
    return ("l1" if value else "none") if isinstance(value, bool) else value


def _slice(content: Any) -> Slice:
    content = _mapping(content, "slices")
    _known(content, {"sources", "parameters"}, "slices")
    sources = tuple(_source(each) for each in _list(content.get("sources"), "sources"))
    missing = [source.model for source in sources if source.layers is None]
    if missing:
        raise ArgumentError("layer_range", missing, "every source of a slice needs one, as [first, last + 1]")
    return Slice(sources, dict(_mapping(content.get("parameters") or {}, "parameters")))


def _source(content: Any) -> Source:
    if isinstance(content, str):
        return Source(content)
    content = _mapping(content, "models")
    _known(content, {"model", "layer_range", "parameters"}, "models")
    if "model" not in content:
        raise ArgumentError("model", content, "every entry names its model")
    layers = content.get("layer_range")
    if layers is not None:
        fits = isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
        if not fits or not 0 <= layers[0] < layers[1]:
            raise ArgumentError("layer_range", layers, "give [first, last + 1]")
        layers = (layers[0], layers[1])
    parameters = dict(_mapping(content.get("parameters") or {}, "parameters"))
    return Source(_model(content["model"]), layers, parameters)


def _model(content: Any) -> str:
    if isinstance(content, Mapping):  # mergekit's long form
        inner = content.get("model")
        if set(content) == {"model"} and isinstance(inner, Mapping) and set(inner) <= {"path", "revision"}:
            if inner.get("revision") is None and isinstance(inner.get("path"), str):
                return inner["path"]
            raise ArgumentError(
                "revision", inner.get("revision"), "not supported: download that revision and name its path"
            )
        raise ArgumentError("model", content, "give a path or a hub id; MODEL+ADAPTER for an adapter")
    if not isinstance(content, str) or not content:
        raise ArgumentError("model", content, "give a path or a hub id")
    return content


def _tokenizer(content: Mapping[str, Any]) -> str | None:
    source = content.get("tokenizer_source")
    long = content.get("tokenizer")
    if long is not None:
        if source is not None:
            raise ArgumentError("tokenizer", long, "give it or tokenizer_source, not both")
        long = _mapping(long, "tokenizer")
        _known(long, {"source"}, "tokenizer")
        source = long.get("source")
    if source is None:
        return None
    if not isinstance(source, str) or not source:
        raise ArgumentError("tokenizer_source", source, "give 'base', 'union' or a model")
    return source.removeprefix("model:")


def _known(content: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise ArgumentError(f"{where}.{key}", content[key], f"not supported there, only {', '.join(sorted(known))}")


def _mapping(content: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ArgumentError(name, content, "must be a mapping of names to values")
    return content


def _list(content: Any, name: str) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise ArgumentError(name, content, "must be a list with at least one entry")
    return content


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: asdict(value) if isinstance(value, Partwise | PerTensor) else value for name, value in parameters.items()
    }
