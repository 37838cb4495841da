# SPDX-License-Identifier: MIT
"""What several commands share: messages, the output folder, the saved model, a sample of text."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from dsv2_ref import checkpoint
from dsv2_ref.inference.generate import TextStream, generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.tokenizer import TextTokenizer
from dsv2_ref.training.setup import Setup


def say(text: str = "") -> None:
    """A message for the person: stderr, so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)


def output_folder(path: str | Path) -> Path:
    """An output folder that exists and can be written to."""
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path}: cannot be written, it is a file, expected a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def save_model(setup: Setup, path: Path) -> None:
    """The published format in bf16, tokenizer.json beside it; replaces an earlier one."""
    state = DeepSeekV2(setup.model.config)
    state.load_state_dict(setup.model.state_dict())
    text = setup.tokenizer.tokenizer.to_str(pretty=True)
    checkpoint.save(state.bfloat16(), path, {"tokenizer.json": text}, overwrite=True)


def write_sample(
    model: DeepSeekV2, tokenizer: TextTokenizer, prompt: str, max_new_tokens: int,
    temperature: float, top_p: float, write: Callable[[str], object], seed: int = 0,
) -> str:
    """Stream a continuation of `prompt` to `write`; returns the whole text."""
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    draws = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    stream = TextStream(tokenizer.decode, write, prompt)
    new = generate(model, [ids], max_new_tokens, temperature, top_p, stream=stream,
                   generator=draws)[0]
    write("\n")
    return prompt + tokenizer.decode(new)
