"""The inside of the sandbox: a script for a process of its own, with the standard library only; see :mod:`.sandbox`.

Locks itself in (limits, no capabilities, Landlock for files, seccomp for the rest) before a line of the program runs;
if a lock does not close, nothing runs.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys

# System calls that a program under test never needs: (x86_64, aarch64); None where the architecture has none.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # the network: without a socket nothing leaves, and io_uring would go round this filter
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setpriority": (141, 140),
    # what Landlock does not cover: modes, owners, times, attributes
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "truncate": (76, 45),
    # what outlives the process, or escapes its memory limit
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # the locks themselves, and the kernel
    "setrlimit": (160, 164), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "personality": (135, 92), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
}  # fmt: skip
# clone, clone3, prlimit64 and the audit architecture: (x86_64, aarch64)
_SPECIAL = {"x86_64": (56, 435, 302, 0xC000003E), "aarch64": (220, 435, 261, 0xC00000B7)}
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
_CLONE_THREAD = 0x10000


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def _filter() -> bytes:
    """The seccomp program: everything is allowed but what `_DENIED` names, new processes and raised limits."""
    machine = platform.machine()
    clone, clone3, prlimit, audit = _SPECIAL[machine]

    def op(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, at_least, has_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [op(load, 0, 0, 4), op(equal, 1, 0, audit), op(give, 0, 0, _KILL), op(load, 0, 0, 0)]
    program += [op(at_least, 0, 1, 0x40000000), op(give, 0, 0, _EPERM)]  # the x32 calls have other numbers
    for numbers in _DENIED.values():
        number = numbers[machine != "x86_64"]
        if number is not None:
            program += [op(equal, 0, 1, number), op(give, 0, 0, _EPERM)]
    program += [op(equal, 0, 1, clone3), op(give, 0, 0, _ENOSYS)]  # its flags lie in memory; libc falls back to clone
    program += [op(equal, 0, 4, clone), op(load, 0, 0, 16), op(has_bit, 1, 0, _CLONE_THREAD), op(give, 0, 0, _EPERM)]
    program += [op(give, 0, 0, _ALLOW)]
    # prlimit64(pid, resource, new, old): reading limits is harmless, so only a new value is refused.
    program += [op(equal, 0, 5, prlimit), op(load, 0, 0, 32), op(equal, 0, 2, 0), op(load, 0, 0, 36)]
    program += [op(equal, 1, 0, 0), op(give, 0, 0, _EPERM), op(give, 0, 0, _ALLOW)]
    return b"".join(program)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root inside a container must not be able to raise its limits again.

    What root needs to read its own Python in another user's folder is kept; Landlock still says which folders.
    """
    capget, capset = (125, 126) if platform.machine() == "x86_64" else (90, 91)
    header, held = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8), ctypes.create_string_buffer(24)
    _check(libc.syscall(capget, header, held), "capget")
    reading = 0b110 & struct.unpack("6I", held.raw)[1]  # of the permitted ones: DAC_OVERRIDE, DAC_READ_SEARCH
    _check(libc.syscall(capset, header, struct.pack("6I", reading, reading, 0, 0, 0, 0)), "capset")


def _landlock(libc: ctypes.CDLL, readable: list[str], writable: list[str]) -> None:
    """Read and run below ``readable``, everything below ``writable``, nothing elsewhere."""
    create, add, restrict = 444, 445, 446
    version = _check(libc.syscall(create, None, ctypes.c_size_t(0), 1), "landlock")
    rights = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    ruleset = _check(libc.syscall(create, struct.pack("Q", rights), ctypes.c_size_t(8), 0), "landlock_create_ruleset")
    read = 0b1101  # execute, read_file, read_dir
    for paths, granted in ((readable, read), (writable, rights)):
        for path in paths:
            try:
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            # A file knows only execute, write, read and truncate.
            rule = struct.pack("=Qi", granted if os.path.isdir(path) else granted & (0b111 | 1 << 14), handle)
            _check(libc.syscall(add, ruleset, 1, rule, 0), "landlock_add_rule")
            os.close(handle)
    _check(libc.syscall(restrict, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def lock_in(seconds: int, memory: int, file_size: int, folder: str, may_write: bool) -> None:
    """Close every lock, from the weakest to the one after which no other could be closed.

    Args:
        seconds: CPU time.
        memory: bytes of address space.
        file_size: the largest file that may be written, in bytes.
        folder: the working directory.
        may_write: whether files may be written there.
    """
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    _drop_capabilities(libc)
    system = ["/usr", "/lib", "/lib64", "/bin", "/etc/localtime", "/etc/ld.so.cache", "/dev/urandom", "/dev/zero"]
    own = [sys.prefix, sys.base_prefix, *(path for path in sys.path if os.path.isdir(path))]
    _landlock(libc, [*system, *own, folder], ["/dev/null", *([folder] if may_write else [])])
    program = _filter()
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    _check(libc.prctl(22, 2, header, 0, 0), "seccomp")


def main() -> None:
    """Read the order, lock in, run the program, and say how it ended, marked with the order's token."""
    with open(sys.argv[1], encoding="utf-8") as file:
        order = json.load(file)
    os.unlink(sys.argv[1])
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    token = order.pop("token")

    def say(status: str, detail: str = "") -> None:
        os.write(answer, f"{token} {status} {detail[:300]}\n".encode(errors="replace"))

    source = order.pop("source")
    sys.argv = ["program"]
    try:
        lock_in(**order)
    except (OSError, KeyError, ValueError) as error:
        say("unlocked", f"{type(error).__name__}: {error}")
        return
    try:
        exec(compile(source, "program", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except MemoryError:
        say("memory")
    except BaseException as error:  # also SystemExit: a program that leaves before its tests did not pass them
        say("failed", f"{type(error).__name__}: {error}")
    else:
        say("passed")


if __name__ == "__main__":
    main()
    os._exit(0)  # threads that the program left behind are not waited for
