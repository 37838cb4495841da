# SPDX-License-Identifier: MIT
"""`figures`: a run drawn from its log."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from dsv2_ref import figures
from dsv2_ref.commands.common import output_folder
from dsv2_ref.commands.options import filled
from dsv2_ref.config import Config
from dsv2_ref.training.run_folder import read_log


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=filled, metavar="RUN_FOLDER",
                        help="pictures go to RUN_FOLDER/figures")
    parser.set_defaults(act=figures_command)


def figures_command(folder: str) -> dict[str, Any]:
    """Draw a run into `folder`/figures from its log.jsonl, with config.json or model/'s sizes."""
    log = read_log(folder)
    configs = [f for f in (Path(folder), Path(folder) / "model") if (f / "config.json").exists()]
    layout = {}
    if configs:
        config = Config.from_hf(configs[0])
        layout = {"n_devices": config.n_devices, "first_layer": config.n_dense}
    out = output_folder(Path(folder) / "figures")
    drawn = figures.run_figures(log, **layout)
    return {"figures": [str(figures.save(f, out / f"{name}.png")) for name, f in drawn.items()]}
