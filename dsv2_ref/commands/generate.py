# SPDX-License-Identifier: MIT
"""`generate`: a prompt continued by a saved model."""

import sys
from pathlib import Path
from typing import Any

from dsv2_ref import checkpoint
from dsv2_ref.commands.common import write_sample
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.machine import default_device


def generate_command(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int,
) -> dict[str, Any]:
    """Continue a prompt with a saved model; the text streams to stderr."""
    if not Path(model).is_dir():
        raise ValueError(f"model: {model!r} is no folder, expected a saved model (`make run` "
                         "writes build/model)")
    tokenizer = load_tokenizer(Path(model) / "tokenizer.json")
    loaded = checkpoint.load(model, device=default_device())
    text = write_sample(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p,
                        sys.stderr.write, seed)
    return {"text": text}
