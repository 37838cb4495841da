# SPDX-License-Identifier: MIT
"""`needle`: what a saved model finds in a long text, by length and depth."""

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import checkpoint, figures
from dsv2_ref.commands.common import output_folder, say
from dsv2_ref.commands.options import CORPORA, filled
from dsv2_ref.config import Config
from dsv2_ref.inference.kept_cells import is_of_cells
from dsv2_ref.inference.needle import GREEN, Grid, plans, run
from dsv2_ref.stretch import stretched, stretched_config, trained_positions
from dsv2_ref.text.corpora import open_corpus
from dsv2_ref.text.needles import KINDS, haystack
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.machine import default_device


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=filled, metavar="MODEL", help="folder of a saved model, as data/needle")
    add("--lengths", nargs="+", help="tokens, as 512 1024 or 128K; default: the longest that the "
        "model has positions for")
    add("--depths", nargs="+", help="per cent; default: 0 20 40 60 80 100")
    add("--cache", choices=("latent", "six_bit"), default="latent")
    add("--kind", choices=KINDS, default="one",
        help="one needle, one of four, or x1 = 7, x2 = x1, x3 = x2: what is x3?")
    add("--samples", type=int, default=8, help="needles of a cell")
    add("--factor", type=float, help="YaRN's s; 1 is plain RoPE; default: the model's")
    add("--corpus", type=filled, default="stories", help=f"the haystack: {CORPORA}")
    add("--seed", type=int, default=0)
    add("--out", type=filled, default="build/needle",
        help="cells are kept here, so that a run that was killed goes on")
    add("--json", action="store_true", help="JSON, not a table")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    parser.set_defaults(act=needle_command)


def needle_command(
    model: str, lengths: Sequence[str] | None, depths: Sequence[str] | None, cache: str, kind: str,
    samples: int, factor: float | None, corpus: str, seed: int, out: str, json: bool,
    progress: bool = True,
) -> str:
    """Measure the grid, keep its cells in `out` as they are made, and draw it there."""
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(f"model: {model!r} is no folder, expected a saved model, as data/needle")
    config = Config.from_hf(folder)
    trained = trained_positions(config)
    if factor is not None:
        config = stretched_config(config, factor)
    grid = Grid(numbers("lengths", lengths, (config.max_positions,)),
                numbers("depths", depths, (0, 20, 40, 60, 80, 100)), samples, kind, cache, seed)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    plans(grid, tokenizer, config.max_positions)          # refused before anything long is read
    picture = _picture(output_folder(out))
    text = haystack(open_corpus(corpus).test, tokenizer, max(grid.lengths))
    device = default_device()
    loaded = checkpoint.load(model, None if device == "cuda" else torch.float32, device)
    if factor is not None:
        loaded = stretched(loaded, factor)
    s = loaded.config.yarn_factor
    say(f"{model}: trained at {trained} tokens, "
        + ("plain RoPE" if s is None else f"YaRN s = {s:g}"))
    result = run(loaded, tokenizer, text, grid, picture.parent, progress)
    result |= {"model": model, "corpus": corpus, "factor": s or 1.0, "trained": trained}
    result["figure"] = str(figures.save(figures.needle_grid(result), picture))
    return dumps(result) if json else as_table(result)


def _picture(folder: Path) -> Path:
    """Where the grid is drawn. ValueError if a picture is there that no run of this drew."""
    path = folder / "grid.png"
    ours = (is_of_cells(file) for file in folder.glob("cells-*.jsonl") if file.is_file())
    if (path.exists() or path.is_symlink()) and not any(ours):
        raise ValueError(f"{path}: exists and was not drawn by this, expected another --out, or "
                         "this moved away")
    return path


def numbers(name: str, values: Sequence[str] | None, default: Sequence[float]) -> tuple:
    """Numbers as written on the command line: `256 512`, `256,512`, `128K` for 128·1024."""
    if values is None:
        return tuple(default)
    result = []
    for word in ",".join(values).replace(" ", ",").split(","):
        times = 1024 if word[-1:] in ("k", "K") else 1
        try:
            value = float(word[:-1] if times > 1 else word) * times
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{name}: {word!r}, expected numbers, as 512 or 128K")
        result.append(int(value) if value == value // 1 else value)
    if name == "lengths" and not all(isinstance(value, int) for value in result):
        raise ValueError(f"{name}: {result}, expected whole numbers of tokens")
    return tuple(result)


def as_table(result: dict[str, Any]) -> str:
    """The grid as text: a line a depth, a column a length."""
    lines = ["depth %  " + "".join(f"{length:>8}" for length in result["lengths"])]
    for depth, row in zip(result["depths"], zip(*result["grid"])):
        lines.append(f"{depth:>7g}  " + "".join(f"{value:>8.2f}" for value in row))
    return "\n".join([*lines, f"mean {result['mean']:.3f}, {result['green']} of {result['cells']} "
                      f"cells at {GREEN} or above; {result['figure']}"])
