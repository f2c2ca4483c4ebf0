"""Says in eleven lines, and a verdict, what this machine is, whether the course can run, and what to do if not.

    python -m qlora_edu.doctor            (with --fetch it fetches the models first, where they are not ready)

A line is marked ``ok``, ``note`` (it runs; here is how it runs better) or ``problem`` (it does not; do this).
Nothing is imported before it is examined, so that a broken installation is reported instead of raised.
No line names a folder of this machine: a notebook may show the report.
"""

import argparse
import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"
OLDEST_PYTHON = (3, 11)
PACKAGES = ("torch", "bitsandbytes", "peft", "transformers")
VECTOR_EXTENSIONS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "sve", "bf16")
GB = 1e9

# Bytes. Notebook 00 peaks at about 2.5 GB; 08 at about 7 GB, since it compares several models in one process.
MEMORY_NEEDED, MEMORY_WANTED = 2.5 * GB, 8 * GB
DISK_FOR_MODEL = 1 * GB  # the wheel, the file inside it and the converted model, for a moment all at once

Verdict = tuple[str, str, str]  # state, text, remedy
AFRESH = "`make clean setup` installs everything afresh"


@dataclass(frozen=True)
class Finding:
    """One line of the report. state is "ok", "note" or "problem"; whatever is a problem has a remedy."""

    name: str
    state: str
    text: str
    remedy: str = ""

    def __post_init__(self):
        if self.state not in (OK, NOTE, PROBLEM):
            raise ValueError(f"state must be {OK!r}, {NOTE!r} or {PROBLEM!r}, got {self.state!r}")
        if self.state == PROBLEM and not self.remedy:
            raise ValueError(f"{self.name}: a problem needs a remedy, got none")


class NotExaminable(Exception):
    """What the examination needs is broken itself, and has its own line in the report."""


def needed(module: str):
    """The module, or NotExaminable where it is missing or broken."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise NotExaminable(f"{module} does not import ({type(error).__name__})") from error


def python() -> Verdict:
    place = os.path.basename(sys.prefix) if sys.prefix != sys.base_prefix else "no virtual environment"
    text = f"{platform.python_version()} in {place}, {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return PROBLEM, text, "install Python 3.11 or newer, then `make lab PYTHON=python3.12`"
    return OK, text, ""


def packages() -> Verdict:
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it announces an optional kernel that is missing
    versions, broken = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.import_module(name).__version__}")
        except Exception as error:
            broken.append(f"{name} does not import ({type(error).__name__}: {error})")
    if broken:
        return PROBLEM, "; ".join(broken), AFRESH
    if old := too_old():
        return PROBLEM, ", ".join(old), "`make setup` installs the versions that fit"
    return OK, ", ".join(versions), ""


def too_old() -> list[str]:
    """Which packages have another version than pyproject.toml asks for, as "peft 0.20.0 (needs >=0.21)"."""
    requirement = needed("packaging.requirements").Requirement
    wanted = [requirement(line) for line in importlib.metadata.requires("qlora-edu") or []]
    ranges = {one.name: one.specifier for one in wanted if one.name in PACKAGES}
    found = {name: importlib.metadata.version(name) for name in ranges}
    return [
        f"{name} {found[name]} (needs {ranges[name]})" for name in ranges if found[name] not in ranges[name]
    ]


def processor() -> Verdict:
    features = needed("qlora_edu.models").cpu_features()
    useful = [name for name in VECTOR_EXTENSIONS if name in features]
    return OK, ", ".join(useful) or "no vector extension that torch reports", ""


def product_seconds(threads: int) -> float:
    """The median time of a small product, (1024, 576) times (576, 8), on so many threads."""
    torch = needed("torch")
    left, right = torch.ones(1024, 576), torch.ones(576, 8)
    before, times = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for _ in range(25):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return sorted(times)[len(times) // 2]


def threads() -> Verdict:
    cores, used = needed("qlora_edu.limits").cpus(), needed("torch").get_num_threads()
    one, together = product_seconds(1), product_seconds(used)
    settings = [f"{name} {os.environ.get(name, 'unset')}" for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")]
    text = f"{cores:g} cores, torch uses {used}; a small product takes {one * 1e3:.2f} ms on one thread, "
    text += f"{together * 1e3:.2f} ms on all; {', '.join(settings)}"
    if together > 2 * one:
        return NOTE, text, "the cores are busy: torch.set_num_threads(1), or start with OMP_NUM_THREADS=1"
    if used > cores:
        return NOTE, text, f"more threads than cores: start with OMP_NUM_THREADS={max(1, int(cores))}"
    return OK, text, ""


def gpu() -> Verdict:
    torch = needed("torch")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        capability = f"compute capability {card.major}.{card.minor}"
        return OK, f"{card.name}, {capability}, {free / GB:.1f} of {total / GB:.1f} GB free", ""
    if shutil.which("nvidia-smi"):
        text = (
            f"none that torch can use, though an NVIDIA driver is here (torch's CUDA: {torch.version.cuda})"
        )
        return NOTE, text, "install the torch that fits the driver, or go on: the notebooks run on the CPU"
    return OK, "none: everything runs on the CPU", ""


def dtype() -> Verdict:
    device = "cuda" if needed("torch").cuda.is_available() else "cpu"
    chosen, reason = needed("qlora_edu.models").pick_dtype(device)
    return OK, f"{str(chosen).removeprefix('torch.')} on {device}. {reason}", ""


def kernels() -> Verdict:
    torch, choice = needed("torch"), needed("qlora_edu.kernels.choice")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen, reason = choice.chosen(torch.device(device))
    except (ValueError, RuntimeError) as error:
        return PROBLEM, str(error), f"unset {choice.VARIABLE}, and the kernels that fit are chosen"
    return OK, f"{chosen} on {device}. {reason}", ""


def memory() -> Verdict:
    available = needed("qlora_edu.limits").memory_available()
    text = f"{available / GB:.1f} GB free for this process"
    if available < MEMORY_NEEDED:
        remedy = "close other programs and other notebooks' kernels, or give the container more"
        return PROBLEM, f"{text}, and the course needs {MEMORY_NEEDED / GB:g}", remedy
    if available < MEMORY_WANTED:
        return NOTE, text, "run one notebook at a time: shut down its kernel before you open the next"
    return OK, text, ""


def disk() -> Verdict:
    models = needed("qlora_edu.models")
    folder = models.cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / GB:.1f} GB free where the model is kept"
    if free >= DISK_FOR_MODEL:
        return OK, text, ""
    if models.status().state == "ready":
        return NOTE, text, "make room: the notebooks save checkpoints and adapters"
    return PROBLEM, text, f"make room: fetching the model needs {DISK_FOR_MODEL / GB:g} GB"


def model() -> Verdict:
    models = needed("qlora_edu.models")
    found = {name: models.status(name) for name in models.SOURCES}
    text, remedy = [], ""
    for name, one in found.items():
        ready = one.state == "ready"
        text.append(
            f"{name} {one.state}, {one.bytes / 1e6:.0f} MB" if ready else f"{name} {one.state}: {one.detail}"
        )
        remedy = remedy or one.remedy
    state = PROBLEM if found[models.SMOLLM2].state != "ready" else NOTE if remedy else OK
    return state, "; ".join(text), remedy


def bitsandbytes() -> Verdict:
    if needed("bitsandbytes.functional").has_avx512bf16():
        return OK, "one faulty fast path for this CPU is switched off (qlora_edu/reference.py says why)", ""
    return OK, "nothing to switch off on this CPU", ""


EXAMINATIONS = (python, packages, processor, threads, gpu, dtype, kernels, memory, disk, model, bitsandbytes)


def examine() -> list[Finding]:
    """All eleven findings. Raises nothing: what cannot be examined says so."""
    return [finding(examination) for examination in EXAMINATIONS]


def finding(examination) -> Finding:
    try:
        return Finding(examination.__name__, *examination())
    except NotExaminable as reason:
        return Finding(examination.__name__, NOTE, f"not examined: {reason}")
    except Exception as error:
        text = f"could not be examined ({type(error).__name__}: {error})"
        return Finding(examination.__name__, PROBLEM, text, AFRESH)


def report(findings: list[Finding] | None = None) -> bool:
    """Print the findings (where none are given, of a fresh examination). Returns whether the course runs."""
    findings = examine() if findings is None else findings
    for one in findings:
        print(f"{one.state:9}{one.name:14}{one.text}")
        if one.remedy:
            print(f"{'':23}-> {one.remedy}")
    runs = all(one.state != PROBLEM for one in findings)
    print("The course can run here." if runs else "The course cannot run here yet: do what the arrows say.")
    return runs


def fetch_models() -> None:
    """Fetch each model that is not ready. A failure is printed, and the report then says the state."""
    try:
        models = needed("qlora_edu.models")
    except NotExaminable as error:
        print(f"The models were not fetched. {error}", file=sys.stderr)
        return
    for name in models.SOURCES:
        try:
            if models.status(name).state != "ready":
                models.fetch(name)
        except Exception as error:
            print(f"The model {name} was not fetched. {error}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_edu.doctor", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--fetch", action="store_true", help="fetch the models first, where they are not ready"
    )
    if parser.parse_args(arguments).fetch:
        fetch_models()
    return 0 if report() else 1


if __name__ == "__main__":
    sys.exit(main())
