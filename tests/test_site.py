# SPDX-License-Identifier: MIT
"""What goes into the course's static pages; `make site` builds them, which needs Sphinx."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("course_site", ROOT / ".ci" / "course_site.py")
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_each_widget_becomes_its_picture(file):
    notebook = json.loads(file.read_text(encoding="utf-8"))
    widgets = file.read_text(encoding="utf-8").count(f'"{site.VIEW}"')
    before = json.dumps(notebook).count('"image/png"')
    after = site.without_widgets(notebook)
    pictures = [output["data"]["image/png"] for cell in after["cells"]
                for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert site.VIEW not in json.dumps(after) and len(pictures) == before + widgets
    assert all(base64.b64decode("".join(p))[1:4] == b"PNG" for p in pictures)


def test_a_widget_without_a_picture_is_refused():
    notebook = {"metadata": {}, "cells": [
        {"id": "here", "outputs": [{"data": {site.VIEW: {"model_id": "x"}}}]}]}
    with pytest.raises(ValueError, match="cell here: a widget without a stored picture"):
        site.without_widgets(notebook)


def test_links_lead_to_pages_of_the_site():
    pages, linked = {Path("README.md"), Path("notebooks/00_tour.ipynb")}, set()
    text = ("[a](../README.md) [b](00_tour.ipynb#1) [`c`](../dsv2_ref/model.py) "
            "[d](../dsv2_ref/training) [e](https://x.org/y) [f](#here) "
            "[g](../data/results/device_limit-2026-11-24.json)")
    assert site.relinked(text, ROOT / "notebooks" / "README.md", pages, linked) == (
        "[a](../index.md) [b](00_tour.ipynb#1) [`c`](../dsv2_ref/model.py.md) "
        "[d](../dsv2_ref/training.md) [e](https://x.org/y) [f](#here) "
        "[g](../data/results/device_limit-2026-11-24.json)")
    assert {str(p) for p in linked} == {"dsv2_ref/model.py", "dsv2_ref/training",
                                        "data/results/device_limit-2026-11-24.json"}


@pytest.mark.parametrize("target", ["nothing.py", "../../elsewhere.md"])
def test_a_link_to_nothing_is_refused(target):
    with pytest.raises(ValueError, match=r"notebooks/README.md: link to .*, expected a file here"):
        site.relinked(f"see [it]({target})", ROOT / "notebooks" / "README.md", set(), set())


def test_a_source_file_is_shown_whole():
    text = (ROOT / "dsv2_ref" / "copying.py").read_text(encoding="utf-8").rstrip()
    assert text in site.source_page(Path("dsv2_ref/copying.py"))
    essay = (ROOT / "dsv2_ref" / "training" / "__init__.py").read_text(encoding="utf-8").rstrip()
    assert essay in site.source_page(Path("dsv2_ref/training"))


def test_dead_links_are_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">1</a><a href="b.html#not">2</a><a href="c.html">3</a>'
        '<img src="p.png"><a href="https://x.org">4</a><a href="#mine">5</a>', encoding="utf-8")
    (tmp_path / "b.html").write_text('<p id="there">', encoding="utf-8")
    assert site.dead_links(tmp_path) == [
        "a.html: #mine", "a.html: b.html#not", "a.html: c.html", "a.html: p.png"]


def test_what_is_no_site_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["course_site.py", "--out", str(tmp_path)])
    assert site.main() == 1 and "is no site of this project" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"
