# SPDX-License-Identifier: MIT
"""Every notebook in JupyterLab, in a real browser: it runs to its end, and its widgets respond.

Run by `make browser`, not by `make test`: it needs Chromium (or Chrome) on the machine and
playwright, which drives it. Each notebook is opened in a copy of the folder, its outputs are
cleared, all cells are run, and every widget's knob is moved until its picture changes.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SETTINGS = {        # all cells stay in the page, so that every widget can be found
    "notebook-extension/tracker.jupyterlab-settings": '{"windowingMode": "none"}',
    "apputils-extension/notification.jupyterlab-settings":
        '{"checkForUpdates": false, "fetchNews": "false"}',
}

STATE = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.model.cells;
  const told = [];
  for (let i = 0; i < cells.length; i++) {
    const cell = cells.get(i);
    if (cell.type !== 'code' || !cell.sharedModel.source.trim()) continue;
    const outputs = cell.outputs.toJSON();
    told.push({index: i, source: cell.sharedModel.source, count: cell.executionCount,
               error: outputs.filter(o => o.output_type === 'error').map(
                   o => o.ename + ': ' + o.evalue)});
  }
  return told;
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab that knows nothing of the user's settings."""
    home = tmp_path_factory.mktemp("lab")
    for folder in ("notebooks", "data"):
        shutil.copytree(ROOT / folder, home / folder,
                        ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    for name, text in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = {name: str(home / name.lower()) for name in (
        "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_WORKSPACES_DIR")}
    folders["JUPYTERLAB_SETTINGS_DIR"] = str(home / "settings")
    log = open(home / "lab.log", "w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--allow-root",
         "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={home}",
         "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"],
        env=os.environ | folders | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        stdout=log, stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, server, home / "lab.log")
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{address}/api/status", timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer from JupyterLab: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    assert found, f"no browser, expected one of {', '.join(BROWSERS)} (Debian: chromium)"
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=found[0], args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield instance
        instance.close()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_to_its_end(lab, browser, name, tmp_path):
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{lab}/lab/workspaces/{name[:2]}/tree/notebooks/{name}")
    page.wait_for_function("""() => {
        const app = window.jupyterapp, widget = app && app.shell.currentWidget;
        return widget && widget.content && widget.content.model && widget.sessionContext &&
               widget.sessionContext.session && widget.sessionContext.session.kernel;
    }""", timeout=120_000)
    run = ("async () => { const run = c => window.jupyterapp.commands.execute(c);"
           "await run('editmenu:clear-all'); await run('notebook:run-all-cells'); }")
    page.set_default_timeout(300_000)
    page.evaluate(run)
    page.wait_for_function(f"() => ({STATE})().every(c => c.count !== null && c.count > 0)"
                           f" || ({STATE})().some(c => c.error.length)")
    cells = page.evaluate(STATE)
    failed = [f"cell {c['index']}: {c['error'][0]}\n{c['source'][:300]}"
              for c in cells if c["error"]]
    assert not failed, "\n".join(failed)
    assert [c["count"] for c in cells] == list(range(1, len(cells) + 1))
    widgets = _widgets(page)
    expected = "widget-view+json" in (ROOT / "notebooks" / name).read_text(encoding="utf-8")
    assert bool(widgets) == expected, "widgets are in the stored notebook, or on the page, alone"
    for output in widgets:
        _move_until_the_picture_changes(page, output)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()
    assert not errors, errors


def _widgets(page: Page) -> list[Locator]:
    """Outputs that hold widgets: a knob and a picture."""
    outputs = page.locator(".jp-OutputArea-output:has(.jupyter-widgets)")
    return [outputs.nth(i) for i in range(outputs.count())
            if outputs.nth(i).locator("img").count()]


KNOBS = ".noUi-handle, select, button, input[type=checkbox], input[type=radio]"


def _move_until_the_picture_changes(page: Page, output: Locator) -> None:
    output.scroll_into_view_if_needed()
    picture = output.locator("img").first
    before = picture.get_attribute("src")
    if not output.locator(KNOBS).count():            # a picture that the cell itself replaced
        assert before
        return
    for knob in output.locator(".noUi-handle").all():
        for key in ("ArrowLeft", "ArrowRight", "ArrowRight"):
            knob.press(key)
            if _changed(page, picture, before):
                return
    for choice in output.locator("select").all():
        for i in range(choice.locator("option").count()):
            choice.select_option(index=i)
            if _changed(page, picture, before):
                return
    for button in output.locator("button").all():
        button.click()
        if _changed(page, picture, before):
            return
    for box in output.locator("input[type=checkbox], input[type=radio]").all():
        box.click()
        if _changed(page, picture, before):
            return
    raise AssertionError("a widget was moved, and its picture stayed as it was")


def _changed(page: Page, picture: Locator, before: str | None) -> bool:
    for _ in range(60):
        if picture.get_attribute("src") != before:
            return True
        page.wait_for_timeout(100)
    return False
