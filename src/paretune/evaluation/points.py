"""Measurements of models and points.jsonl, the file that carries them between runs and tools.

One JSON object a line. ``name``, ``family``, ``reward``, ``reward_ci``, ``capability`` and ``capability_ci`` must be
there; everything else may be left out. Other tools' fields are kept and written back. docs/frontier.md lists them all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretune.atomic import write_text
from paretune.errors import ArgumentError, DataError

SCHEMA = 1
FAMILIES = ("reference", "base", "control", "regularisation", "online", "offline", "joint", "adaptive")
REQUIRED = ("name", "family", "reward", "reward_ci", "capability", "capability_ci")
VERDICTS = ("gain", "loss", "within noise")

Interval = tuple[float, float]


@dataclass(frozen=True)
class ItemScores:
    """What one model scored on each item of one benchmark (or each answer, for the reward).

    Args:
        scores: one number an item; 0 and 1 for right and wrong.
        ids: fingerprint of the items in their order (see :meth:`of`). Two models are compared item by item only where
            it is the same.
        category: what the benchmark counts for; the reward has none.
        clusters: for each item the group that it is drawn with, such as its passage or its prompt; None where
            items are independent.

    Example:
        >>> ItemScores.of([True, False], ["q1", "q2"], category="math").scores
        (1.0, 0.0)
    """

    scores: tuple[float, ...]
    ids: str
    category: str = ""
    clusters: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        scores: Iterable[float],
        ids: Iterable[object],
        category: str = "",
        clusters: Iterable[object] | None = None,
    ) -> ItemScores:
        """The scores of named items; ``clusters`` may be anything that tells groups apart.

        Raises:
            ArgumentError: where the lengths differ, or a score is not a finite number.
        """
        values, names = tuple(float(score) for score in scores), [str(name) for name in ids]
        if len(values) != len(names) or not values:
            raise ArgumentError("scores", len(values), f"give one score for each of the {len(names)} ids")
        bad = next((value for value in values if not math.isfinite(value)), None)
        if bad is not None:
            raise ArgumentError("scores", bad, "give finite numbers; leave out of all models what one could not answer")
        groups = None
        if clusters is not None:
            number: dict[object, int] = {}
            groups = tuple(number.setdefault(cluster, len(number)) for cluster in clusters)
            if len(groups) != len(values):
                raise ArgumentError("clusters", len(groups), f"give one for each of the {len(values)} scores")
        digest = hashlib.sha256("\n".join([*names, *map(str, groups or ())]).encode()).hexdigest()[:16]
        return cls(values, digest, category, groups)

    @property
    def mean(self) -> float:
        """The mean over items."""
        return math.fsum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Difference:
    """One model minus the reference on the same items.

    Args:
        difference: mean of the paired differences; negative where the model is worse.
        ci: its 95% interval.
        p: of no difference, two-sided; None where it was not tested.
        p_adjusted: after Holm's correction over the benchmarks (or categories) of the same model.
        verdict: ``gain``, ``loss`` or ``within noise``.
        items: how many.
        test: how p was found.
    """

    difference: float
    ci: Interval
    p: float | None = None
    p_adjusted: float | None = None
    verdict: str = "within noise"
    items: int | None = None
    test: str = ""


@dataclass(frozen=True)
class Measurement:
    """Reward and capability of one model, with intervals; both: more is better.

    Args:
        name: unique among the points of a front.
        family: ``reference``, ``base``, ``control``, ``regularisation``, ``online``, ``offline``, ``joint``,
            ``adaptive``, or a word of your own. At most one point of a front is the reference.
        reward: mean reward, in any unit.
        reward_ci, capability_ci: 95% intervals, (low, high).
        capability: macro-average over categories; a fraction of 1 in our own suites.
        hyperparameters: what tells the points of a method apart.
        path: points of the same path are joined by a line in the order of the file: the ratios of one merge.
        label: what is written beside the point, such as its ratio.
        capability_by_category: mean score of each category.
        tax: the reference's capability minus this one's, with its paired interval ``tax_ci``.
        tax_verdict: ``gain`` (of capability), ``loss`` or ``within noise``.
        reward_gain: reward minus the reference's, with its paired interval ``reward_gain_ci``.
        reward_verdict: likewise.
        by_category, by_benchmark: this model minus the reference.
        response_length: mean length of the answers that were rewarded, in tokens.
        kl: KL(this model ‖ reference) per answer on the reward prompts, in nats.
        seconds: what making the model cost.
        reward_items, capability_items: item-wise scores, from which all of the above can be computed again.
        measured: how: model, fingerprint, reference, decoding, seeds, n, versions.
        extra: fields of other tools.

    Raises:
        ArgumentError: naming the field, for a value that cannot be what it is.

    Example:
        >>> point = Measurement("sft", "reference", 0.4, (0.35, 0.45), 0.9, (0.88, 0.92))
        >>> Measurement.from_dict(point.to_dict()) == point
        True
    """

    name: str
    family: str
    reward: float
    reward_ci: Interval
    capability: float
    capability_ci: Interval
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    label: str = ""
    capability_by_category: dict[str, float] = field(default_factory=dict)
    tax: float | None = None
    tax_ci: Interval | None = None
    tax_verdict: str = ""
    reward_gain: float | None = None
    reward_gain_ci: Interval | None = None
    reward_verdict: str = ""
    by_category: dict[str, Difference] = field(default_factory=dict)
    by_benchmark: dict[str, Difference] = field(default_factory=dict)
    response_length: float | None = None
    kl: float | None = None
    seconds: float | None = None
    reward_items: ItemScores | None = None
    capability_items: dict[str, ItemScores] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("name", "family"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ArgumentError(name, getattr(self, name), "give a text that is not empty")
        for name in ("path", "label"):
            if not isinstance(getattr(self, name), str):
                raise ArgumentError(name, getattr(self, name), "give a text")
        for name in ("reward", "capability", "tax", "reward_gain", "response_length", "kl", "seconds"):
            value = getattr(self, name)
            if value is not None or name in REQUIRED:
                object.__setattr__(self, name, _number(name, value))
        for name in ("reward_ci", "capability_ci", "tax_ci", "reward_gain_ci"):
            value = getattr(self, name)
            if value is not None or name in REQUIRED:
                object.__setattr__(self, name, _interval(name, value))
        for name in ("tax_verdict", "reward_verdict"):
            if getattr(self, name) not in ("", *VERDICTS):
                raise ArgumentError(name, getattr(self, name), f"choose from {', '.join(VERDICTS)}, or leave it out")
        categories = _mapping("capability_by_category", self.capability_by_category)
        scores = {str(k): _number(f"capability_by_category[{k!r}]", v) for k, v in categories.items()}
        object.__setattr__(self, "capability_by_category", scores)
        for name in ("hyperparameters", "measured"):
            _mapping(name, getattr(self, name))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Measurement:
        """From one line of points.jsonl.

        Raises:
            ArgumentError: where a required field is missing, or a field cannot be what it is.
        """
        missing = [name for name in REQUIRED if name not in record]
        if missing:
            raise ArgumentError("fields", sorted(map(str, record)), f"give {', '.join(missing)} as well")
        version = record.get("schema", SCHEMA)
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= SCHEMA:
            raise ArgumentError("schema", version, f"this paretune reads schema 1 to {SCHEMA}; update it")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        given = {name: value for name, value in record.items() if name in known and value is not None}
        for name in ("by_category", "by_benchmark"):
            given[name] = {str(k): _difference(f"{name}[{k!r}]", v) for k, v in _mapping(name, given.get(name)).items()}
        scores = _mapping("capability_items", given.get("capability_items"))
        given["capability_items"] = {str(k): _items(f"capability_items[{k!r}]", v) for k, v in scores.items()}
        if "reward_items" in given:
            given["reward_items"] = _items("reward_items", given["reward_items"])
        extra = {name: value for name, value in record.items() if name not in known and name != "schema"}
        return cls(**{**{name: None for name in REQUIRED}, **given}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """One line of points.jsonl; what is empty is left out."""
        record: dict[str, Any] = {"schema": SCHEMA}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name != "extra" and (each.name in REQUIRED or (value is not None and value != "" and value != {})):
                record[each.name] = _plain(value)
        return {**record, **self.extra}


def read_points(*paths: str | Path) -> list[Measurement]:
    """The measurements of one file or of several, in order.

    Args:
        paths: files of JSON lines.

    Raises:
        DataError: naming file and line, where one cannot be read.
        ArgumentError: where no point is left, or two files hold different points of the same name.
    """
    return merge_points([_read(Path(path)) for path in paths], [str(path) for path in paths])


def merge_points(runs: Sequence[Sequence[Measurement]], sources: Sequence[str]) -> list[Measurement]:
    """The points of several runs as one list; a point that occurs twice with the same numbers is taken once.

    Args:
        runs: the points of each run.
        sources: what to call each run in an error.

    Raises:
        ArgumentError: where two runs hold different points of the same name.
    """
    seen: dict[str, tuple[Measurement, str]] = {}
    for points, source in zip(runs, sources, strict=True):
        for point in points:
            before, where = seen.setdefault(point.name, (point, source))
            if before is not point and not _same_numbers(before, point):
                raise ArgumentError(
                    "name",
                    point.name,
                    f"{where} and {source} hold different points of this name; rename one, or average them "
                    "as seeds of the same method (--combine-seeds)",
                )
    return [point for point, _ in seen.values()]


def write_points(path: str | Path, points: Iterable[Measurement]) -> None:
    """Write points.jsonl, whole or not at all.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "points.jsonl"
        >>> point = Measurement("sft", "reference", 0.4, (0.35, 0.45), 0.9, (0.88, 0.92))
        >>> write_points(file, [point])
        >>> read_points(file) == [point]
        True
    """
    lines = (json.dumps(point.to_dict(), allow_nan=False) for point in points)
    write_text(Path(path), "".join(f"{line}\n" for line in lines))


def _read(path: Path) -> list[Measurement]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(
            f"{path}: cannot be read ({why}); give a file of JSON lines as paretune measure writes"
        ) from None
    points = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {line[:60]!r} is not JSON ({error}); one object a line") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: {line[:60]!r} is not an object with fields; one object a line")
        try:
            points.append(Measurement.from_dict(record))
        except ArgumentError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not points:
        raise DataError(f"{path}: holds no points; write one JSON object a line")
    names = [point.name for point in points]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: name={twice!r} occurs {names.count(twice)} times; give each point its own")
    return points


def _same_numbers(a: Measurement, b: Measurement) -> bool:
    return all(
        getattr(a, name) == getattr(b, name) for name in (*REQUIRED, "hyperparameters", "capability_by_category")
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError(name, value, "give a finite number")
    return float(value)


def _interval(name: str, value: object) -> Interval:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ArgumentError(name, value, "give [low, high]")
    low, high = _number(name, value[0]), _number(name, value[1])
    if low > high:
        raise ArgumentError(name, value, "give [low, high] with low <= high")
    return low, high


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ArgumentError(name, value, "give an object with fields")
    return value


def _difference(name: str, value: object) -> Difference:
    if isinstance(value, Difference):
        return value
    record = _mapping(name, value)
    known = {f.name for f in dataclasses.fields(Difference)}
    if not {"difference", "ci"} <= set(record) <= known:
        raise ArgumentError(
            name, dict(record), f"give difference and ci, and of {', '.join(sorted(known))} what is known"
        )
    if record.get("verdict", "within noise") not in VERDICTS:
        raise ArgumentError(f"{name}.verdict", record["verdict"], f"choose from {', '.join(VERDICTS)}")
    checked = {n: _number(f"{name}.{n}", record[n]) for n in ("p", "p_adjusted") if record.get(n) is not None}
    difference, ci = _number(f"{name}.difference", record["difference"]), _interval(f"{name}.ci", record["ci"])
    return Difference(**{**record, **checked, "difference": difference, "ci": ci})


def _items(name: str, value: object) -> ItemScores:
    if isinstance(value, ItemScores):
        return value
    record = _mapping(name, value)
    scores, clusters = record.get("scores"), record.get("clusters")
    if not isinstance(scores, list) or not scores or not isinstance(record.get("ids"), str):
        raise ArgumentError(name, dict(record), "give scores, a list of numbers, and ids, the items' fingerprint")
    if clusters is not None and (
        not isinstance(clusters, list)
        or len(clusters) != len(scores)
        or not all(isinstance(c, int) and not isinstance(c, bool) for c in clusters)
    ):
        raise ArgumentError(f"{name}.clusters", clusters, f"give one whole number for each of the {len(scores)} scores")
    return ItemScores(
        tuple(_number(f"{name}.scores", score) for score in scores),
        record["ids"],
        str(record.get("category", "")),
        None if clusters is None else tuple(clusters),
    )


def _plain(value: Any) -> Any:
    """For JSON: intervals as lists, whole scores without a decimal point."""
    if isinstance(value, ItemScores):
        record: dict[str, Any] = {"ids": value.ids, "scores": [int(s) if s == int(s) else s for s in value.scores]}
        if value.category:
            record["category"] = value.category
        if value.clusters is not None:
            record["clusters"] = list(value.clusters)
        return record
    if isinstance(value, Difference):
        return {k: _plain(v) for k, v in vars(value).items() if v is not None and v != ""}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
