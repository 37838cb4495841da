# SPDX-License-Identifier: MIT
"""Byte-level BPE through the `tokenizers` library, in its standard `tokenizer.json`.

Byte-level means that the 256 byte values are the first alphabet: every text has an encoding, there
is no unknown token, and `decode(encode(text)) == text` for all text that UTF-8 can hold.

The pieces that BPE may merge within are cut by one regular expression, in this order:

1. a run of Chinese characters, apart from everything else (no spaces mark words there, so BPE
   itself finds the frequent words inside the run);
2. a word of any other script with the one space or underscore before it (`snake_case` is cut at
   its underscores);
3. at most three digits; 4. punctuation, with the one space before it;
5. spaces inside a line, all but the last before a word;
6. line ends together with the indentation of the next line, so that "\\n        " can become one
   token: Python's block structure then costs one token a line.

The two special tokens, begin and end of a document, carry DeepSeek-V2's own spelling. They exist
as ids only: text that happens to spell one is encoded like any other text, byte for byte, so no
document can end itself. (Another program that opens the saved file has to ask for the same: it is
`Tokenizer.encode_special_tokens` there, a setting the file format does not store.)
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN = "<｜begin▁of▁sentence｜>"
END = "<｜end▁of▁sentence｜>"
SMALLEST_VOCAB = 256 + 2  # the bytes and the two special tokens
# Learning takes time quadratic in a piece, and a file of letters without a space is one piece: it
# is learnt from in parts of so many characters. Encoding is fast at any length and cuts nothing.
LONGEST_PIECE = 256

PIECES = "|".join(
    [
        r"\p{Han}+",
        r"[ _]?[\p{L}\p{M}&&[^\p{Han}]]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"[^\S\r\n]+(?!\S)",
        r"\s+",
    ]
)


class TextTokenizer:
    """Text to ids and back. `bos`, `eos`: ids of the document marks; `vocab`: number of ids."""

    def __init__(self, tokenizer: Tokenizer):
        bos, eos = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
        if bos is None or eos is None:
            missing = BEGIN if bos is None else END
            raise ValueError(f"the tokenizer has no special token {missing!r}")
        tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        self.tokenizer, self.bos, self.eos = tokenizer, bos, eos
        self.vocab = max(tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without document marks. UnicodeEncodeError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        for text in texts:
            text.encode()  # a lone surrogate raises here; the library would abort less clearly
        batch = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; document marks are left out, broken UTF-8 becomes U+FFFD."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """The content of a tokenizer.json, which `load_tokenizer` reads."""
        return self.tokenizer.to_str(pretty=True)

    def to_json_for_others(self) -> str:
        """`to_json`, with a rule by which other programs put the begin mark in front of a text.

        `load_tokenizer` reads it; its `encode` adds no mark, as ever.
        """
        other = Tokenizer.from_str(self.to_json())
        if other.encode("").ids != [self.bos]:
            mark = processors.TemplateProcessing(
                single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B:1",
                special_tokens=[(BEGIN, self.bos)])
            before = other.post_processor
            other.post_processor = processors.Sequence([before, mark]) if before else mark
        return other.to_str(pretty=True)

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """What `to_json` gave."""
        return cls(Tokenizer.from_str(text))


def train_tokenizer(texts: Iterable[str], vocab: int) -> TextTokenizer:
    """Learn the merges from `texts`; ids 0 and 1 are the document marks, then bytes, then merges.

    Deterministic. Where the texts hold too few pairs to merge, the result has fewer than `vocab`
    ids (see `.vocab`). ValueError if `vocab` cannot hold the bytes and the marks.
    """
    if vocab < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab is {vocab}, expected at least {SMALLEST_VOCAB} (256 bytes and 2 document marks)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _cut_by(PIECES.replace("+", f"{{1,{LONGEST_PIECE}}}"))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = _cut_by(PIECES)
    return TextTokenizer(tokenizer)


def _cut_by(pieces: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Read a tokenizer.json (ours or DeepSeek-V2's own). ValueError if missing or not one."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no tokenizer at {str(path)!r}, expected a tokenizer.json file")
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        return TextTokenizer.from_json(text)
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} is not a usable tokenizer.json: {reason}") from error
