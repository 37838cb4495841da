# SPDX-License-Identifier: MIT
"""What several commands share in their work."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from dsv2_ref import checkpoint
from dsv2_ref.alignment.chat import CONFIG_FILE, tokenizer_config
from dsv2_ref.config import Config
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.stream import TextStream
from dsv2_ref.text.tokenizer import TextTokenizer
from dsv2_ref.training.setup import Setup


def say(text: str = "") -> None:
    """A message for the person: stderr, so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)


def output_folder(path: str | Path, with_model: bool = False) -> Path:
    """An output folder that exists and can be written to; `with_model`, where model/ may be too."""
    path = Path(path)
    if with_model:
        checkpoint.check_place(path / "model", overwrite=True)
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
    """The published format in bf16, what others read beside it; replaces an earlier one."""
    files = files_for_others(setup.tokenizer, setup.saved or setup.model.config)
    setup.trainer.world.with_whole(setup.model, lambda model: write_model(
        model, setup.saved or model.config, path, files))


def files_for_others(tokenizer: TextTokenizer, config: Config) -> dict[str, str]:
    """Name -> content of what other programs read beside config.json and the weights.

    A tokenizer.json that puts the begin mark in front of a text, the marks by name, the chat
    template, the most tokens that a client is to read, and how text ends.
    """
    generation = {"bos_token_id": config.bos, "eos_token_id": config.to_hf()["eos_token_id"],
                  "pad_token_id": tokenizer.eos, "do_sample": False}
    return {"tokenizer.json": tokenizer.to_json_for_others(),
            CONFIG_FILE: tokenizer_config(config.trained_positions or config.max_positions),
            "generation_config.json": json.dumps(generation, indent=2) + "\n"}


def write_model(model: DeepSeekV2, config: Config, path: Path, files: dict[str, str]) -> None:
    """A model's weights in bf16 in the published format, under a config, text files beside them."""
    with torch.device("meta"):               # a random model in fp32 would be 63 GB for Lite
        state = DeepSeekV2(config).bfloat16()
    state.to_empty(device="cpu")
    if config.tie_embeddings:                # to_empty unties
        state.head.weight = state.embedding.weight
    state.load_state_dict(model.state_dict())
    checkpoint.save(state, path, files, overwrite=True)


def write_chat_model(model: DeepSeekV2, tokenizer: TextTokenizer, path: Path) -> None:
    """As `write_model`, under the model's own config, with what others read beside it."""
    write_model(model, model.config, path, files_for_others(tokenizer, model.config))


def write_sample(
    model: DeepSeekV2, tokenizer: TextTokenizer, prompt: str, max_new_tokens: int,
    temperature: float, top_p: float, write: Callable[[str], object], seed: int = 0,
    cache: str = "latent",
) -> str:
    """Stream a continuation of `prompt` to `write`; returns the whole text.

    `cache`: latent or six_bit, the kind that the model reads from while it writes.
    """
    try:
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    except UnicodeEncodeError:
        raise ValueError(f"prompt: {prompt!r}, expected text that UTF-8 can hold") from None
    rows = None                                 # `generate` makes a latent cache of its own
    if cache != "latent":
        rows = model.new_cache(1, len(ids) + max(max_new_tokens, 1) - 1, cache)
    draws = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    stream = TextStream(tokenizer.decode, write, prompt)
    new = generate(model, [ids], max_new_tokens, temperature, top_p, cache=rows, stream=stream,
                   generator=draws)[0]
    stream.end()
    write("\n")
    return prompt + tokenizer.decode(new)
