"""Runs programs that a model wrote, in a process that can do little harm, or not at all.

What the kernel enforces (Linux with seccomp and Landlock, 5.13 or newer; x86_64 and aarch64; otherwise refused):

- no network: no sockets can be made;
- files: Python's own and the system's libraries can be read, everything else, home directories too, cannot; nothing
  can be written unless ``may_write``, and then only in an empty folder that is deleted afterwards;
- no other processes: none can be started, signalled or traced;
- CPU time, wall-clock time and address space are bounded; no capabilities but root's to read, an empty environment.

What it is not: a virtual machine. A hole in the kernel is a hole in it; and a program that sets out to cheat its own
tests, in the interpreter that runs them, can.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import PareTuneError

_ANSWER = 4096  # bytes that are read of what the sandbox says


class SandboxError(PareTuneError):
    """This machine cannot lock a program in, so none is run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: wall-clock time, and about that much CPU time; > 0.
        memory_mb: address space in MiB; Python itself takes about 30, numpy 200.
        may_write: whether it may write files, up to 16 MiB each, in its own folder.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    may_write: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        status: ``passed`` (ran to its end without an exception), ``failed``, ``timeout``, ``memory`` or ``died``
            (left without a word: killed by a limit, or by itself).
        detail: the exception, cut at 300 characters.
    """

    status: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run one Python program in the sandbox.

    Args:
        source: the program with its tests; an exception, ``sys.exit`` included, means that it failed.
        limits: what it may use; `Limits` by default.

    Raises:
        SandboxError: this machine cannot lock it in; nothing was run.

    Example:
        >>> run_program("assert 1 + 1 == 2").status
        'passed'
        >>> run_program("import socket; socket.socket()").detail
        'PermissionError: [Errno 1] Operation not permitted'
    """
    limits = limits or Limits()
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SandboxError(
            f"programs are run on Linux (x86_64, aarch64) only, this is {platform.system()} {platform.machine()}: "
            "leave the tasks that run code out, or measure in a Linux machine"
        )
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="paretune-sandbox-") as folder:
        order = {
            "token": token,
            "source": source,
            "seconds": int(limits.seconds) + 2,
            "memory": limits.memory_mb << 20,
            "file_size": 16 << 20 if limits.may_write else 0,
            "folder": folder,
            "may_write": limits.may_write,
        }
        path = Path(folder) / "order.json"
        path.write_text(json.dumps(order), encoding="utf-8")
        command = [sys.executable, "-I", "-X", "utf8", str(Path(__file__).with_name("sandboxed.py")), str(path)]
        # One thread: numerical libraries reserve address space for each of theirs.
        environment = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8"}
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            answer, in_time = _listen(process, limits.seconds)
        finally:
            _end(process)
    for line in answer.decode(errors="replace").splitlines():
        said, _, rest = line.partition(" ")
        if said == token:
            status, _, detail = rest.partition(" ")
            if status == "unlocked":
                raise SandboxError(
                    f"this machine cannot lock a program in ({detail}): leave the tasks that run code out, or measure "
                    "on Linux 5.13 or newer with Landlock and seccomp"
                )
            return Outcome(status, detail)
    return Outcome("died" if in_time else "timeout")


def _listen(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, bool]:
    """What the sandbox says until it ends, says too much or runs out of time; and whether it kept to its time."""
    assert process.stdout is not None  # PIPE above
    answer, deadline = b"", time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                break
            part = os.read(process.stdout.fileno(), _ANSWER)
            answer += part
            if not part or len(answer) > _ANSWER:
                return answer[:_ANSWER], True
    return answer, False


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
