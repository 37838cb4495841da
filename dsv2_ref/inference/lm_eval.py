# SPDX-License-Identifier: MIT
"""A model of ours for lm-evaluation-harness: the field's benchmarks, with its own code for tasks.

lm-eval asks a model for three things: log p of a continuation behind a context, log p of a whole
text, and a text that goes on until a stop. Each is answered here with the same tokens as its `hf`
adapter takes, so the numbers are the same (`make parity_lm_eval` compares them). What that means:

  1. Context and continuation are encoded together and cut where the context alone would end; spaces
     at the end of a context belong to the continuation. (This is lm-eval's `TemplateLM`.)
  2. The begin mark stands before every text that does not start with it, as our exported
     tokenizer.json asks transformers to do. Text that spells a mark becomes the mark here, as in
     transformers and unlike in training: chat templates need it.
  3. What is too long loses tokens on the left, the begin mark first. Too long is what is longer
     than the trained length, where the config says it: others read to that.
  4. A whole text is read in windows of that many tokens, of which only the first token of a
     later one is context. The begin mark is *predicted too*, behind another one: lm-eval does so.
     A trained model finds it unlikely, which adds to the bits per byte of short texts;
     evaluate.bits_per_byte counts no such token and overlaps its windows.
  5. Greedy text is the same up to logits that are equal in rounding. Samples are not: other draws,
     and transformers keeps the 50 most likely tokens unless told otherwise.

Needs: the extra `eval`.
"""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from dsv2_ref.inference.evaluate import score_continuations
from dsv2_ref.inference.until import Ask, continue_until
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.stretch import with_config
from dsv2_ref.text.tokenizer import BEGIN, END, TextTokenizer

MAX_GEN_TOKS = 256       # of a task that does not say; the `hf` adapter's number
SETTINGS = {"do_sample", "temperature", "top_p"}


class Adapter(TemplateLM):
    """`lm_eval.simple_evaluate(model=Adapter(model, tokenizer), tasks=[...])`.

    batch: texts that are read at once. memory_bytes: of the engine's pages.
    """

    def __init__(
        self, model: DeepSeekV2, tokenizer: TextTokenizer, batch: int = 16,
        memory_bytes: int = 2**30, progress: bool = False,
    ) -> None:
        super().__init__()
        if (trained := model.config.trained_positions) is not None:
            model = with_config(model, model.config.with_(max_positions=trained,
                                                          trained_positions=None))
        self.model, self.text_tokenizer = model.eval(), tokenizer
        self.batch, self.memory_bytes, self.progress = batch, memory_bytes, progress
        self.encoder = Tokenizer.from_str(tokenizer.to_json())       # reads marks in texts as marks

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self.text_tokenizer.bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, the begin mark before it if it has none (or as `add_special_tokens`)."""
        begins = not string.startswith(BEGIN) if add_special_tokens is None else add_special_tokens
        ids = self.encoder.encode(string, add_special_tokens=False).ids
        return [self.text_tokenizer.bos] * begins + ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return score_continuations(self.model, [(context, following) for _, context, following
                                                in requests], self.batch, self.progress)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.progress)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each whole text, in nats."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id,
                self.model.config.max_positions, context_len=1,
            ):
                windows.append(make_disjoint_window(window))
                owners.append(i)
        found = [0.0] * len(requests)
        scores = score_continuations(self.model, windows, self.batch, self.progress)
        for i, (log_p, _) in zip(owners, scores, strict=True):
            found[i] += log_p
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context. ValueError for settings that the engine has not."""
        return continue_until(self.model, self.text_tokenizer, [self._ask(*request.args)
                              for request in requests], self.memory_bytes, self.progress)

    def _ask(self, context: str, settings: dict[str, Any]) -> Ask:
        given = normalize_gen_kwargs(settings, MAX_GEN_TOKS)
        stops, new = handle_stop_sequences(given.pop("until"), END), given.pop("max_gen_toks")
        if unknown := sorted(given.keys() - SETTINGS):
            raise ValueError(f"generation_kwargs: {unknown[0]!r}, expected only until, "
                             f"max_gen_toks, {', '.join(sorted(SETTINGS))}")
        temperature = given.get("temperature", 0.0)
        if given["do_sample"] and not temperature:
            raise ValueError("temperature: 0 with do_sample, expected a number above 0")
        room = self.model.config.max_positions - new
        if room < 1:
            raise ValueError(f"max_gen_toks: {new}, expected fewer than max_positions = "
                             f"{self.model.config.max_positions}")
        return Ask(self.tok_encode(context)[-room:], stops, new, temperature,
                   given.get("top_p", 1.0))
