"""The committed notebooks are fit to be read, and the tool that makes and checks them does what it says."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from qlora_edu import notebooks
from qlora_edu.notebooks import NotebookError
from qlora_edu.notebooks.__main__ import main
from qlora_edu.notebooks.file import WIDGET_STATE
from qlora_edu.notebooks.hygiene import LARGEST_BYTES

ROOT = Path(__file__).parents[1]
COURSE = sorted((ROOT / "notebooks").glob("*.ipynb"))

FIGURE = """\
import matplotlib.pyplot as plt

from qlora_edu import plots

plots.use_style()
figure, axes = plt.subplots()
axes.plot([1, 2, 3])
plots.show(figure, "A line that rises from 1 to 3.")"""


def test_the_course_has_notebooks_named_by_number_and_topic():
    appendices = {"claims", "record"}
    chapters = [path.stem for path in COURSE if path.stem not in appendices]
    assert len(chapters) == len(COURSE) - 2
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", chapter) for chapter in chapters)


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_a_committed_notebook_is_fresh_clean_and_readable(path):
    assert notebooks.check(path) == []


def write(path, *sources, title="# A title"):
    cells = [new_markdown_cell(title), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A good notebook, fresh from the executor."""
    path = write(
        tmp_path_factory.mktemp("good") / "good.ipynb", "x = [1,\n 2]\nx", FIGURE, "print('done')\nx;"
    )
    notebooks.execute(path)
    return path


@pytest.fixture
def good(executed, tmp_path):
    path = tmp_path / "good.ipynb"
    path.write_bytes(executed.read_bytes())
    return path


def change(path, edit):
    """Edit a notebook behind the tool's back, and write it in the tool's own way."""
    notebook = nbformat.read(path, as_version=4)
    edit(notebook)
    path.write_text(notebooks.dump(notebook), encoding="utf-8")


# --- execute ---------------------------------------------------------------------------------------------


def test_execute_formats_runs_in_order_and_hides_what_a_semicolon_hides(executed):
    cells = nbformat.read(executed, as_version=4).cells
    assert cells[1].source == "x = [1, 2]\nx"
    assert [cell.execution_count for cell in cells[1:]] == [1, 2, 3]
    assert cells[1].outputs[0].data["text/plain"] == "[1, 2]"
    assert [output.output_type for output in cells[3].outputs] == ["stream"]


def test_an_executed_notebook_passes_its_check(executed):
    assert notebooks.check(executed) == []


def test_executing_twice_gives_the_same_bytes(good):
    before = good.read_bytes()
    notebooks.execute(good)
    assert good.read_bytes() == before


def test_a_notebook_rebuilt_with_new_cell_ids_gives_the_same_bytes(good):
    before = good.read_bytes()
    change(good, lambda notebook: [cell.update(id=f"other-{i}") for i, cell in enumerate(notebook.cells)])
    assert good.read_bytes() != before
    notebooks.execute(good)
    assert good.read_bytes() == before


def test_equal_cells_get_different_ids():
    text = nbformat.writes(new_notebook(cells=[new_code_cell("1"), new_code_cell("1"), new_code_cell("2")]))
    ids = [cell.id for cell in notebooks.parse(text, "a.ipynb").cells]
    assert len(set(ids)) == 3


def test_cells_of_a_notebook_without_ids_get_them():
    old = {"cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# A ", "title"]}], "metadata": {}}
    old |= {"nbformat": 4, "nbformat_minor": 4}
    first, second = (notebooks.parse(json.dumps(old), "a.ipynb") for _ in range(2))
    assert first == second
    assert first.cells[0].source == "# A title"


def test_a_notebook_runs_in_its_own_folder_as_a_batch_run_of_this_python(tmp_path, monkeypatch):
    """Also where the reader has registered another Python under the name python3."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["no-such-python", "{connection_file}"], "display_name": "other", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.delenv("QLORA_STATIC", raising=False)
    source = "import os\nimport sys\n\n(os.getcwd(), sys.prefix, os.environ['QLORA_STATIC'])"
    notebook = new_notebook(cells=[new_code_cell(source)])
    notebooks.run(notebook, tmp_path)
    shown = notebook.cells[0].outputs[0].data["text/plain"]
    assert eval(shown) == (str(tmp_path), sys.prefix, "1")


FAILING = {
    "a cell raises": ("print('so far')\n1 / 0", "ZeroDivisionError", "1 / 0"),
    "a cell takes too long": ("import time\n\ntime.sleep(60)", "imed out", "time.sleep(60)"),
    "a cell kills the kernel": ("import os\n\nos._exit(1)", "took the kernel down", "os._exit(1)"),
    "a cell is no Python": ("x = (1", "ruff format", "parse"),
    "a name is never defined": ("undefined_name", "ruff check", "undefined_name"),
}


@pytest.mark.parametrize(("source", "reason", "detail"), FAILING.values(), ids=FAILING)
def test_a_failing_notebook_says_why_and_stays_as_it_was(tmp_path, source, reason, detail):
    path = write(tmp_path / "bad.ipynb", source)
    before = path.read_bytes()
    with pytest.raises(NotebookError) as error:
        notebooks.execute(path, timeout=5)
    assert reason in str(error.value)
    assert detail in str(error.value)
    assert "cell 2" in str(error.value) or "ruff" in reason
    assert "\x1b" not in str(error.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.ipynb"
    path.write_text("old")

    def full_disk(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        notebooks.save(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


NO_NOTEBOOKS = {
    "missing": ("missing.ipynb", None, "cannot be read"),
    "not named so": ("a.py", "1", "must end in .ipynb"),
    "not JSON": ("a.ipynb", "# just text", "not a notebook"),
    "a list": ("a.ipynb", "[]", "not a notebook"),
    "an old format": ("a.ipynb", '{"worksheets": [], "nbformat": 3, "nbformat_minor": 0}', "not a notebook"),
    "a cell of no known kind": (
        "a.ipynb",
        '{"cells": [{"cell_type": "poem", "source": "", "metadata": {}}],'
        ' "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
        "not a notebook",
    ),
    "bytes": ("a.ipynb", b"\xff\xfe\x00", "cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "reason"), NO_NOTEBOOKS.values(), ids=NO_NOTEBOOKS)
def test_what_is_no_notebook_is_refused(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(NotebookError, match=reason):
        notebooks.check(path)


# --- normalise -------------------------------------------------------------------------------------------


def with_widgets(*ids):
    """A notebook that shows two widgets, one of which refers to the other."""
    slider, layout = ids
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": slider}, "text/plain": "IntSlider()"}
    state = {slider: {"state": {"layout": f"IPY_MODEL_{layout}"}}, layout: {"state": {}}}
    cell = new_code_cell("slider", execution_count=1, outputs=[new_output("display_data", data=view)], id="a")
    widgets = {WIDGET_STATE: {"state": state, "version_major": 2, "version_minor": 0}}
    return nbformat.from_dict(new_notebook(cells=[cell], metadata={"widgets": widgets}))


def test_random_widget_ids_do_not_reach_the_file():
    one = notebooks.normalise(with_widgets("c0ffee" * 5 + "00", "decade" * 5 + "00"))
    other = notebooks.normalise(with_widgets("facade" * 5 + "11", "beaded" * 5 + "11"))
    assert notebooks.dump(one) == notebooks.dump(other)
    assert notebooks.dump(notebooks.normalise(one)) == notebooks.dump(one)
    state = one.metadata.widgets[WIDGET_STATE].state
    shown = one.cells[0].outputs[0].data["application/vnd.jupyter.widget-view+json"]["model_id"]
    assert state[state[shown].state.layout.removeprefix("IPY_MODEL_")].state == {}


def test_timings_versions_and_an_editors_traces_are_removed_and_the_rest_is_kept():
    timing = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    metadata = {"execution": timing, "scrolled": True, "tags": ["nbval-ignore-output"]}
    cell = new_code_cell("1", metadata=metadata, id="a")
    notebook = new_notebook(
        cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11.7"}, "title": "Kept"}
    )
    before = copy.deepcopy(notebook)
    normal = notebooks.normalise(notebook)
    assert normal.cells[0].metadata == {"tags": ["nbval-ignore-output"]}
    assert "version" not in normal.metadata.language_info
    assert normal.metadata.title == "Kept"
    assert notebook == before


def test_after_an_edit_of_the_text_tidying_is_enough(good):
    """As JupyterLab saves it: with its version of Python and what it knows about the cells."""

    def save_in_jupyterlab(notebook):
        notebook.cells[0].source = "# Another title"
        notebook.cells[1].metadata.update(trusted=True)
        notebook.metadata.language_info.version = "3.12.1"

    change(good, save_in_jupyterlab)
    assert notebooks.check(good) != []
    assert main(["tidy", str(good)]) == 0
    assert notebooks.check(good) == []
    assert nbformat.read(good, as_version=4).cells[0].source == "# Another title"


def test_tidying_does_not_hide_that_the_code_was_changed(good):
    change(good, set_source(1, "x = 2"))
    assert main(["tidy", str(good)]) == 1


# --- check -----------------------------------------------------------------------------------------------


def set_source(number, source):
    return lambda notebook: notebook.cells[number].update(source=source)


def add_output(number, kind, **content):
    return lambda notebook: notebook.cells[number].outputs.append(new_output(kind, **content))


def forget_alt(notebook):
    for output in notebook.cells[2].outputs:
        output.metadata = {}


def stamp(notebook):
    notebook.metadata.qlora_edu.code_sha256 = notebooks.code_hash(notebook)


def insert_unrun(notebook):
    notebook.cells.insert(2, new_code_cell("2", id="new"))
    stamp(notebook)


BROKEN = {
    "edited after it was executed": (set_source(1, "x = [1, 3]\nx"), "changed after it was last executed"),
    "never executed": (
        lambda notebook: notebook.cells[1].update(execution_count=None),
        "not executed in order",
    ),
    "a cell added and not executed": (insert_unrun, "cell 3 was not executed in order"),
    "executed out of order": (lambda notebook: notebook.cells[2].update(execution_count=7), "count 7, not 2"),
    "no hash": (lambda notebook: notebook.metadata.pop("qlora_edu"), "changed after it was last executed"),
    "no title": (lambda notebook: notebook.cells.pop(0), "not a title"),
    "no cells": (lambda notebook: notebook.update(cells=[]), "not a title"),
    "a title that is code": (set_source(0, "no title"), "not a title"),
    "an error": (
        add_output(1, "error", ename="ValueError", evalue="no", traceback=["ValueError: no"]),
        "cell 2 ended in ValueError",
    ),
    "a warning": (
        add_output(1, "stream", name="stderr", text="UserWarning: beware\n"),
        "cell 2 wrote to stderr",
    ),
    "an empty warning": (add_output(1, "stream", name="stderr", text="\n"), "cell 2 wrote to stderr"),
    "a home folder": (add_output(1, "stream", text="saved in /home/ada/x.bin"), "'/home/'"),
    "root's folder": (add_output(1, "stream", text="saved in /root/x.bin"), "a path of one machine"),
    "a temporary folder": (add_output(1, "stream", text="('/tmp/abc', 1)"), "a path of one machine"),
    "a Mac's folder": (add_output(1, "stream", text="/Users/ada/x.bin"), "a path of one machine"),
    "a Windows folder": (add_output(1, "stream", text="C:\\Users\\ada"), "a path of one machine"),
    "a path in the text": (set_source(0, "# Title\n\nlook in /tmp/results"), "cell 1 shows a path"),
    "an address": (add_output(1, "stream", text="<object at 0x7f3a12bc>"), "an object's address"),
    "a figure without a description": (forget_alt, "cell 3 shows a figure without a text description"),
    "a picture without a description": (set_source(0, "# Title\n\n![](a.png)"), "cell 1 shows a picture"),
    "an HTML picture without one": (set_source(0, "# Title\n\n<img src='a.png'>"), "cell 1 shows a picture"),
    "an install": (set_source(1, "!pip install torch"), "cell 2 installs"),
    "an install by magic": (set_source(1, "%pip install torch"), "cell 2 installs"),
    "a shell line": (set_source(1, "x = 1\n!ls"), "cell 2 installs"),
    "an extension": (set_source(1, "%load_ext autoreload"), "cell 2 installs"),
    "an empty cell": (set_source(1, " "), "cell 2 is empty"),
    "a huge output": (
        add_output(1, "stream", text="x" * LARGEST_BYTES),
        "bytes, more than 1,000,000",
    ),
    "an editor's traces": (
        lambda notebook: notebook.cells[1].metadata.update(scrolled=True),
        "not as the project writes it",
    ),
}


@pytest.mark.parametrize(("edit", "problem"), BROKEN.values(), ids=BROKEN)
def test_check_finds(good, edit, problem):
    change(good, edit)
    before = good.read_bytes()
    assert any(problem in found for found in notebooks.check(good))
    assert good.read_bytes() == before


HARMLESS = {
    "a remainder": set_source(1, "x = (\n    7\n    % 4\n)"),
    "a magic of IPython's own": set_source(1, "%xmode minimal"),
    "an inequality": set_source(1, "1 != 2"),
    "a path below the project": add_output(1, "stream", text="runs/tmp/x.bin and ~/tmp/x"),
    "a fraction": add_output(1, "stream", text="work/time, bytes/tmp"),
    "described pictures": set_source(0, "# Title\n\n![a](a.png) <img src='a' alt='b'>"),
    "talk of pip in the text": set_source(0, "# Title\n\n`make lab` runs `pip install` for you"),
}


@pytest.mark.parametrize("edit", HARMLESS.values(), ids=HARMLESS)
def test_check_lets_pass(good, edit):
    """Only freshness, which these edits break, may be complained of."""
    change(good, lambda notebook: (edit(notebook), stamp(notebook)))
    assert notebooks.check(good) in (
        [],
        ["the file is not as the project writes it (an editor's traces): run `make tidy NB=...`"],
    )


# --- on the command line ---------------------------------------------------------------------------------


def test_the_commands_exit_status_and_messages(good, tmp_path, capsys):
    assert main(["check", str(good)]) == 0
    assert capsys.readouterr() == ("", "")

    change(good, set_source(1, "x = 2"))
    assert main(["check", str(good)]) == 1
    assert f"{good}: the code was changed" in capsys.readouterr().err

    assert main(["execute", str(good)]) == 0
    assert "executing" in capsys.readouterr().out

    noisy = write(tmp_path / "noisy.ipynb", "import sys\n\nprint('oh', file=sys.stderr)")
    assert main(["execute", str(noisy), str(good)]) == 1
    assert "cell 2 wrote to stderr: 'oh'" in capsys.readouterr().err
    assert nbformat.read(noisy, as_version=4).cells[1].execution_count == 1

    assert main(["execute", str(tmp_path / "none.ipynb"), str(good)]) == 1
    assert "none.ipynb cannot be read" in capsys.readouterr().err


def test_nbval_compares_what_is_determined_and_forgives_only_times(tmp_path):
    """The semicolon, the sanitizing, the environment: nbval with the options that `make test` gives it."""
    path = write(
        tmp_path / "a.ipynb",
        "hidden = 5\nhidden;",
        "import time\n\nprint(f'took {time.perf_counter() % 1:.3f} s')",
        "print(f'measured: {time.perf_counter()} GB')",
        "import os\n\nprint('static', os.environ.get('QLORA_STATIC'))",
        "print('the loss is 0.125')",
    )
    notebooks.execute(path)
    change(path, lambda notebook: notebook.cells[5].outputs[0].update(text="the loss is 0.124\n"))
    options = [
        "--nbval",
        "--nbval-current-env",
        "--nbval-cell-timeout=60",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
    ]
    sanitize = f"--nbval-sanitize-with={ROOT / 'tests' / 'nbval_sanitize.cfg'}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, sanitize, "--rootdir", str(tmp_path), "-v", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in notebooks.BATCH_ENVIRONMENT},
    )
    outcomes = re.findall(r"::Cell \d ([A-Z]+)", done.stdout)
    assert outcomes == ["PASSED", "PASSED", "PASSED", "PASSED", "FAILED"], done.stdout


def test_an_interrupted_execution_says_so_and_leaves_the_file_and_no_kernel(tmp_path):
    source = "import os\nimport time\n\nwith open('pid', 'w') as f:\n    f.write(f'{os.getpid()}\\n')\ntime.sleep(600)"
    path = write(tmp_path / "slow.ipynb", source)
    before = path.read_bytes()
    command = [sys.executable, "-m", "qlora_edu.notebooks", "execute", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        pid_file = tmp_path / "pid"
        while process.poll() is None and not (pid_file.exists() and pid_file.read_text().endswith("\n")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "interrupted; the file is as it was" in printed
    assert path.read_bytes() == before
    assert not psutil.pid_exists(int(pid_file.read_text()))
