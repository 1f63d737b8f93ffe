"""Any OpenAI-compatible server: bounded concurrency, retries with growing pauses, everything counted."""

from __future__ import annotations

import email.utils
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from ..errors import ArgumentError, EndpointError, MissingExtraError

_LONGEST_PAUSE = 120.0  # seconds, also where a server asks for more
_TRY_AGAIN = {408, 409, 425, 429}  # besides 5xx
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server and one of its models.

    Args:
        url: up to and with the version: ``http://localhost:8000/v1``.
        model: its name there.
        api_key_env: the environment variable that holds the key; no key is sent where it is unset.
        concurrency: requests at a time, ≥ 1.
        timeout: seconds for one request, > 0.
        retries: further attempts after a timeout, a lost connection, 408, 409, 425, 429, 5xx or a malformed answer.
        pause: seconds before the first retry; doubles with each, at most 120. A server's Retry-After counts for more.

    Raises:
        ArgumentError: a value is out of its range.

    Example:
        >>> Endpoint("http://localhost:8000/v1/", "my-model").record()
        {'url': 'http://localhost:8000/v1', 'model': 'my-model'}
    """

    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 5
    pause: float = 0.5

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ArgumentError("url", self.url, "give the server's address as http://host:port/v1")
        if not self.model:
            raise ArgumentError("model", self.model, "name the model that the server shall use")
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ArgumentError(name, getattr(self, name), f"give a whole number of at least {least}")
        for name in ("timeout", "pause"):
            if not getattr(self, name) > 0:
                raise ArgumentError(name, getattr(self, name), "give a positive number of seconds")

    def record(self) -> dict[str, Any]:
        """What identifies it in files; the key never does."""
        return {"url": self.url.rstrip("/"), "model": self.model}


class Client:
    """Sends requests to an endpoint.

    Args:
        endpoint: where to.

    ``counts`` tells how many requests were sent, and how many met a timeout (``timeouts``), a lost connection
    (``disconnected``), a limit (``limited``, 429), another server error (``server_errors``) or a malformed answer
    (``malformed``).

    Raises:
        MissingExtraError: httpx is not installed.
        ArgumentError: the endpoint's address is none.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import httpx
        except ImportError:
            raise MissingExtraError("httpx", "judge") from None

        try:
            httpx.URL(endpoint.url)
        except httpx.InvalidURL as error:
            raise ArgumentError("url", endpoint.url, f"is no address ({error}): give http://host:port/v1") from None
        key = os.environ.get(endpoint.api_key_env)
        self.endpoint = endpoint
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._httpx = httpx
        self._http = httpx.Client(
            timeout=endpoint.timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=endpoint.concurrency),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def count(self, what: str) -> None:
        """Count an event; safe from any thread."""
        with self._lock:
            self.counts[what] += 1

    def ask(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], _Result]) -> _Result:
        """One request, repeated until it is answered properly.

        Args:
            path: below the endpoint's address: ``chat/completions``.
            body: the request without the model's name.
            read: takes what is wanted out of the answer; a KeyError, IndexError, TypeError or ValueError from it says
                that the answer is malformed.

        Raises:
            EndpointError: the server refuses the request, or all attempts failed.
        """
        address = f"{self.endpoint.url.rstrip('/')}/{path}"
        httpx, trouble, asked = self._httpx, "", 0.0
        for attempt in range(self.endpoint.retries + 1):
            if attempt:
                self._stopped.wait(max(asked, self._pause(attempt)))
            if self._stopped.is_set():
                raise EndpointError(f"{address}: not asked, because another request has failed: see its error")
            asked = 0.0
            self.count("requests")
            try:
                answer = self._http.post(address, json={"model": self.endpoint.model, **body})
            except httpx.TimeoutException:
                self.count("timeouts")
                trouble = f"no answer within {self.endpoint.timeout:g} s"
                continue
            except httpx.RequestError as error:
                self.count("disconnected")
                trouble = f"cannot be reached: {error or type(error).__name__}"
                continue
            if answer.status_code in _TRY_AGAIN or answer.status_code >= 500:
                self.count("limited" if answer.status_code == 429 else "server_errors")
                asked = retry_after(answer.headers.get("retry-after"))
                trouble = f"answers {answer.status_code}: {_short(answer.text)}"
                continue
            if answer.status_code != 200:
                raise EndpointError(
                    f"{address} refuses the request with {answer.status_code}: {_short(answer.text)}: "
                    f"check the address, the model {self.endpoint.model!r} and ${self.endpoint.api_key_env}",
                    answer.status_code,
                )
            try:
                return read(answer.json())
            except (KeyError, IndexError, TypeError, ValueError) as error:
                self.count("malformed")
                trouble = f"malformed answer ({type(error).__name__} {error}): {_short(answer.text)}"
        raise EndpointError(
            f"{address}: {trouble}, {self.endpoint.retries + 1} times: check the server, or give more retries or time"
        )

    def each(self, tasks: Iterable[_Task], work: Callable[[_Task], _Result]) -> Iterator[tuple[_Task, _Result]]:
        """(task, result) as they are done, ``concurrency`` at a time: the last thing that is done with a client.

        Nothing is asked before there is room for its result: a caller that is killed loses ``concurrency`` at most.
        After the first error nothing new is asked; what is on its way is still yielded, then the error is raised.
        """
        pool = ThreadPoolExecutor(self.endpoint.concurrency)
        error: BaseException | None = None
        waiting = iter(tasks)
        futures = {pool.submit(work, task): task for task in itertools.islice(waiting, self.endpoint.concurrency)}
        try:
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    task, failure = futures.pop(future), future.exception()
                    if failure is None:
                        yield task, future.result()
                    elif error is None:
                        error = failure
                        self._stopped.set()
                    if error is None:
                        futures |= {pool.submit(work, task): task for task in itertools.islice(waiting, 1)}
            if error is not None:
                raise error
        finally:
            self._stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _pause(self, attempt: int) -> float:
        # Half of it is left to chance, so that clients that were turned away together do not come back together.
        return min(self.endpoint.pause * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1)


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, at most 120; 0 where there is none that can be read.

    Example:
        >>> retry_after("3"), retry_after("soon"), retry_after(None)
        (3.0, 0.0, 0.0)
    """
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE)


def _short(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
