# SPDX-License-Identifier: MIT
"""The main job (`make run`): train a small DeepSeek-V2, judge it, let it write, draw, save."""

import json
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import cost, figures, paper
from dsv2_ref.commands.common import output_folder, save_model, say, write_sample
from dsv2_ref.commands.options import CORPORA, filled
from dsv2_ref.config import SMALL, V2, Config
from dsv2_ref.files.whole import write_text
from dsv2_ref.inference.evaluate import compressed_bits_per_byte
from dsv2_ref.inference.live_cache import measured_cache_bytes
from dsv2_ref.text.corpora import Document, byte_count, open_corpus
from dsv2_ref.training.machine import (
    default_device,
    keep_freed_memory,
    machine,
    set_fastest_threads,
)
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import RunFolder
from dsv2_ref.training.setup import Setup, set_up

# one layer less than the preset: it reads a third more text in the same time, which brings more
MODEL = SMALL.with_(n_layers=2)
# no space at the end: tokens carry the space before a word, not the one after it
PROMPT = "class Parser:\n    def __init__(self, name):\n        self.name = name\n\n    def"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=filled, default="build")
    parser.add_argument("--seconds", type=float, default=225.0,
                        help="for everything together; training gets at least 30 %%")
    parser.add_argument("--corpus", type=filled, default="python", help=CORPORA)
    parser.set_defaults(act=run)


def run(
    out: str | Path = "build", seconds: float = 225.0, corpus: str = "python"
) -> dict[str, Any]:
    """The main job. `seconds` is for everything together; training gets what the rest leaves.

    Returns what it writes to `out`/run.json.
    """
    began = time.perf_counter()
    recipe, out = Recipe(seconds=seconds), checked(output_folder(out, with_model=True))
    keep_freed_memory()
    say("1. Text and tokenizer")
    text = open_corpus(corpus)
    if byte_count(text.test) < 1000:
        raise ValueError(f"corpus: {byte_count(text.test)} bytes for the test, expected 1,000 at "
                         "least, a twentieth of the text")
    say(f"   {text.origin}: {byte_count(text.train) / 1e6:.1f} MB to train on, "
        f"{len(text.test)} whole files, {byte_count(text.test) / 1e6:.2f} MB, for the test")
    compressors = compressed_bits_per_byte(text.test)
    setup = set_up(MODEL, recipe, text)
    say(f"   byte-level BPE, {setup.tokenizer.vocab} tokens")

    say(f"2. Training\n   {setup.describe()}")
    left = seconds - _seconds_to_judge(setup) - (time.perf_counter() - began)
    setup.trainer.recipe = recipe.with_(seconds=max(left, 0.3 * seconds))
    few = _prefix(text.validation, 20_000)
    log = train(setup.trainer, out / "training", 0, lambda: setup.held_out(few), 100, load_every=20)
    say(f"   {setup.trainer.steps} steps, {setup.trainer.tokens:,} tokens in "
        f"{setup.trainer.elapsed:.0f} s")

    say("3. Held-out text, bits per byte (less is better)")
    bits = setup.held_out(text.test, progress=True)
    for name, value in (("gzip -9, each file", compressors["gzip"]),
                        ("xz -9e, each file", compressors["xz"]),
                        ("xz -9e, all files together", compressors["xz_together"]),
                        ("this model", bits)):
        say(f"   {name:<28}{value:.3f}")

    say("4. A sample, decoded from the latent cache")
    save_model(setup, out / "model")
    write_sample(setup.model.eval(), setup.tokenizer, PROMPT, 200, 0.7, 0.9, sys.stderr.write)

    caches = compare_caches(setup.model.config)
    say("\n6. The paper's claims beside ours\n" + paper.as_table(paper.rows()))
    draw(setup, log, compressed_bits_per_byte(few), caches["V2's size"], out)
    result = summary(setup, bits, compressors, caches)
    result["seconds"] = time.perf_counter() - began
    write_text(out / "run.json", json.dumps(result, indent=2) + "\n")
    say(f"\nDone in {result['seconds']:.0f} s. In {out}/: run.json, loss.png, cache.png, "
        "expert_load.png, model/ (published format), training/")
    return result


def checked(out: Path) -> Path:
    """The folder. ValueError if the job would replace in it what it did not write."""
    RunFolder(out / "training").check_log()
    try:
        earlier = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if isinstance(earlier, dict) and "cache_bytes_per_token_at_v2_size" in earlier:
        return out
    for name in ("run.json", "loss.png", "cache.png", "expert_load.png"):
        if (out / name).exists():
            raise ValueError(f"{out / name}: exists and was not written by this job, expected "
                             "another --out, or this moved away")
    return out


def _prefix(documents: list[Document], n_bytes: int) -> list[Document]:
    """The first documents, as few as have `n_bytes` together."""
    taken: list[Document] = []
    for document in documents:
        if byte_count(taken) >= n_bytes:
            break
        taken.append(document)
    return taken


def _seconds_to_judge(setup: Setup) -> float:
    """What everything after training will take on this machine, from a piece of the test."""
    piece = [Document("piece", setup.corpus.test[0].text[:40_000])]
    set_fastest_threads(lambda: setup.held_out(piece))
    began = time.perf_counter()
    setup.held_out(piece)
    whole = (time.perf_counter() - began) * byte_count(setup.corpus.test) / byte_count(piece)
    return 1.1 * whole + 15.0


def compare_caches(config: Config) -> dict[str, dict[str, int]]:
    """Bytes a token of live caches by kind, for a model and for V2; tells the person."""
    say("\n5. Cache, bytes a token in bf16, measured on live tensors")
    live = {}
    for name, c in (("this model", config), ("V2's size", V2)):
        live[name] = measured_cache_bytes(c)
        say(f"   {name:<12}" + "   ".join(f"{kind} {n:,}" for kind, n in live[name].items())
            + f"   ({c.n_h} heads, GQA with {cost.default_groups(c.n_h)} groups)")
    say("   MLA's row does not grow with the heads: it pays where there are many of them.")
    return live


def summary(
    setup: Setup, bits: float, compressors: dict[str, float], caches: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """What run.json holds, but for the seconds of the whole job."""
    trainer = setup.trainer
    return {
        "bits_per_byte": bits, "gzip_bits_per_byte": compressors["gzip"],
        "xz_bits_per_byte": compressors["xz_together"],
        "xz_each_file_bits_per_byte": compressors["xz"],
        "seconds": 0.0, "training_seconds": trainer.elapsed, "steps": trainer.steps,
        "tokens_per_second": trainer.tokens / trainer.elapsed,
        "cache_bytes_per_token": caches["this model"],
        "cache_bytes_per_token_at_v2_size": caches["V2's size"],
        "corpus": setup.corpus.origin, "test_bytes": byte_count(setup.corpus.test),
        **machine(), "precision": trainer.precision,
        "device": torch.cuda.get_device_name() if default_device() == "cuda" else "cpu",
    }


def draw(
    setup: Setup, log: list[dict[str, Any]], references: dict[str, float],
    cache_bytes: dict[str, int], out: Path,
) -> None:
    """The three pictures of the main job, as PNG in `out`."""
    references = {"gzip": references["gzip"], "xz": references["xz"]}
    figures.save(figures.loss_curve(log, references), out / "loss.png")
    figures.save(figures.cache_bars(cache_bytes), out / "cache.png")
    c = setup.model.config
    load = setup.held_out_load(setup.corpus.validation, rows=8)
    slots = torch.stack([layer.experts for layer in load]).numpy(force=True)
    figures.save(figures.expert_load(slots, c.n_devices, c.n_dense), out / "expert_load.png")
