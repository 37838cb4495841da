# SPDX-License-Identifier: MIT
"""`generate`: a prompt continued by a saved model, or a file of prompts."""

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv2_ref import checkpoint
from dsv2_ref.commands.common import write_sample
from dsv2_ref.commands.options import filled
from dsv2_ref.commands.prompts import answer, bytes_of, read_prompts
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.machine import default_device


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=filled, nargs="?", metavar="MODEL",
                        help="the same as --model MODEL")
    parser.add_argument("--model", type=filled, default="build/model")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="def")
    what.add_argument("--prompts", type=filled, metavar="FILE",
                      help="lines of JSON with a prompt each, and perhaps an id, max_new_tokens, "
                           "temperature, top_p, seed; gives a line for each, as they are done")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", choices=("latent", "six_bit"), default="latent",
                        help="six_bit: six bits a number, where bf16 has 16")
    parser.add_argument("--memory", default="1GB",
                        help="with --prompts: for the caches of all that run at once")
    parser.add_argument("--out", type=filled, metavar="FILE",
                        help="with --prompts: lines are added here too; ids that are there already "
                             "are left out")
    parser.set_defaults(act=generate_command)


def generate_command(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int,
    cache: str = "latent", folder: str | None = None, prompts: str | None = None,
    memory: str = "1GB", out: str | None = None,
) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """Continue a prompt with a saved model; the text streams to stderr. Or a file of prompts."""
    model = folder or model
    if not Path(model).is_dir():
        raise ValueError(f"model: {model!r} is no folder, expected a saved model (`make run` "
                         "writes build/model)")
    if out and not prompts:
        raise ValueError(f"out: {out!r} without --prompts, expected both")
    asked, room = [], bytes_of(memory)
    if prompts:                                        # before the model is read
        asked = read_prompts(prompts, max_new_tokens=max_new_tokens, temperature=temperature,
                             top_p=top_p, seed=seed)
    tokenizer = load_tokenizer(Path(model) / "tokenizer.json")
    loaded = checkpoint.load(model, device=default_device())
    if prompts:
        return answer(loaded, tokenizer, asked, room, cache, out)
    text = write_sample(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p,
                        sys.stderr.write, seed, cache)
    return {"text": text}
