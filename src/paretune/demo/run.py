"""The demo's run: train or load the models of each seed, make and measure every row, write results and pictures."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paretune.atomic import write_text
from paretune.demo.align import DPOSettings
from paretune.demo.methods import Bench, Row, rows
from paretune.demo.pretrain import Recipe, prepare
from paretune.demo.world import World
from paretune.training.trl_classes import quiet_deprecations

Report = Callable[[str, int, int], None]  # (what, done, of)
Points = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        out: the directory of results; finished points in it are kept.
        seeds: one world for each.
        quick: few methods.
        workers: processes, of one thread each.
        cache: of base and reference models; None is the user's cache directory.
    """

    out: Path
    seeds: tuple[int, ...] = (0,)
    quick: bool = False
    workers: int = 2
    cache: Path | None = None


def run(options: Options, report: Report = lambda what, done, of: None) -> dict[str, Any]:
    """Runs what is not there yet and writes results.json, frontier.png and report.html.

    Args:
        options: what to run.
        report: told of progress.

    Returns:
        The content of results.json.
    """
    from paretune.demo.picture import write_pictures
    from paretune.demo.results import summarize

    points = options.out / "points"
    points.mkdir(parents=True, exist_ok=True)
    table = rows(options.quick)
    jobs = [(seed, row) for seed in options.seeds for row in table]
    waiting = [(seed, row) for seed, row in jobs if _points(points, seed, row) is None]
    missing = [seed for seed in options.seeds if any(s == seed for s, _ in waiting)]
    workers = max(1, min(options.workers, len(waiting)))
    with _single_threads(), _pool(workers) as pool:
        _train_models(pool, missing, options, report)
        report("align and measure", len(jobs) - len(waiting), len(jobs))
        running = {
            pool.submit(_make, seed, table.index(row), options.quick, options.out, options.cache)
            for seed, row in waiting
        }
        finished = len(jobs) - len(waiting)
        for _ in _as_completed(running):
            finished += 1
            report("align and measure", finished, len(jobs))
    records = [[_points(points, seed, row) or [] for row in table] for seed in options.seeds]
    results = summarize(records, options.seeds)
    write_text(options.out / "results.json", json.dumps(results, indent=1) + "\n")
    write_pictures(results, options.out)
    return results


def _record(points: Path, seed: int, row: Row) -> Path:
    return points / f"seed{seed} {row.key}.json"


def _stamp(recipe: Recipe, row: Row) -> str:
    """Hash of all that decides a row's points: a record of another recipe or version is not taken for this one's."""
    from paretune import __version__

    parts = [recipe.reference_key, recipe.world.fingerprint, asdict(DPOSettings()), row.key, __version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _points(points: Path, seed: int, row: Row) -> Points | None:
    """The points of a finished row; None where it has to be made."""
    record = _record(points, seed, row)
    if not record.exists():
        return None
    content = json.loads(record.read_text())
    return content["points"] if content["stamp"] == _stamp(Recipe(World(seed=seed)), row) else None


def _train_models(pool: ProcessPoolExecutor, seeds: Sequence[int], options: Options, report: Report) -> None:
    """Bases and references that the cache lacks; the workers tell their progress through a queue."""
    if not seeds:
        return
    with multiprocessing.get_context("spawn").Manager() as manager:
        told = manager.Queue()
        running = {pool.submit(_prepare, seed, options.cache, told) for seed in seeds}
        for _ in _as_completed(running, every=0.2):
            while not told.empty():
                report(*told.get())


def _prepare(seed: int, cache: Path | None, told: Any) -> None:
    import torch

    torch.set_num_threads(1)

    def progress(phase: str) -> Callable[[int, int], None]:
        def tell(done: int, of: int) -> None:
            if done == of or done % 20 == 0:
                told.put((f"{phase} model, seed {seed}", done, of))

        return tell

    prepare(Recipe(World(seed=seed)), cache, progress)


@quiet_deprecations()
def _make(seed: int, index: int, quick: bool, out: Path, cache: Path | None) -> None:
    """Makes and measures the points of one row, and writes their record."""
    import torch

    from paretune.demo.measure import measure

    logging.getLogger("paretune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    row = rows(quick)[index]
    recipe = Recipe(World(seed=seed))
    base, reference = prepare(recipe, cache)
    bench = Bench(recipe, base, reference, out)
    made: Points = []
    begin = time.monotonic()
    for method, further, model in row.make(bench, row):
        hyperparameters = {k: v for k, v in row.hyperparameters.items() if k != "stops"} | further
        seconds = time.monotonic() - begin
        found = measure(model, recipe.world)  # type: ignore[arg-type]
        made.append(
            {
                "method": method,
                "family": row.family,
                "hyperparameters": hyperparameters,
                "seconds": round(seconds, 2),
                "rewards": found.rewards,
                "solved": found.solved,
                "categories": [item.category for item in recipe.world.items],
            }
        )
    write_text(_record(out / "points", seed, row), json.dumps({"stamp": _stamp(recipe, row), "points": made}))


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that die with an interrupted run instead of finishing their queue."""
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


@contextmanager
def _single_threads() -> Iterator[None]:
    """Workers of one thread each; threads that spin while they wait would halve the speed on two cores."""
    wanted = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    wanted |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _as_completed(running: set[Future[None]], every: float | None = None) -> Iterator[None]:
    """Yields once for each finished job, and with ``every`` also that often in seconds; raises the first failure."""
    while running:
        finished, running = wait(running, timeout=every, return_when=FIRST_COMPLETED)
        for job in finished:
            job.result()
            yield
        if not finished:
            yield
