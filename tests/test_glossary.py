# SPDX-License-Identifier: MIT
"""The page of symbols: as the script makes it, and every row leads to where its symbol is."""

import re

import glossary
import pytest
from glossary import PAGE, SYMBOLS, Symbol
from readme_map import ROOT

TEXT = PAGE.read_text(encoding="utf-8")
ROW = re.compile(r"^\| \$(?P<latex>.+?)\$ \| `(?P<name>.+?)` \| (?P<what>.+?) \| (?P<size>.*?) \| "
                 r"(?P<v2>.+?) \| (?P<lite>.+?) \| \[(?P<number>\d\d)\]\((?P<notebook>\S+)\) \| "
                 r"\[(?P<file>\S+)\]\(\.\./dsv2_ref/(?P=file)\) \|$", re.M)
ROWS = list(ROW.finditer(TEXT))
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["latex"])


def test_it_is_what_the_script_makes():
    assert TEXT == glossary.page(), "run `make glossary`"


def test_it_is_one_page_and_no_symbol_is_told_twice():
    assert 40 <= len(ROWS) == len(SYMBOLS) <= 55
    assert len({row["latex"] for row in ROWS}) == len({row["name"] for row in ROWS}) == len(ROWS)
    assert len(TEXT.splitlines()) < 90


def bare(text: str) -> str:
    """Letters, digits and the marks that tell symbols apart."""
    return re.sub(r"\\(?:mathcal|mathrm)|[{}\s]|\\,", "", text)


@each_row
def test_the_notebook_and_the_file_have_it(row):
    book = (ROOT / "notebooks" / row["notebook"]).read_text(encoding="utf-8").replace("\\\\", "\\")
    base, _, upper = bare(row["latex"]).partition("^")
    base = base.split("_")[0] if "_{t" in row["latex"] or "_t" in row["latex"] else base
    base = re.sub("_i(,t)?$", "_", base)
    assert row["notebook"].startswith(row["number"] + "_")
    assert base in bare(book) and "^" + upper in bare(book) + "^"
    code = (ROOT / "dsv2_ref" / row["file"]).read_text(encoding="utf-8")
    assert re.search(rf"(?<!\w){re.escape(row['name'])}(?!\w)", code)


@pytest.mark.parametrize("name, v2, lite", [
    ("d", "5,120", "2,048"), ("n_layers", "60", "27"), ("d_r", "64", "64"),
    ("n_kv", "none", "none"),
    ("d_cq", "1,536", "none"), ("W_DQ", "1,536 × 5,120", "none"), ("c_q", "1,536", "none"),
    ("W_UQ", "16,384 × 1,536", "2,048 × 2,048"), ("W_O", "5,120 × 16,384", "2,048 × 2,048"),
    ("q", "192", "192"), ("groups", "20", "none"), ("max_devices", "3", "none"),
    ("alpha_expert", "0.003", "0.001"), ("alpha_comm", "0.02", "none"), ("T", "4,096", "4,096"),
    ("drop_capacity", "1", "none"), ("rope_theta", "10,000", "10,000"), ("s", "160", "64"),
    ("yarn_mscale", "1.2608", "1.2608"), ("yarn_factor", "40", "40"),
])
def test_values(name, v2, lite):
    (row,) = (row for row in ROWS if row["name"] == name)
    assert (row["v2"], row["lite"]) == (v2, lite)


@pytest.mark.parametrize("latex, number", [
    ("h_t", "01"), ("u_t", "01"), ("d_c", "02"), ("c_t^{KV}", "02"), ("q_{t,i}^C", "02"),
    (r"\omega_i", "03"), ("N_s", "06"), ("g_{i,t}", "06"), ("M", "07"), (r"\alpha_2", "08"),
    ("C", "09"),
])
def test_where_some_are_introduced(latex, number):
    (row,) = (row for row in ROWS if row["latex"] == latex)
    assert row["number"] == number


@pytest.mark.parametrize("latex, formula, found", [
    ("d", "$d_h$", False), ("d", "$d = 3$", True), ("d_h", "$d_h^R$", False),
    ("l", r"$\ln s$", False),
    ("d_h", "$2 n_h d_h$", True), ("d_c", "$d_c'$", False), ("W^{UK}", "$W^{UK}_h c$", False),
    ("W^{UK}", "$$W^{UK}\n c$$", True), ("T", "$W^T$", False), ("T", "T", False),
    (r"\mathcal E_i", r"$\mathcal{E}_i$", True), ("f_i", "$f'_i$", False),
])
def test_a_symbol_is_not_found_in_a_longer_one(latex, formula, found, tmp_path):
    notebook = tmp_path / "01_some.ipynb"
    cells = [{"cell_type": "markdown", "source": [f"words {formula} words"]},
             {"cell_type": "code", "source": ["# $d$ $T$ $l$ $f_i$"]}]
    notebook.write_text(glossary.json.dumps({"cells": cells}))
    assert glossary.occurs(Symbol(latex, "", ""), notebook) == found


def test_what_is_nowhere_is_refused():
    with pytest.raises(ValueError, match="Q_9: in no notebook from 01"):
        glossary.notebook_of(Symbol("Q_9", "d", ""))
    with pytest.raises(ValueError, match="no_such_name: no file"):
        glossary.file_of(Symbol("d", "no_such_name", ""))
