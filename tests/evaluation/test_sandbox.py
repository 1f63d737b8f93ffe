"""Hostile programs: none reaches the network, files, other processes, or more time and memory than it was given."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest

from paretune.evaluation import sandbox
from paretune.evaluation.sandbox import Limits, SandboxError, run_program

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="the sandbox is of Linux")
SECRET = "a secret that stays one"
DENIED = "Operation not permitted"
FORBIDDEN = "Permission denied"
_SYSCALL = "import ctypes; c = ctypes.CDLL(None, use_errno=True); r = c.syscall({}); assert r >= 0, ctypes.get_errno()"

# None does harm where a lock is broken: that is when these tests fail.
HOSTILE = {
    "socket": ("import socket; socket.socket()", DENIED),
    "http": ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", DENIED),
    "raw socket call": (_SYSCALL.format("41, 2, 1, 0"), "AssertionError: 1"),
    "io_uring": (_SYSCALL.format("425, 8, 0"), "AssertionError: 1"),
    "x32 socket call": (_SYSCALL.format("0x40000000 + 41, 2, 1, 0"), "AssertionError: 1"),
    "fork": ("import os; os.fork()", DENIED),
    "shell": ("import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])", DENIED),
    "exec": ("import os; os.execv('/bin/true', ['true'])", DENIED),
    "process pool": ("import multiprocessing as m; p = m.Process(target=print); p.start()", DENIED),
    "signal the parent": ("import os; os.kill(os.getppid(), 0)", DENIED),
    "password file": ("open('/etc/passwd').read()", FORBIDDEN),
    "environment of others": ("open(f'/proc/{__import__(\"os\").getppid()}/environ').read()", FORBIDDEN),
    "list the root": ("import os; os.listdir('/')", FORBIDDEN),
    "write here": ("open('x', 'w')", FORBIDDEN),
    "write there": ("open('/tmp/paretune-was-here', 'w')", FORBIDDEN),
    "chmod": ("import os; os.chmod('.', 0o700)", DENIED),
    "raise limits": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))", "not allowed to raise"),
    "leave early": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "forge the answer": ("print('passed'); raise ValueError('no')", "ValueError: no"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_is_refused(name: str) -> None:
    if "call" in name and platform.machine() != "x86_64":
        pytest.skip("numbers of x86_64")
    source, said = HOSTILE[name]
    outcome = run_program(source)
    assert not outcome.passed
    assert said in outcome.detail


def test_other_files_are_hidden(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text(SECRET)
    assert FORBIDDEN in run_program(f"open({str(tmp_path / 'secret.txt')!r}).read()").detail
    assert FORBIDDEN in run_program(f"import os; os.unlink({str(tmp_path / 'secret.txt')!r})").detail
    assert (tmp_path / "secret.txt").read_text() == SECRET


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "def f(): f()\nwhile 1:\n try: f()\n except RecursionError: pass",
    ],
)
def test_time_is_bounded(source: str) -> None:
    started = time.monotonic()
    assert run_program(source, Limits(seconds=0.5)).status == "timeout"
    assert time.monotonic() - started < 5


def test_memory_is_bounded() -> None:
    assert run_program("x = bytearray(1 << 31)", Limits(memory_mb=256)).status == "memory"
    assert not run_program("x = []\nwhile True: x.append(bytearray(1 << 20))", Limits(memory_mb=256)).passed


def test_a_flood_of_output_is_cut() -> None:
    flood = (
        "import os\nwhile True:\n  for f in range(1, 9):\n    try: os.write(f, b'x' * 100000)\n    except OSError: pass"
    )
    assert not run_program(flood, Limits(seconds=2)).passed


def test_silent_death_is_no_pass() -> None:
    assert run_program("import os; os._exit(0)").status == "died"
    assert run_program("import ctypes; ctypes.string_at(0)").status == "died"


def test_files_where_allowed() -> None:
    writes = "open('a.txt', 'w').write('x'); assert open('a.txt').read() == 'x'"
    assert run_program(writes, Limits(may_write=True)).passed
    assert FORBIDDEN in run_program("open('/tmp/b', 'w')", Limits(may_write=True)).detail
    big = "f = open('a', 'w')\nfor _ in range(40): f.write('x' * 1000000)"
    assert "File too large" in run_program(big, Limits(may_write=True)).detail


def test_nothing_is_left_behind() -> None:
    before = {path for path in Path("/tmp").iterdir() if path.name.startswith("paretune-sandbox-")}
    run_program("open('a', 'w')", Limits(may_write=True))
    assert {path for path in Path("/tmp").iterdir() if path.name.startswith("paretune-sandbox-")} <= before


def test_harmless_programs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for source in (
        "import json, re, math, collections, itertools, heapq, datetime, random; assert math.comb(5, 2) == 10",
        "import numpy; assert numpy.eye(3).sum() == 3",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "import os; assert 'OPENAI_API_KEY' not in os.environ",
        "assert __name__ == '__main__'",
        "import tempfile, time, decimal, fractions, typing, functools, string; time.sleep(0.01)",
    ):
        assert run_program(source).status == "passed", run_program(source).detail
    assert os.environ["OPENAI_API_KEY"] == SECRET


def test_a_lock_that_does_not_close_stops_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Landlock or seccomp fails nothing runs, and the caller hears it."""
    text = Path(sandbox.__file__).with_name("sandboxed.py").read_text()
    broken = text.replace("create, add, restrict = 444, 445, 446", "create, add, restrict = 999, 999, 999")
    assert broken != text
    (tmp_path / "sandboxed.py").write_text(broken)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(SandboxError, match=r"cannot lock a program in \(OSError: .*landlock\): leave the tasks"):
        run_program("open('/tmp/paretune-was-here', 'w')")
    assert not Path("/tmp/paretune-was-here").exists()


def test_an_unknown_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(SandboxError, match=r"programs are run on Linux .* leave the tasks that run code out"):
        run_program("pass")
