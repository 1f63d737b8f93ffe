"""Models with different vocabularies: rows of embeddings and heads brought into one order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, CheckpointError, examples
from ..layers import layer_of
from .inputs import Model, read_vocabulary
from .views import Rows, View


def size_of(model: Model) -> int | None:
    """The number of rows of a model's embedding, by its configuration."""
    for content in (model.config, model.config.get("text_config")):
        if isinstance(content, Mapping) and isinstance(content.get("vocab_size"), int):
            return int(content["vocab_size"])
    return None


def is_vocabulary(name: str, view: View, size: int | None) -> bool:
    """Whether a tensor has one row a token: it lies outside the layers and is as long as the vocabulary."""
    return size is not None and layer_of(name) is None and len(view.shape) >= 1 and view.shape[0] == size


def resized(views: Sequence[View], base: int, mode: str) -> list[View]:
    """The same tensor of several models with equally many rows.

    Args:
        views: one a model; shapes differ in the first size only.
        base: which of them gives the rows that others lack, if it has them; else the first that has them.
        mode: ``pad`` to the most rows or ``truncate`` to the fewest.
    """
    sizes = [view.shape[0] for view in views]
    wanted = max(sizes) if mode == "pad" else min(sizes)
    tail = views[0].shape[1:]
    order = [base, *(i for i in range(len(views)) if i != base)]
    found: list[View] = []
    for view in views:
        parts = np.zeros(wanted, np.int64)
        rows = np.arange(wanted)
        donors = [view, *(views[i] for i in order)]
        for row in range(view.shape[0], wanted):
            parts[row] = next(i for i, donor in enumerate(donors) if row < donor.shape[0])
        found.append(Rows((wanted, *tail), parts, rows, donors))
    return found


@dataclass(frozen=True)
class Alignment:
    """The merged vocabulary: how many rows, and for each row the number that each model gives its token.

    Args:
        size: rows of the merged embedding.
        rows: by model, as given in the recipe: for each merged row the model's own, or −1.
        files: the tokenizer's files of the merged model, by name; bytes where they are made anew.
    """

    size: int
    rows: Mapping[str, NDArray[np.int64]]
    files: Mapping[str, Path | bytes]

    def aligned(self, models: Sequence[str], views: Sequence[View], base: int) -> list[View]:
        """One vocabulary tensor of several models in the merged order.

        A row that a model lacks is that of ``views[base]``, or of the first model that has it.
        """
        tail = views[0].shape[1:]
        order = [base, *(i for i in range(len(views)) if i != base)]
        found: list[View] = []
        for model, view in zip(models, views, strict=True):
            donors = [view, *(views[i] for i in order)]
            tables = [self.rows[model], *(self.rows[models[i]] for i in order)]
            parts, rows = np.full(self.size, -1, np.int64), np.full(self.size, -1, np.int64)
            for number, table in enumerate(tables):
                take = (parts < 0) & (table >= 0)
                parts[take], rows[take] = number, table[take]
            parts[parts < 0], rows[rows < 0] = 0, 0  # a number without a token: any row does
            found.append(Rows((self.size, *tail), parts, rows, donors))
        return found


def align(source: str, models: Mapping[str, Model], base: str) -> Alignment | None:
    """How the models' vocabularies map to the merged one; None where all have the same.

    Args:
        source: ``base``, ``union`` or a model.
        models: by the names that the recipe gives them.
        base: the name of the base model, or of the first where there is none.

    Raises:
        CheckpointError: a model has no ``tokenizer.json``.
        ArgumentError: ``source`` is no model that can be read.
    """
    tables = {name: _table(model) for name, model in models.items()}
    sizes = {name: _rows(model, tables[name]) for name, model in models.items()}
    for name, table in tables.items():
        beyond = [token for token, number in table.items() if not 0 <= number < sizes[name]]
        if beyond:
            raise CheckpointError(
                f"{name}: tokens without a row among the {sizes[name]} of its embedding: {examples(beyond)}: "
                "is tokenizer.json this model's?"
            )
    donor = models[base] if source in ("base", "union") else models.get(source) or _other(source)
    target = dict(_table(donor))
    size = _rows(donor, target)
    files: dict[str, Path | bytes] = dict(donor.tokenizer_files())
    if source == "union":
        added = [token for table in tables.values() for token in table if token not in target]
        added = list(dict.fromkeys(added))
        if added:
            start = max(target.values(), default=-1) + 1
            target.update({token: start + i for i, token in enumerate(added)})
            size = max(size, start + len(added))
            files["tokenizer.json"] = _extended(donor, added, start)
    if all(table == target for table in tables.values()) and set(sizes.values()) == {size}:
        return None
    rows = {}
    for name, table in tables.items():
        own = np.full(size, -1, np.int64)
        for token, number in target.items():
            if token in table and number < size and table[token] < sizes[name]:
                own[number] = table[token]
        # Rows beyond the tokenizer (padding to a round size) stay what they are.
        used = np.zeros(size, bool)
        used[[number for number in target.values() if number < size]] = True
        own[~used] = np.where(np.arange(size) < sizes[name], np.arange(size), -1)[~used]
        rows[name] = own
    return Alignment(size, rows, files)


def _other(source: str) -> Model:
    try:
        return Model(source)
    except CheckpointError as error:
        raise ArgumentError("tokenizer_source", source, f"not 'base', 'union' or a model ({error})") from None


def _table(model: Model) -> dict[str, int]:
    found = model.vocabulary()
    if found is None:
        raise CheckpointError(
            f"{model.given}: has no tokenizer.json, which tokenizer_source needs: save a fast tokenizer"
        )
    return found


def _rows(model: Model, table: Mapping[str, int]) -> int:
    return size_of(model) or max(table.values(), default=-1) + 1


def _extended(model: Model, added: Sequence[str], start: int) -> bytes:
    """The model's ``tokenizer.json`` with further tokens."""
    file = model.tokenizer_files()["tokenizer.json"]
    read_vocabulary(file)  # refuses a broken file
    content: dict[str, Any] = json.loads(file.read_bytes())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    entries = list(content.get("added_tokens") or [])
    entries += [{"id": start + i, "content": token, **plain} for i, token in enumerate(added)]
    content["added_tokens"] = sorted(entries, key=lambda entry: entry["id"])
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
