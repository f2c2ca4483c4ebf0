"""Every widget of every chapter, in a real JupyterLab and a real browser: each control moves, and the picture changes.

It takes a Chromium on this machine (on Debian and Ubuntu: apt install chromium). Without one the tests are left out,
unless CI is set: there its absence is a failure.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PICTURE = ".jp-RenderedImage img"
READY = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"

if not CHROMIUM and os.environ.get("CI"):
    raise RuntimeError("the tests of the widgets need Chromium, and CI must have it: apt install chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (apt install chromium)")


def widget_cells(path: Path) -> list[str]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [source for source in code if "widgets.explore(" in source]


def set_up_cell(path: Path) -> str:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return next("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


WITH_WIDGETS = [path for path in NOTEBOOKS if widget_cells(path)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab in a folder of its own, with no settings of this machine's user."""
    folder = tmp_path_factory.mktemp("lab")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    private = {name: str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | {f"JUPYTER_{name}_DIR": path for name, path in private.items()}
    environment |= {f"JUPYTERLAB_{name}_DIR": str(folder / name) for name in ("SETTINGS", "WORKSPACES")}
    environment.pop("QLORA_STATIC", None)
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
    ]
    options += [
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
    ]  # only this machine can reach it
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise RuntimeError("JupyterLab did not answer within two minutes")
        yield address, folder
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture(scope="module")
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


@pytest.mark.parametrize("path", WITH_WIDGETS, ids=lambda path: path.stem)
def test_moving_a_control_changes_the_picture(lab, page, path):
    address, folder = lab
    elsewhere = []
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((address, "data:", "blob:")) else elsewhere.append(request.url)
        ),
    )
    for number, source in enumerate(widget_cells(path)):
        file = folder / f"{path.stem}_{number}.ipynb"
        cells = [new_code_cell(set_up_cell(path)), new_code_cell(source)]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        file.write_text(json.dumps(new_notebook(cells=cells, metadata=metadata)))
        page.goto(f"{address}/lab/tree/{file.name}?reset")
        page.wait_for_function(READY)
        page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_selector(PICTURE)
        page.wait_for_function(READY)
        controls = move_every_control(page)
        assert controls == source.count("widgets.Slider(") + source.count("widgets.Choice(") + source.count(
            "widgets.Toggle("
        )
        assert not page.query_selector(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
    assert elsewhere == []


def move_every_control(page) -> int:
    """Move each control by one step and back: another picture each time, then the first again. Returns how many."""
    handles = page.query_selector_all(".jp-OutputArea .noUi-handle")
    for handle in handles:
        low, now = (float(handle.get_attribute(f"aria-value{name}")) for name in ("min", "now"))
        there, back = ("ArrowLeft", "ArrowRight") if now > low else ("ArrowRight", "ArrowLeft")
        handle.focus()
        there_and_back(
            page, lambda key=there: page.keyboard.press(key), lambda key=back: page.keyboard.press(key)
        )
    selects = page.query_selector_all(".jp-OutputArea .widget-dropdown select")
    for select in selects:
        chosen, options = select.evaluate("s => [s.selectedIndex, s.options.length]")
        other = (chosen + 1) % options
        there_and_back(
            page,
            lambda select=select, index=other: select.select_option(index=index),
            lambda select=select, index=chosen: select.select_option(index=index),
        )
    boxes = page.query_selector_all(".jp-OutputArea .widget-checkbox input")
    for box in boxes:
        there_and_back(page, box.click, box.click)
    return len(handles) + len(selects) + len(boxes)


def there_and_back(page, there, back) -> None:
    """Each control is moved from where all of them start: with others moved, it may rightly have no effect."""
    start = page.locator(PICTURE).last.get_attribute("src")
    there()
    wait_for(page, "all[all.length - 1].src !== start", start)
    back()
    wait_for(page, "all[all.length - 1].src === start", start)


def wait_for(page, condition: str, start: str) -> None:
    page.wait_for_function(
        f"start => {{ const all = document.querySelectorAll('{PICTURE}'); return all.length && {condition} }}",
        arg=start,
    )
    page.wait_for_function(READY)
