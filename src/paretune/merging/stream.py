"""Carrying out a plan: ranges of tensors through the kernels, by one or several workers, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError
from .arithmetic import Ready
from .kernels import Kernel
from .output import Output
from .plan import Part, Plan
from .selection import BLOCK

SPAN = 1 << 21  # elements that a worker takes at a time

Progress = Callable[[int, int], None]  # bytes read so far, bytes to read


@dataclass(frozen=True)
class _Span:
    number: int
    ready: tuple[Ready, ...]
    start: int
    stop: int


def default_workers() -> int:
    """As many as there are processors to run on, at most 4: more would wait for memory."""
    return max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def stream(
    plan: Plan,
    output: Output,
    *,
    workers: int | None = None,
    chunk: int | None = None,
    allow_non_finite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write every tensor that the output does not have yet.

    Args:
        plan: what to merge.
        output: opened.
        workers: threads; their number never changes the result.
        chunk: elements computed at a time, a multiple of 65536; neither does this. By default what suits the cache.
        allow_non_finite: pass NaN and infinity on.
        progress: called with the bytes read so far and the bytes to read, now and then, from any thread.

    Raises:
        CheckpointError: an input is not finite, or the disk is full.
    """
    workers = checked_workers(workers, chunk)
    with _one_torch_thread():
        _Run(plan, output, workers, chunk, allow_non_finite, progress).run()


def checked_workers(workers: int | None, chunk: int | None) -> int:
    """The number of threads to use.

    Raises:
        ArgumentError: there cannot be so many, or the chunk is not a whole number of blocks.
    """
    workers = default_workers() if workers is None else workers
    if type(workers) is not int or workers < 1:
        raise ArgumentError("workers", workers, "must be a positive number of threads")
    if chunk is not None and (type(chunk) is not int or chunk < BLOCK or chunk % BLOCK):
        raise ArgumentError("chunk", chunk, f"must be a multiple of {BLOCK} elements")
    return workers


class _Run:
    def __init__(
        self,
        plan: Plan,
        output: Output,
        workers: int,
        chunk: int | None,
        allow_non_finite: bool,
        progress: Progress | None,
    ) -> None:
        self.plan, self.output, self.workers, self.chunk = plan, output, workers, chunk
        self.allow_non_finite, self.progress = allow_non_finite, progress
        self.lock = threading.Condition()
        self.parts = deque(number for number in range(len(plan.parts)) if number not in output.done)
        self.spans: deque[_Span] = deque()
        self.left: dict[int, int] = {}
        self.preparing = 0
        self.failure: BaseException | None = None
        self.total = plan.bytes_read
        self.read = sum(_size(plan.parts[number]) for number in output.done)

    def run(self) -> None:
        if self.workers == 1:
            try:
                self._work()
            finally:
                self.output.commit()
        else:
            self._run_threads()
        if self.failure is not None:
            raise self.failure

    def _run_threads(self) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # wakes up for Ctrl-C
        except BaseException as interrupt:
            with self.lock:
                self.failure = self.failure or interrupt
                self.lock.notify_all()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        self.output.commit()

    def _work(self) -> None:
        try:
            plan = self.plan
            kernel = Kernel(plan.rule, plan.recipe.seed, allow_non_finite=self.allow_non_finite, chunk=self.chunk)
            while (task := self._next()) is not None:
                if isinstance(task, int):
                    self._prepare(task, kernel)
                else:
                    self._span(task, kernel)
        except BaseException as error:
            with self.lock:
                self.failure = self.failure or error
                self.lock.notify_all()

    def _next(self) -> int | _Span | None:
        with self.lock:
            while self.failure is None:
                if self.spans:
                    return self.spans.popleft()
                if self.parts:
                    self.preparing += 1
                    return self.parts.popleft()
                if not self.preparing:
                    return None
                self.lock.wait()
            return None

    def _prepare(self, number: int, kernel: Kernel) -> None:
        part = self.plan.parts[number]
        ready = () if part.copied else kernel.prepare(part)
        n = part.numel
        spans = [_Span(number, ready, start, min(n, start + SPAN)) for start in range(0, n, SPAN)]
        spans = spans or [_Span(number, ready, 0, 0)]
        with self.lock:
            self.left[number] = len(spans)
            self.spans.extend(spans)
            self.preparing -= 1
            self.lock.notify_all()

    def _span(self, span: _Span, kernel: Kernel) -> None:
        part, output = self.plan.parts[span.number], self.output

        def emit(result: int, start: int, values: np.ndarray) -> None:
            if self.failure is None:
                output.write(result, part, start, values)

        if part.copied:
            for result in range(len(self.plan.recipes)):
                emit(result, span.start, part.sources[0].values[span.start : span.stop])  # type: ignore[attr-defined]
        else:
            kernel.apply(part, span.ready, span.start, span.stop, emit)
        for view in part.views:
            view.release(span.start, span.stop)
        share = (span.stop - span.start) * _size(part) // max(1, part.numel)
        with self.lock:
            self.left[span.number] -= 1
            last = self.left[span.number] == 0
            self.read += share
            read = self.read
        if last and self.failure is None:
            self.output.finished(span.number, part.bytes)
        if self.progress is not None:
            self.progress(read, self.total)


def _size(part: Part) -> int:
    from .inputs import itemsize

    return sum(part.numel * itemsize(view) for view in part.views)


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Where torch does the conversions, the workers are the parallelism."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
