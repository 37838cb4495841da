# SPDX-License-Identifier: MIT
"""The course as static pages: `make site` writes build/site; open build/site/index.html.

README, the notebooks as they are stored (nothing is run), the glossary, the data page, and each
source file that one of these names in a link. A widget becomes the picture that it showed. Sphinx
with MyST-NB builds the pages; a link or an anchor that leads nowhere is an error. With
`--external` links to other sites are asked for, too, which needs a network.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml"}
CONF = """
project = "dsv2_ref"
author = "the authors of dsv2_ref"
html_title = "DeepSeek-V2, exactly"
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "navbar_persistent": [], "use_download_button": True}
html_static_path = ["_static"]
html_css_files = ["wide.css"]
mathjax_path = "mathjax/MathJax.js"
mathjax2_config = {
    "config": ["TeX-AMS-MML_HTMLorMML-full.js"], "jax": ["input/TeX", "output/HTML-CSS"],
    "showMathMenu": False, "messageStyle": "none",
    "tex2jax": {"processClass": "math", "ignoreClass": "document"},
    "HTML-CSS": {"availableFonts": [], "webFont": "STIX-Web", "scale": 95},
}
"""
# a line of code of 100 characters fits
CSS = """
.bd-main .bd-content .bd-article-container { max-width: 70rem; }
div.cell pre, div.highlight pre { font-size: 0.78rem; }
div.cell_output img { max-width: 100%; }
div.math { display: block; }
.MathJax_Display { text-align: center !important; }
"""


def picture_of(state: dict, name: str) -> str | None:
    """The PNG, in base64, that a stored widget shows: its own, or the first of its children's."""
    model = state.get(name, {})
    for buffer in model.get("buffers", []):
        if buffer["path"] == ["value"]:
            return buffer["data"]
    for child in model.get("state", {}).get("children", []):
        if found := picture_of(state, child.removeprefix("IPY_MODEL_")):
            return found
    return None


def without_widgets(notebook: dict) -> dict:
    """The notebook with pictures in place of widgets; ValueError where one has none."""
    state = notebook["metadata"].pop("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            view = output.get("data", {}).get(VIEW)
            if view is None:
                continue
            if not (picture := picture_of(state, view["model_id"])):
                raise ValueError(f"cell {cell.get('id')}: a widget without a stored picture, "
                                 "expected one; run the notebook and save it")
            output["data"] = {"image/png": picture}
    return notebook


def relinked(text: str, page: Path, pages: set[Path], linked: set[Path]) -> str:
    """A page's links, led to pages of the site; the files that they name are added to `linked`.

    page: the file that the text is from; pages: files that are pages themselves.
    """
    def one(match: re.Match) -> str:
        target = match["target"]
        parts = urlsplit(target)
        if parts.scheme or not parts.path:
            return match[0]
        file = (page.parent / unquote(parts.path)).resolve()
        if not file.exists() or not file.is_relative_to(ROOT):
            raise ValueError(f"{page.relative_to(ROOT)}: link to {target}, expected a file here")
        place = file.relative_to(ROOT)
        if place in pages:
            to = "index.md" if place == Path("README.md") else str(place)
        elif file.is_dir() or file.suffix in LANGUAGES:
            linked.add(place)
            to = f"{place}.md"
        else:
            linked.add(place)
            to = str(place)
        here = page.parent.relative_to(ROOT)
        anchor = f"#{parts.fragment}" if parts.fragment else ""
        return f"[{match['text']}]({os.path.relpath(to, here)}{anchor})"

    return LINK.sub(one, text)


def source_page(place: Path) -> str:
    """A page that shows a source file; of a folder what its `__init__` says."""
    file = ROOT / place / "__init__.py" if (ROOT / place).is_dir() else ROOT / place
    text = file.read_text(encoding="utf-8")
    language = LANGUAGES[file.suffix]
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"# {place.name}\n\n`{place}`\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def gather(source: Path) -> None:
    """Everything that Sphinx reads, written into an empty folder."""
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    texts = [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.md")),
             ROOT / "data" / "README.md", *sorted((ROOT / "dsv2_ref").rglob("*.md"))]
    pages = {p.relative_to(ROOT) for p in [*notebooks, *texts]}
    linked: set[Path] = set()
    for file in texts:
        place = file.relative_to(ROOT)
        text = relinked(file.read_text(encoding="utf-8"), file, pages, linked)
        if place == Path("README.md"):
            place, text = Path("index.md"), text + contents(pages)
        put(source / place, text)
    for file in notebooks:
        notebook = without_widgets(json.loads(file.read_text(encoding="utf-8")))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = relinked("".join(cell["source"]), file, pages, linked)
        put(source / file.relative_to(ROOT), json.dumps(notebook))
    for place in sorted(linked | {p.relative_to(ROOT) for p in (ROOT / "data").rglob("*.png")}):
        if (ROOT / place).is_dir() or place.suffix in LANGUAGES:
            put(source / f"{place}.md", "---\norphan: true\n---\n" + source_page(place))
        else:                                                # to look at, or to keep
            shutil.copyfile(ROOT / place, made(source / place))
    put(source / "conf.py", CONF)
    put(source / "_static" / "wide.css", CSS)
    mathjax = Path(find_spec("jupyter_server_mathjax").origin).parent / "static"
    for part in ("MathJax.js", "LICENSE", "config", "extensions", "fonts", "jax"):
        copy = shutil.copytree if (mathjax / part).is_dir() else shutil.copyfile
        copy(mathjax / part, made(source / "_static" / "mathjax" / part))


def contents(pages: set[Path]) -> str:
    """The table of contents of the whole site, hidden on the first page."""
    names = {str(p) for p in pages if p.suffix == ".ipynb"}
    listed = [f"notebooks/{name}" for name in re.findall(
        r"\]\(([^()\s]+\.ipynb)\)", (ROOT / "notebooks/README.md").read_text(encoding="utf-8"))]
    course = sorted(names, key=lambda name: (listed.index(name) if name in listed else 99, name))
    more = sorted(str(p) for p in pages if p.suffix == ".md" and p.parts[0] != "README.md"
                  and p != Path("notebooks/README.md"))
    trees = {"The course": ["notebooks/README.md", *course], "More": more}
    return "".join(f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n"
                   + "\n".join(names) + "\n```\n" for caption, names in trees.items())


def made(path: Path) -> Path:
    """The path, whose folder is there now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def put(path: Path, text: str) -> None:
    made(path).write_text(text, encoding="utf-8")


class _Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.links += [found[key] for key in ("href", "src") if found.get(key)]
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}


def dead_links(site: Path) -> list[str]:
    """Links of a built site that lead to no file or no anchor of it, a line each."""
    pages = {}
    for file in site.rglob("*.html"):
        if "_static" in file.parts:                          # the theme's own, not pages
            continue
        pages[file] = _Page()
        pages[file].feed(file.read_text(encoding="utf-8"))
    dead = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.exists() or anchor and target in pages and anchor not in (
                    pages[target].anchors):
                dead.append(f"{file.relative_to(site)}: {link}")
    return sorted(set(dead))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--external", action="store_true", help="ask other sites for their pages")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if out.exists() and not (out / ".buildinfo").exists():
        print(f"{out}: exists and is no site of this project, expected none", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        source, site = Path(scratch) / "source", Path(scratch) / "site"
        source.mkdir()
        try:
            gather(source)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
        builders = ["html", "linkcheck"] if arguments.external else ["html"]
        for builder in builders:
            made_in = site if builder == "html" else Path(scratch) / "links"
            done = subprocess.run([*sphinx, "-b", builder, source, made_in], check=False)
            if done.returncode:
                return done.returncode
        if dead := dead_links(site):
            print("links that lead nowhere:", *dead, sep="\n", file=sys.stderr)
            return 1
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(site, out)
    print(f"{out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
