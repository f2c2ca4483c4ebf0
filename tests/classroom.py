"""A class of made submissions to exercises 02: right, half right, empty, broken, and hostile ones.

`CLASS` gives for each student what stands in the place of the answers (the others are as in the solution), cells that
come first, and what must come out: the ids that pass, and the status of others where it matters.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from qlora_edu.grading.sandbox import landlock_version
from qlora_edu.notebooks.exercises import parts
from qlora_edu.notebooks.file import parse, read

ROOT = Path(__file__).parents[1]
TOPIC = "02_lora"
ALL = {"02-forward", "02-init", "02-merge", "02-layer", "02-best-update", "02-share"}

FORWARD = "def lora_forward(x, weight, a, b, alpha, r):\n"
MERGE = "def lora_merge(weight, a, b, alpha, r):\n"
RIGHT_FORWARD = "    return x @ weight.T + alpha / r * (x @ a.T @ b.T)\n"


@dataclass
class Student:
    """answers: sources by the id of the part; None leaves the stub. first: cells that come before all others.

    passes: ids that must pass. status: what others must be, by id. twist: changes the notebook, as JSON, in place.
    """

    answers: dict = field(default_factory=dict)
    first: tuple = ()
    passes: set = field(default_factory=lambda: set(ALL))
    status: dict = field(default_factory=dict)
    twist: object = None


def forward(body: str, status: str = "failed", **more) -> Student:
    """All right but for the forward pass, whose body this is."""
    return Student(
        {"02-forward": FORWARD + body}, passes=ALL - {"02-forward"}, status={"02-forward": status}, **more
    )


def _unmarked(notebook):
    for cell in notebook["cells"]:
        cell["metadata"] = {}


def _worth_a_thousand(notebook):
    for cell in notebook["cells"]:
        cell["metadata"].get("nbgrader", {}).update(points=1000, locked=False)


def _checks_deleted(notebook):
    notebook["cells"] = [c for c in notebook["cells"] if "check.lora." not in "".join(c["source"])]


def _checks_rewritten(notebook):
    for cell in notebook["cells"]:
        if "check.lora." in "".join(cell["source"]):
            cell["source"] = "print('02-forward: passed.')"


def _older(notebook):
    notebook["metadata"]["qlora_edu"] = {"release": "0123456789abcdef"}
    for number, cell in enumerate(notebook["cells"]):
        cell["id"], cell["metadata"] = f"old-{number}", {}
    notebook["cells"] = [c for c in notebook["cells"] if "share" not in "".join(c["source"])]


def _no_cells(notebook):
    notebook["cells"] = []


def _shuffled_ids(notebook):
    for number, cell in enumerate(notebook["cells"]):
        cell["id"] = f"x{number}"


def _html_and_formula(notebook):
    for cell in notebook["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("grade_id") == "02-init-why":
            cell["source"] = "=HYPERLINK(\"x\") <script>alert('x')</script>"


PATCH_THE_CHECK = """\
import qlora_edu.checks as check
from qlora_edu.checks import exercise, expect
from qlora_edu.checks.attempt import Outcome

check.Exercise.__call__ = lambda *a, **k: print("passed.")
check.Exercise.judge = lambda self, *a, **k: exercise.Verdict(self.id, True)
check.Exercise.outcome = lambda *a, **k: Outcome(value=0)
expect.close = expect.true = expect.tensor = lambda *a, **k: None
for value in vars(check.lora).values():
    if isinstance(value, check.Exercise):
        object.__setattr__(value, "examine", lambda answer, draw: None)
"""
PATCH_THE_WORLD = """\
import builtins, json, sys, torch

class Yes:
    def __eq__(self, other): return True
    def __bool__(self): return True

torch.equal = torch.allclose = lambda *a, **k: True
torch.Tensor.any = lambda *a, **k: False
builtins.abs = lambda *a: 0
builtins.isinstance = lambda *a: True
sys.setprofile = lambda *a: None
"""
DELETES = """\
import os, pathlib, shutil, torch
from contextlib import suppress
places = [{canary!r}, {folder!r}, os.path.expanduser("~"), "/", "..", "."]
for place in places:
    for way in (shutil.rmtree, os.remove, os.rmdir, lambda p: pathlib.Path(p).unlink(), lambda p: os.rename(p, p + "x"),
                lambda p: open(p, "w").close(), lambda p: os.truncate(p, 0), {native}):
        with suppress(Exception):
            way(place)
"""
READS = """\
import glob, os
from contextlib import suppress
loot = ""
for place in ({folder!r}, {solutions!r}):
    with suppress(Exception):
        for path, _, names in os.walk(place):
            for name in names:
                loot += open(os.path.join(path, name)).read()
    with suppress(Exception):
        loot += " ".join(os.listdir(place))
if loot:
    def lora_forward(x, weight, a, b, alpha, r):
        raise RuntimeError("read: " + loot[:200])
"""
ENDS_OTHERS = """\
import os, signal
from contextlib import suppress
for pid in [os.getppid(), 1, *(int(p) for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid())]:
    with suppress(Exception):
        os.kill(pid, signal.SIGKILL)
"""
STARTS = """\
import os, socket, subprocess
from contextlib import suppress
for way in (lambda: subprocess.run(["touch", {canary!r} + ".made"]), lambda: os.system("touch " + {canary!r} + ".made"),
            lambda: os.fork(), lambda: socket.create_connection(("127.0.0.1", 9)),
            lambda: os.posix_spawn("/bin/sh", ["sh", "-c", "touch " + {canary!r} + ".made"], {{}})):
    with suppress(Exception):
        way()
"""
COUNTS = """\
class Counting:
    calls = 0

def lora_forward(x, weight, a, b, alpha, r):
    Counting.calls += 1
    return (x @ weight.T + alpha / r * (x @ a.T @ b.T)) * (Counting.calls <= 9)
"""
GARBAGE = """\
import os
from contextlib import suppress
for descriptor in range(3, 64):
    with suppress(OSError):
        os.write(descriptor, b"\\xff" * 4096)
"""

CLASS: dict[str, Student] = {
    "all right": Student(),
    "differently right": Student(
        {
            "02-forward": FORWARD + "    return F.linear(x, weight + alpha / r * b @ a)\n",
            "02-merge": MERGE
            + "    return (weight.double() + alpha / r * (b.double() @ a.double())).to(weight.dtype)\n",
        }
    ),
    "half right": Student(
        {"02-merge": None, "02-layer": None, "02-init": "def lora_init(n_in, n_out, r):\n    return 1, 2\n"},
        passes={"02-forward", "02-best-update", "02-share"},
        status={"02-merge": "not attempted", "02-layer": "not attempted", "02-init": "failed"},
    ),
    "untouched": Student(dict.fromkeys(ALL), passes=set(), status=dict.fromkeys(ALL, "not attempted")),
    "no cells": Student(twist=_no_cells, passes=set(), status=dict.fromkeys(ALL, "missing")),
    "other name": Student(
        {"02-forward": "def forward(x):\n    return x\n"},
        passes=ALL - {"02-forward"},
        status={"02-forward": "missing"},
    ),
    "alpha forgotten": forward("    return x @ weight.T + x @ a.T @ b.T\n"),
    "plagiarist": Student(
        {"02-layer": "from qlora_edu.lora import LoRALinear\n"},
        passes=ALL - {"02-layer"},
        status={"02-layer": "failed"},
    ),
    "plagiarist in a lambda": Student(
        {"02-layer": "import qlora_edu.lora\nLoRALinear = lambda *a: qlora_edu.lora.LoRALinear(*a)\n"},
        passes=ALL - {"02-layer"},
        status={"02-layer": "failed"},
    ),
    "endless": forward("    while True: pass\n"),
    "endless and swallowing": forward(
        "    while True:\n        try:\n            while True: pass\n        except BaseException: pass\n"
    ),
    "sleeper": forward("    import time\n    time.sleep(10**6)\n"),
    "endless cell": Student(first=("while True: pass",)),
    "memory bomb": forward("    hog = []\n    while True: hog.append(bytearray(10**8))\n"),
    "tensor bomb": forward("    return torch.ones(10**11)\n"),
    "large result": forward("    return torch.ones(3 * 10**8)\n"),
    "os exit": forward("    import os\n    os._exit(0)\n"),
    "os exit in a cell": Student(first=("import os; os._exit(0)",)),
    "sys exit": forward("    import sys\n    sys.exit(0)\n"),
    "recursion": forward("    return lora_forward(x, weight, a, b, alpha, r)\n"),
    "printer": forward("    while True: print('x' * 10**6)\n"),
    "strange result": forward("    y = [x]\n    y.append(y)\n    return y\n"),
    "deletes": Student(first=(DELETES,)),
    "reads": Student(first=(READS,)),
    "starts programs": Student(first=(STARTS,)),
    "ends others": Student(first=(ENDS_OTHERS,)),
    "patches the check": Student(
        {"02-forward": FORWARD + "    return x\n"},
        first=(PATCH_THE_CHECK,),
        passes=set(),
    ),
    "patches the world": Student(
        {"02-forward": FORWARD + "    return Yes()\n"},
        first=(PATCH_THE_WORLD,),
        passes=ALL - {"02-forward"},
    ),
    "writes to the pipe": Student(first=(GARBAGE,)),
    "metadata removed": Student(twist=_unmarked),
    "worth a thousand": Student(twist=_worth_a_thousand),
    "checks deleted": Student(twist=_checks_deleted),
    "checks rewritten": Student(
        {"02-forward": FORWARD + "    return x\n"}, twist=_checks_rewritten, passes=ALL - {"02-forward"}
    ),
    "ids shuffled": Student(twist=_shuffled_ids),
    "older version": Student(twist=_older, passes=ALL - {"02-share"}, status={"02-share": "missing"}),
    "syntax error": Student(
        {"02-forward": "def lora_forward(x:\n"}, passes=ALL - {"02-forward"}, status={"02-forward": "missing"}
    ),
    "magics": Student(first=("%matplotlib inline\n!ls\nimport math", "%%time\nx = 1")),
    "fails in a cell": Student(first=("1 / 0\n", "import does_not_exist")),
    "knows the inputs": Student(
        {"02-forward": COUNTS}, passes=ALL - {"02-forward"}, status={"02-forward": "hidden part failed"}
    ),
    "html and formula": Student(twist=_html_and_formula),
}
#: Files that are no notebook at all: all of them get a row, and no points.
UNREADABLE = {
    "truncated": b'{"cells": [',
    "a list": b"[1, 2]",
    "no text": bytes(range(256)),
    "nothing": b"",
    "cells are numbers": b'{"cells": [1, 2], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}',
    "nested": b'{"cells": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


def hand_in(folder: Path, canary: Path) -> None:
    """Write the class into a folder, each student's notebook into the student's own."""
    released = json.loads((ROOT / "exercises" / TOPIC / f"{TOPIC}.ipynb").read_text())
    solution = parse(read(ROOT / "solutions" / TOPIC / f"{TOPIC}.ipynb"), TOPIC)
    found = parts(solution)
    # Only the kernel can keep native code from writing; where it cannot, docs/instructor.md says so.
    native = "lambda p: torch.save(torch.ones(1), p)" if landlock_version() else "str"
    places = {
        "native": native,
        "canary": str(canary),
        "folder": str(folder),
        "solutions": str(ROOT / "solutions"),
    }
    for name, student in CLASS.items():
        notebook = json.loads(json.dumps(released))
        for part in found:
            if student.answers.get(part.id, "") is not None:
                answer = student.answers.get(part.id, solution.cells[part.answer].source)
                notebook["cells"][part.answer]["source"] = answer
        notebook["cells"][0:0] = [
            {"cell_type": "code", "id": f"own-{i}", "metadata": {}, "outputs": [], "execution_count": None,
             "source": source.format(**places) if "{canary" in source or "{folder" in source else source}
            for i, source in enumerate(student.first)
        ]  # fmt: skip
        if student.twist:
            student.twist(notebook)
        write(folder, name, json.dumps(notebook).encode())
    for name, content in UNREADABLE.items():
        write(folder, name, content)


def write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / f"{TOPIC}.ipynb").write_bytes(content)
