# SPDX-License-Identifier: MIT
"""`generate`: a prompt continued by a saved model."""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from dsv2_ref import checkpoint
from dsv2_ref.commands.common import write_sample
from dsv2_ref.commands.options import filled
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.machine import default_device


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=filled, default="build/model")
    parser.add_argument("--prompt", default="def")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", choices=("latent", "six_bit"), default="latent",
                        help="six_bit: six bits a number, where bf16 has 16")
    parser.set_defaults(act=generate_command)


def generate_command(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int,
    cache: str = "latent",
) -> dict[str, Any]:
    """Continue a prompt with a saved model; the text streams to stderr."""
    if not Path(model).is_dir():
        raise ValueError(f"model: {model!r} is no folder, expected a saved model (`make run` "
                         "writes build/model)")
    tokenizer = load_tokenizer(Path(model) / "tokenizer.json")
    loaded = checkpoint.load(model, device=default_device())
    text = write_sample(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p,
                        sys.stderr.write, seed, cache)
    return {"text": text}
