"""The two commands, run with a stand-in for Python, so that nothing is installed; and the pins."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

# Answers as Python, venv and pip would, keeps a log of its calls, and fails where the folder holds a file
# named after the call: "fail-venv", "fail-pip", "fail-doctor".
STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "$STAND_IN/log"
case "$*" in
    *print*) echo "(3, 12)" ;;
    *version_info*) [ ! -e "$STAND_IN/fail-old" ] ;;
    --version) echo "Python 3.12.0" ;;
    "-m venv"*)
        folder="${!#}"; rm -rf "$folder"; mkdir -p "$folder/bin"
        if [ -e "$STAND_IN/fail-venv" ]; then exit 1; fi
        cp "$0" "$folder/bin/python" ;;
    "-m pip install"*)
        if [ -e "$STAND_IN/fail-pip" ]; then echo "ERROR: No matching distribution found"; exit 1; fi
        echo "Collecting torch"
        echo "  Downloading torch-2.13.0.whl (200.1 MB)"
        echo "Installing collected packages: torch" ;;
    "-m qlora_edu.doctor"*) if [ -e "$STAND_IN/fail-doctor" ]; then exit 1; fi ;;
    "-m pytest"*)
        if [ -e "$STAND_IN/fail-pytest" ]; then echo "== 1 failed in 2s =="; exit 1; fi
        echo "== 3 passed in 2s ==" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of what the commands read, in a folder whose name has a space; every Python is the stand-in."""
    folder = tmp_path / "the course"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python3.10"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    return Project(folder, tools)


class Project:
    def __init__(self, folder, tools):
        self.folder, self.tools, self.environment = folder, tools, folder / ".venv"

    def fail(self, what, fails=True):
        flag = self.tools / f"fail-{what}"
        flag.touch() if fails else flag.unlink()

    def run(self, *command, cwd=None):
        """The finished command, and what the stand-in was asked to do meanwhile."""
        log = self.tools / "log"
        log.write_text("")
        variables = {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "STAND_IN": str(self.tools),
            "HOME": str(self.tools),
        }
        done = subprocess.run(command, cwd=cwd or self.folder, capture_output=True, text=True, env=variables)
        return done, [line for line in log.read_text().splitlines() if line.startswith("-m")]

    def make(self, *arguments):
        return self.run("make", *arguments)


def starts(calls, *expected):
    return len(calls) == len(expected) and all(
        call.startswith(start) for call, start in zip(calls, expected, strict=True)
    )


def test_make_lab_sets_up_once_and_then_only_opens(project):
    done, calls = project.make("lab")
    assert done.returncode == 0, done.stderr
    assert starts(
        calls,
        "-m venv --clear .venv",
        "-m pip install --disable-pip-version-check --no-input --progress-bar off -c constraints.txt -e .",
        "-m qlora_edu.doctor --fetch",
        "-m jupyterlab --no-browser",
    ), calls
    assert "torch-2.13.0.whl (200.1 MB)" in done.stdout

    done, calls = project.make("lab", "LAB_FLAGS=--port 9999")
    assert starts(calls, "-m qlora_edu.doctor --fetch", "-m jupyterlab"), calls
    assert calls[-1].endswith("--port 9999")


def test_make_test_installs_the_test_packages_once_and_make_lab_needs_no_more(project):
    done, calls = project.make("test")
    assert done.returncode == 0, done.stderr
    assert calls[1].endswith("-e .[test]")
    assert calls[-1] == (
        "-m pytest tests notebooks solutions --nbval --nbval-current-env --nbval-cell-timeout=600 "
        "--nbval-sanitize-with=tests/nbval_sanitize.cfg"
    )
    for command in ("test", "lab"):
        _, calls = project.make(command)
        assert not any("pip install" in call for call in calls)


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(project, file):
    project.make("setup")
    later = (project.environment / ".installed").stat().st_mtime + 5
    os.utime(project.folder / file, (later, later))
    _, calls = project.make("setup")
    assert starts(calls, "-m pip install", "-m qlora_edu.doctor --fetch"), calls


def test_a_failed_installation_says_so_stops_and_is_tried_again(project):
    project.fail("pip")
    done, calls = project.make("lab")
    assert done.returncode != 0
    assert "ERROR: No matching distribution found" in done.stdout
    assert ".venv/install.log" in done.stdout
    assert "No matching distribution" in (project.environment / "install.log").read_text()
    assert starts(calls, "-m venv", "-m pip install")
    assert not (project.environment / ".installed").exists()

    project.fail("pip", False)
    done, calls = project.make("setup")
    assert done.returncode == 0
    assert starts(calls, "-m pip install", "-m qlora_edu.doctor --fetch"), calls


def test_an_environment_that_was_interrupted_half_way_is_made_again(project):
    project.fail("venv")
    done, _ = project.make("setup")
    assert done.returncode != 0
    assert project.environment.exists()

    project.fail("venv", False)
    done, calls = project.make("setup")
    assert done.returncode == 0, done.stderr
    assert starts(calls, "-m venv --clear .venv", "-m pip install", "-m qlora_edu.doctor --fetch"), calls


def test_an_environment_whose_python_is_gone_is_made_again(project):
    project.make("setup")
    (project.environment / "bin" / "python").unlink()
    _, calls = project.make("setup")
    assert starts(calls, "-m venv --clear", "-m pip install", "-m qlora_edu.doctor --fetch"), calls


def test_the_environment_of_a_folder_that_was_moved_is_made_again(project):
    project.make("setup")
    project.folder = project.folder.rename(project.folder.with_name("moved"))
    _, calls = project.make("setup")
    assert starts(calls, "-m venv --clear", "-m pip install", "-m qlora_edu.doctor --fetch"), calls


def test_an_environment_made_by_hand_is_kept(project):
    project.run("python3", "-m", "venv", "--clear", ".venv")
    _, calls = project.make("setup")
    assert starts(calls, "-m pip --version", "-m pip install", "-m qlora_edu.doctor --fetch"), calls


def test_another_python_by_name_gets_an_environment_of_its_own(project):
    project.make("setup")
    other = project.tools / "other-python"
    other.write_text(STAND_IN.replace("(3, 12)", "(3, 11)"))
    other.chmod(0o755)
    _, calls = project.make("setup", f"PYTHON={other}")
    assert starts(calls, "-m venv --clear", "-m pip install", "-m qlora_edu.doctor --fetch"), calls
    _, calls = project.make("setup", f"PYTHON={other}")
    assert starts(calls, "-m qlora_edu.doctor --fetch"), calls
    _, calls = project.make("setup")
    assert starts(calls, "-m qlora_edu.doctor --fetch"), calls


@pytest.mark.parametrize("arguments", [(), ("PYTHON=no-such-python",)])
def test_no_suitable_python_is_said_and_nothing_is_made(project, arguments):
    project.fail("old")
    done, calls = project.make("lab", *arguments)
    assert done.returncode != 0
    assert "needs Python 3.11 to 3.14" in done.stdout
    assert (arguments[0].removeprefix("PYTHON=") if arguments else "python3.12") in done.stdout
    assert calls == []
    assert not project.environment.exists()


def test_an_older_python3_is_passed_over_for_a_newer_one(project):
    (project.tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    done, calls = project.make("setup")
    assert done.returncode == 0, done.stderr
    assert starts(calls, "-m venv --clear", "-m pip install", "-m qlora_edu.doctor --fetch"), calls


def test_a_problem_stops_make_lab_but_not_make_jupyter_or_the_tests(project):
    project.fail("doctor")
    done, calls = project.make("lab")
    assert done.returncode != 0
    assert calls[-1] == "-m qlora_edu.doctor --fetch"
    assert project.make("jupyter")[0].returncode == 0
    assert project.make("test")[0].returncode == 0


def test_the_ci_script_ends_with_pytests_line_and_its_status(project):
    script = project.folder / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    for fails, last in ((False, "== 3 passed in 2s =="), (True, "== 1 failed in 2s ==")):
        if fails:
            project.fail("pytest")
        done, _ = project.run(str(script), cwd=project.tools)
        assert (done.returncode != 0) == fails
        assert done.stdout.splitlines()[-1] == last
    project.fail("pip")
    (project.environment / ".installed-test").unlink()
    done, _ = project.run(str(script), cwd=project.tools)
    assert done.returncode != 0
    assert "install.log" in done.stdout.splitlines()[-1]


def test_help_is_the_default_and_names_every_target(project):
    done, _ = project.make()
    named = set(re.findall(r"^make (\w+)", done.stdout, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (help .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert named == set(phony) - {"help"}


def test_every_dependency_is_pinned_within_its_range_and_no_pin_names_a_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(line) for line in sum(extras, project["dependencies"])]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {}
    for pin in map(Requirement, lines):
        assert pin.url is None
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        pins.setdefault(canonicalize_name(pin.name), []).append(specifier.version)
    for one in wanted:
        if one.name == "triton":
            continue  # a torch for CUDA asks for one version of it: a pin would be in its way
        assert pins.get(canonicalize_name(one.name)), f"{one.name} is not pinned in constraints.txt"
        assert all(version in one.specifier for version in pins[canonicalize_name(one.name)]), one
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-")) or name == "triton"]


def test_the_project_is_formatted_and_linted():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
