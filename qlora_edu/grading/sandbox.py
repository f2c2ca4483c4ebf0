"""What a submission's process may do: compute. Not write, read secrets, start programs, use the network, send signals.

Two fences, one behind the other:

1. Python's audit hooks refuse at every call of Python's own functions. No Python code can take a hook away again,
and they work on every    system. Native code (ctypes is refused, but a library may have a hole) is not bound by them.
2. Where Linux has Landlock (5.13 or newer), the kernel refuses as well: files outside a few folders, TCP
connections (from 6.7), signals    to other processes (from 6.12).

Limits on memory, processor time, and file sizes are the system's (`resource`; not on Windows).
"""

import ctypes
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fence:
    """Where a submission's process is kept.

    Attributes:
        scratch: the one folder that it may write to.
        hidden: folders that it may not read.
        memory: bytes that it may take beyond what it has at the start.
        seconds: of processor time, in all.
        file_bytes: the largest file that it may write.
    """

    scratch: str
    hidden: tuple[str, ...] = ()
    memory: int = 2 * 2**30
    seconds: int = 900
    file_bytes: int = 16 * 2**20


def confine(fence: Fence) -> None:
    """Put this process behind the fence, for good."""
    os.chdir(fence.scratch)
    os.environ.update(HOME=fence.scratch, TMPDIR=fence.scratch)
    _limit(fence)
    _landlock(fence)
    _audit(fence)


def _limit(fence: Fence) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = (
        int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    )
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": fence.file_bytes,
        "RLIMIT_CPU": fence.seconds,
        "RLIMIT_AS": pages * os.sysconf("SC_PAGE_SIZE") + fence.memory if pages else None,
    }
    for name, limit in limits.items():
        if limit is not None and hasattr(resource, name):
            hard = resource.getrlimit(getattr(resource, name))[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(getattr(resource, name), (limit, limit))


# What Python calls the events: https://docs.python.org/3/library/audit_events.html
_REFUSED = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "pty.",
    "os.kill", "os.killpg", "signal.pthread_kill", "socket.", "ctypes.", "resource.setrlimit", "resource.prlimit",
    "ftplib.", "http.", "imaplib.", "poplib.", "smtplib.", "urllib.", "webbrowser.", "winreg.", "syslog.",
)  # fmt: skip
_WRITES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime",
    "os.setxattr", "os.removexattr", "os.chflags", "shutil.", "tempfile.", "sqlite3.connect", "os.chdir",
)  # fmt: skip
_READS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "glob.glob", "pathlib.Path.glob")


def _audit(fence: Fence) -> None:
    inside = os.path.realpath(fence.scratch) + os.sep
    hidden = tuple(os.path.realpath(folder) + os.sep for folder in fence.hidden)
    realpath, fspath = os.path.realpath, os.fspath
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def place(path) -> str:
        path = fspath(path)
        return realpath(path.decode() if isinstance(path, bytes) else path) + os.sep

    def paths(arguments):
        return [a for a in arguments if isinstance(a, str | bytes | os.PathLike)]

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flag = arguments
            if isinstance(path, int):
                return
            where = place(path)
            writes = (mode and set(mode) & set("wax+")) or (isinstance(flag, int) and flag & flags)
            if writes and not where.startswith((inside, "/dev/null")):
                raise PermissionError(f"a submission may not write to {fspath(path)!r}")
            if where.startswith(hidden) if hidden else False:
                raise PermissionError(f"a submission may not read {fspath(path)!r}")
        elif event.startswith(_REFUSED):
            raise PermissionError(f"a submission may not call {event}")
        elif event.startswith(_WRITES):
            if not all(place(path).startswith(inside) for path in paths(arguments)):
                raise PermissionError(f"a submission may not call {event} outside its own folder")
        elif event in _READS and hidden and any(place(path).startswith(hidden) for path in paths(arguments)):
            raise PermissionError(f"a submission may not look into {paths(arguments)[0]!r}")

    sys.addaudithook(hook)


class _Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the system calls' numbers on every architecture but alpha
_EXECUTE, _WRITE, _READ, _READ_DIRECTORY = 1 << 0, 1 << 1, 1 << 2, 1 << 3


def landlock_version() -> int:
    """What the kernel's Landlock can do, as a number; 0 without it."""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None).syscall(_CREATE, None, 0, 1))


def _landlock(fence: Fence) -> None:
    version = landlock_version()
    if version == 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    every = (
        1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    ) - 1  # all that this version can refuse about files
    rules = _Ruleset(every, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(_CREATE, ctypes.byref(rules), size, 0)
    if ruleset < 0:
        return
    readable = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(__file__).parents[1])}
    readable |= {"/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/dev"}
    for folder, allowed in [(f, _EXECUTE | _READ | _READ_DIRECTORY) for f in readable] + [
        (fence.scratch, every)
    ]:
        _allow(libc, ruleset, folder, allowed)
    _allow(libc, ruleset, "/dev/null", _WRITE | _READ)
    no_new_privileges = 38
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.syscall(_RESTRICT, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock is there, but could not be switched on")
    os.close(ruleset)


def _allow(libc, ruleset: int, path: str, allowed: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    libc.syscall(_ADD, ruleset, 1, ctypes.byref(_Beneath(allowed, place)), 0)
    os.close(place)
