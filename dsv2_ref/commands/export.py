# SPDX-License-Identifier: MIT
"""`export`: a saved model written anew, with all that other programs read beside it."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from dsv2_ref import checkpoint
from dsv2_ref.commands.common import files_for_others, say
from dsv2_ref.commands.options import filled
from dsv2_ref.files.published import ragged
from dsv2_ref.stretch import trained_positions, with_config
from dsv2_ref.text.tokenizer import load_tokenizer


def add_options(parser: ArgumentParser) -> None:
    parser.description = (
        "Write a saved model anew, number for number, into a folder that transformers, lm-eval, "
        "vLLM and llama.cpp take. The main job, `train`, `sft` and `grpo` write theirs so already."
    )
    add = parser.add_argument
    add("source", type=filled, metavar="MODEL", help="folder of a saved model, as data/model")
    add("--trained", type=int, metavar="N",
        help="tokens of the sequences that it was trained on, where the folder does not say it; "
             "others read no further")
    add("--fp8", action="store_true", help="weights of linear layers and experts in eight bits")
    add("--out", type=filled, default="build/export", help="a new or empty folder, or an earlier "
        "export")
    parser.set_defaults(act=export_command)


def export_command(
    source: str, out: str, trained: int | None = None, fp8: bool = False
) -> dict[str, Any]:
    """Read `source` and its tokenizer.json, and write `out`. ValueError for what cannot be.

    `trained`: of a model with plain RoPE; None keeps what its config says.
    """
    if not Path(source).is_dir():
        raise ValueError(f"MODEL: {source!r} is no folder, expected a saved model, as data/model")
    checkpoint.check_place(out, overwrite=True)
    tokenizer = load_tokenizer(Path(source) / "tokenizer.json")
    model = checkpoint.load(source)
    if tokenizer.vocab > model.config.vocab:
        raise ValueError(f"tokenizer: {tokenizer.vocab} tokens, expected at most the model's "
                         f"{model.config.vocab}")
    config = model.config
    if trained is not None:
        whole = trained == config.max_positions
        config = config.with_(trained_positions=None if whole else trained)
    if fp8 and (names := ragged(model)):
        say(f"FP8: {len(names)} tensors, as {names[0]}, have a size that is no multiple of 128; "
            "not every program reads them right (dsv2_ref/inference/clients.md)")
    checkpoint.save(with_config(model, config), out, files_for_others(tokenizer, config),
                    overwrite=True, fp8=fp8)
    return {"trained": trained_positions(config), "out": str(out)}
