# SPDX-License-Identifier: MIT
"""corpora.py and data.py: whole files held out, exact packing, resuming, one line per error."""

import gzip
import hashlib
import json
import lzma
import os
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from refusals import refused

from dsv2_ref.inference.evaluate import compressed_bits_per_byte
from dsv2_ref.text import corpora
from dsv2_ref.text.corpora import (
    Document,
    byte_count,
    hub_corpus,
    local_corpus,
    open_corpus,
    python_corpus,
    split,
    stories_corpus,
)
from dsv2_ref.text.data import PackedBatches, encode, marked, some_of
from dsv2_ref.text.tokenizer import train_tokenizer


def parts(corpus):
    return corpus.train, corpus.validation, corpus.test


def names(documents):
    return [document.name for document in documents]


@pytest.fixture(scope="module")
def python():
    return python_corpus()


def test_python_corpus_is_the_library_without_its_tests(python):
    root = Path(sysconfig.get_paths()["stdlib"])
    every = [name for part in parts(python) for name in names(part)]
    assert len(set(every)) == len(every) > 300
    assert {"json/decoder.py", "dataclasses.py", "asyncio/events.py"} <= set(every)
    banned = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3",
              "__pycache__", "ensurepip"}  # fmt: skip
    for name in every:
        assert name.endswith(".py") and not banned & set(name.split("/"))
        assert not name.split("/")[-1].startswith("_sysconfigdata")
    for document in (python.train[0], python.validation[-1], python.test[0]):
        assert document.text.encode() == (root / document.name).read_bytes()
    for part in parts(python):
        assert names(part) == sorted(names(part)) and all(document.text for document in part)


def test_python_corpus_holds_out_two_parts_of_half_a_megabyte(python):
    assert byte_count(python.train) > 5_000_000
    for part in (python.validation, python.test):
        assert 500_000 <= byte_count(part) < 600_000
        assert 10 <= len(part) <= 80
        assert max(len(document.text.encode()) for document in part) <= 100_000
    assert open_corpus("python") == python


def test_packages_corpus_is_what_is_installed(tmp_path, monkeypatch):
    for i in range(30):
        for name in (f"one/m{i}.py", f"one/tests/t{i}.py", f"two/__pycache__/m{i}.py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{name[4]} = {i}\n" * 50)
    (tmp_path / "two" / "data.txt").write_text("no source")
    (tmp_path / "two" / "latin.py").write_bytes("é".encode("latin-1"))
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "gone.py")
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    corpus = corpora.packages_corpus(held_out_bytes=2000)
    found = sorted(name for part in parts(corpus) for name in names(part))
    assert found == sorted([f"one/m{i}.py" for i in range(30)] +
                           [f"one/tests/t{i}.py" for i in range(30)])
    assert "1 installed packages" in corpus.origin
    monkeypatch.setattr(corpora, "packages_corpus", lambda: corpus)
    assert open_corpus("packages") is corpus


def documents(n, size=100):
    return [Document(f"file {i}", "x" * (size + i)) for i in range(n)]


def test_split_does_not_depend_on_the_order_and_is_stable():
    corpus = split("c", documents(100), "here")
    shuffled = split("c", reversed(documents(100)), "here")
    for one, other in zip(parts(corpus), parts(shuffled)):
        assert sorted(names(one)) == sorted(names(other))
    assert sum(map(len, parts(corpus))) == 100
    # dealt in turn by sha256 of the name: the same in every process and on every release
    letters = [Document(letter, letter) for letter in "abcdefghijklmnopqrst"]
    dealt = sorted("abcdefghijklmnopqrst", key=lambda s: hashlib.sha256(s.encode()).hexdigest())
    few = split("c", letters, "", held_out_bytes=5)
    assert (names(few.validation), names(few.test)) == (sorted(dealt[:10:2]), sorted(dealt[1:10:2]))


def test_split_sizes_and_small_corpora():
    corpus = split("c", documents(1000), "")
    total = byte_count(documents(1000))
    for part in (corpus.validation, corpus.test):
        assert total // 20 <= byte_count(part) <= total // 20 + 1100
    three = split("c", [Document("a", "x" * 90), Document("b", "x"), Document("c", "yy")], "")
    assert [names(part) for part in parts(three)] == [["a"], ["b"], ["c"]]
    giant = [Document("giant", "x" * 10**6), *documents(400)]
    assert "giant" in names(split("c", giant, "").train)
    with pytest.raises(ValueError, match="'c' has 2 document.* expected at least 3"):
        split("c", documents(2) + [Document("empty", "")], "")
    with pytest.raises(ValueError, match="'c' is empty"):
        split("c", [Document("empty", "")], "")
    with pytest.raises(ValueError, match="too small for 10000000 held-out bytes"):
        split("c", documents(50), "", held_out_bytes=10**7)


def test_a_text_that_occurs_twice_is_never_in_two_parts():
    texts = [str(i) * (20 + i) for i in range(100)]
    twice = [Document(f"{copy}/{i}", text) for copy in "ab" for i, text in enumerate(texts)]
    corpus = split("c", twice, "")
    train, validation, test = ({d.text for d in part} for part in parts(corpus))
    assert train | validation | test == set(texts)
    assert not (train & validation or train & test or validation & test)
    assert len(validation) > 3 < len(test)
    assert len(corpus.train) > len(train)                   # trained on as often as it occurs
    refused(lambda: split("c", [Document(n, "same") for n in "abcd"], ""),
            "'c' is too small", "no text is left for validation, expected more that differ")
    refused(lambda: split("c", [Document("a", "x\n" * 90)] * 2, ""), "expected more that differ")


def test_a_file_that_is_reached_twice_is_read_once(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 20)
        (tmp_path / f"link to {i}.txt").symlink_to(tmp_path / f"{i}.txt")
        os.link(tmp_path / f"{i}.txt", tmp_path / f"hard {i}.txt")
    corpus = local_corpus(tmp_path)
    every = [d.text for part in parts(corpus) for d in part]
    assert len(every) <= 60 and len(set(every)) == 30
    held_out = {d.text for d in corpus.validation + corpus.test}
    assert held_out and not held_out & {d.text for d in corpus.train}


def test_some_of_a_corpus_is_whole_documents_drawn_once():
    corpus = stories_corpus(2000)
    some = some_of(corpus, 50_000)
    assert 50_000 <= byte_count(some.train) < 51_000
    assert some == some_of(corpus, 50_000)
    assert (some.validation, some.test) == (corpus.validation, corpus.test)
    places = [corpus.train.index(document) for document in some.train]
    assert places == sorted(places) and min(places) < 300 and max(places) > 1500
    assert set(names(some.train)) < set(names(some_of(corpus, 100_000).train))
    assert some_of(corpus, 1e12) == corpus
    with pytest.raises(ValueError, match="text_bytes: 0, expected"):
        some_of(corpus, 0)


def test_stories_corpus():
    corpus = stories_corpus(200, seed=3)
    assert [len(part) for part in parts(corpus)] == [180, 10, 10]
    assert corpus == stories_corpus(200, seed=3) != stories_corpus(200, seed=4)
    assert len({d.text for part in parts(corpus) for d in part}) == 200
    with pytest.raises(ValueError, match="n_stories is 19"):
        stories_corpus(19)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_local_files_and_folders(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_bytes("é\r\n".encode())
    (folder / "sub" / "b.md").write_text("b")
    (folder / ".git" / "c.txt").write_text("hidden")
    (folder / "image.png").write_bytes(b"\x89\xff")
    (folder / "rows.jsonl").write_text(lines({"text": "one"}, {"text": "two"}) + "\n")
    extra = tmp_path / "extra.log"
    extra.write_text("named, so read")
    corpus = local_corpus([folder, extra, folder / "a.txt"])
    assert sum(map(len, parts(corpus))) == 5  # a.txt was given twice
    found = {d.name: d.text for part in parts(corpus) for d in part}
    assert found == {
        "a.txt": "é\r\n",
        "sub/b.md": "b",
        "rows.jsonl:1": "one",
        "rows.jsonl:2": "two",
        "extra.log": "named, so read",
    }
    assert Counter(d.text for part in parts(open_corpus(str(folder))) for d in part)["b"] == 1


def test_local_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", "cc"], "n": [1, 2, 3]}), path)
    corpus = local_corpus(path)
    assert sorted(d.name for part in parts(corpus) for d in part) == [
        f"rows.parquet:{i}" for i in (1, 2, 3)
    ]
    with pytest.raises(ValueError, match="no column 'body', expected one of .'text', 'n'."):
        local_corpus(path, field="body")
    with pytest.raises(ValueError, match="rows.parquet:1: field 'n' is int, expected a string"):
        local_corpus(path, field="n")
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="not a parquet file"):
        local_corpus(path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: .venv/bin/pip install -e '\.\[data\]'"):
        local_corpus(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (lines({"text": "a"}) + "{oops\n", r"rows.jsonl:2: not valid JSON"),
        (lines({"text": "a"}, {"body": "b"}), r"rows.jsonl:2: no field 'text'"),
        (lines(["text"]), r"rows.jsonl:1: no field 'text', expected an object"),
        (lines({"text": None}), r"rows.jsonl:1: field 'text' is NoneType, expected a string"),
        ('{"text": "\\ud83d"}', r"rows.jsonl:1: field 'text' has no UTF-8 form"),
        ("\n", r"is empty"),
        (lines({"text": "alone"}), r"has 1 document.* expected at least 3"),
    ],
)
def test_jsonl_errors(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        local_corpus(tmp_path / "rows.jsonl")
    assert "\n" not in str(caught.value)


def test_path_errors(tmp_path):
    with pytest.raises(ValueError, match="path '.*nowhere' does not exist"):
        local_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'pyhton': expected python, packages, stories, hub:NAME"):
        open_corpus("pyhton")
    refused(lambda: open_corpus(""), "corpus '': expected python, packages, stories, hub:NAME or")
    (tmp_path / "image.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="image.txt: not UTF-8"):
        local_corpus(tmp_path)


def test_what_is_left_out_of_a_folder_is_told(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.TXT").write_text(f"text {i}")
        (tmp_path / f"{i}.csv").write_text("1,2")
    (tmp_path / "ROWS.JSONL").write_text(lines({"text": "a row"}))
    (tmp_path / "._0.txt").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")     # beside 0.txt, on macOS
    (tmp_path / ".#1.txt").symlink_to("user@host.123")                      # Emacs, while it edits
    (tmp_path / "README").write_text("no suffix")
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    corpus = local_corpus(tmp_path)
    assert sorted(n for part in parts(corpus) for n in names(part)) == [
        "0.TXT", "1.TXT", "2.TXT", "3.TXT", "ROWS.JSONL:1"]
    assert corpus.origin == (f"local: {tmp_path.name} (left out: 4 .csv, 2 hidden, "
                             "1 no suffix, 1 linked folder)")


def test_a_folder_without_text_says_what_is_there(tmp_path):
    for name in ("a.csv", "b.CSV", "c.json", "d", "e.1", "e.2", "e.3"):
        (tmp_path / name).write_text("words")
    message = refused(lambda: local_corpus(tmp_path), f"corpus '{tmp_path}' is empty: found 2 .csv",
                      "1 .json, 1 no suffix, 1 .1", ", ..., expected files that end in .c .cpp ")
    assert message.endswith(".jsonl .md .parquet .py .rs .rst .tex .txt")
    (tmp_path / "empty").mkdir()
    refused(lambda: local_corpus(tmp_path / "empty"), "is empty: expected some text, found none")


def test_what_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone.txt")
    refused(lambda: local_corpus(tmp_path), "nowhere.txt: cannot be read (No such file")
    (tmp_path / "nowhere.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    refused(lambda: local_corpus(tmp_path), "pipe.txt: a pipe or a device, expected a file")
    refused(lambda: local_corpus(tmp_path / "pipe.txt"), "pipe.txt: a pipe or a device")
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    refused(lambda: local_corpus(tmp_path), "loop.txt: cannot be read (Too many levels")
    (tmp_path / "loop.txt").unlink()

    real, folder = os.scandir, tmp_path / "closed"
    folder.mkdir()

    def scandir(path):                      # the superuser, who may run this, can read everything
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(lambda: local_corpus(tmp_path), "closed: cannot be read (Permission denied)")
    folder.rmdir()

    def read_bytes(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    refused(lambda: local_corpus(tmp_path), "good.txt: cannot be read (Permission denied)")


def test_hub(monkeypatch):
    def load_dataset(name, subset, split, streaming):
        if name == "gone":
            raise FileNotFoundError("no such dataset\nlong traceback")
        assert split == "train"
        return [{"text": f"row {i} of {name}"} for i in range(50)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = open_corpus("hub:some/name")
    assert corpus.name == "hub:some/name" and sum(map(len, parts(corpus))) == 50
    assert sum(map(len, parts(hub_corpus("some/name", limit=10)))) == 10
    with pytest.raises(ValueError, match="no field 'body', expected one of .'text'."):
        hub_corpus("some/name", field="body")
    with pytest.raises(ValueError, match="'gone' cannot be loaded: no such dataset$"):
        hub_corpus("gone")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets: .venv/bin/pip install -e '\.\[data\]'"):
        open_corpus("hub:some/name")


def test_encode_marks_every_document():
    docs = [Document(str(i), f"text {i} {'é' * i}\n") for i in range(600)]
    tokenizer = train_tokenizer((d.text for d in docs), 300)
    ids = encode(docs, tokenizer)
    assert ids.dtype == np.uint16 and ids.ndim == 1
    assert (ids == tokenizer.bos).sum() == (ids == tokenizer.eos).sum() == 600
    at = 0
    for document in docs:
        own = [tokenizer.bos, *tokenizer.encode(document.text), tokenizer.eos]
        assert ids[at : at + len(own)].tolist() == own
        at += len(own)
    assert at == len(ids)
    assert [i for document in marked(docs, tokenizer) for i in document] == ids.tolist()
    assert encode([], tokenizer).shape == (0,)
    large = SimpleNamespace(vocab=2**16 + 1, bos=2**16, eos=1, encode_batch=lambda texts: [[2]])
    assert encode(docs[:1], large).tolist() == [2**16, 2, 1]
    assert encode(docs[:1], large).dtype == np.int32


def test_byte_count():
    assert byte_count([Document("a", "é🙂"), Document("b", "\r\n")]) == 2 + 4 + 2


# ------ packed batches: 103 distinct tokens, windows of 7


def packed(seed=5, batch=3, sequence=7, tokens=None):
    tokens = np.arange(103, dtype=np.uint16) if tokens is None else tokens
    return PackedBatches(tokens, batch, sequence, seed)


def epochs(batches, n):
    """First token of every window, epoch by epoch, read one window at a time."""
    starts = [[] for _ in range(n)]
    while True:
        tokens, _ = batches.next_batch(1)
        if batches.epoch == n:
            return starts
        starts[batches.epoch].append(tokens[0, 0].item())


def test_batches_are_contiguous_windows_and_next_tokens():
    batches = packed()
    for _ in range(30):
        tokens, targets = batches.next_batch()
        assert tokens.shape == targets.shape == (3, 7)
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(tokens + 1, targets)  # the array counts up
        assert torch.equal(tokens - tokens[:, :1], torch.arange(7).expand(3, 7))


def test_an_epoch_visits_every_window_of_its_phase_once():
    seen = epochs(packed(), 12)
    for starts in seen:
        phase = min(starts)
        assert 0 <= phase < 7
        assert sorted(starts) == list(range(phase, 103 - 7, 7))
        assert starts != sorted(starts)
    assert len({min(starts) for starts in seen}) > 3  # borders move
    assert len({tuple(starts) for starts in seen}) == 12
    assert epochs(packed(), 3) == seen[:3]
    assert epochs(packed(seed=6), 3) != seen[:3]


def test_the_position_counts_windows_not_batches():
    one, ramp = packed(batch=1), packed()
    single = torch.cat([one.next_batch()[0] for _ in range(60)])
    ramped = torch.cat([ramp.next_batch(b)[0] for b in (1, 2, 3, 5, 8, 13, 28)])
    assert torch.equal(single, ramped)
    assert one.state() == ramp.state()


def test_resume_is_bit_identical_everywhere_epoch_borders_included():
    source = packed(batch=4)
    states, batches = [source.state()], []
    for _ in range(40):
        batches.append(source.next_batch())
        states.append(json.loads(json.dumps(source.state())))
    assert {state["window"] for state in states} >= {0, 14}  # an epoch's first and last position
    for at, state in enumerate(states[:-3]):
        resumed = packed(batch=4)
        resumed.load(state)
        for expected in batches[at : at + 3]:
            got = resumed.next_batch()
            assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])
        assert resumed.state() == states[at + 3]


def test_resume_refuses_other_data():
    state = packed().state()
    assert all(type(value) is int for value in state.values())
    other = np.arange(103, dtype=np.uint16)
    other[50] += 1
    with pytest.raises(ValueError, match="tokens .corpus or tokenizer. changed"):
        packed(tokens=other).load(state)
    with pytest.raises(ValueError, match="tokens .corpus or tokenizer. changed"):
        packed(tokens=np.arange(102, dtype=np.uint16)).load(state)
    with pytest.raises(ValueError, match="sequence changed .* .sequence 7, now 8"):
        packed(sequence=8).load(state)
    with pytest.raises(ValueError, match="seed changed"):
        packed(seed=6).load(state)
    with pytest.raises(ValueError, match="no integer window"):
        packed().load({key: value for key, value in state.items() if key != "window"})
    with pytest.raises(ValueError, match="window is 99"):
        packed().load(state | {"window": 99})


def test_packing_errors_and_the_smallest_array():
    tokens, targets = PackedBatches(np.arange(8, dtype=np.int32), 2, 7, 0).next_batch()
    assert torch.equal(tokens, torch.arange(7).expand(2, 7))
    assert torch.equal(targets, torch.arange(1, 8).expand(2, 7))
    with pytest.raises(ValueError, match=r"7 tokens are too few, .* sequence \+ 1 = 8"):
        PackedBatches(np.arange(7), 1, 7, 0)
    for batch, sequence in ((0, 7), (1, 0)):
        with pytest.raises(ValueError, match="is 0, expected at least 1"):
            packed(batch=batch, sequence=sequence)
    with pytest.raises(ValueError, match="batch is 0"):
        packed().next_batch(0)


def test_compressors(python):
    docs = [Document("a", "abc" * 500), Document("b", "é" * 300)]
    raw = [d.text.encode() for d in docs]
    got = compressed_bits_per_byte(docs)
    total = 1500 + 600
    assert got["gzip"] == 8 * sum(len(gzip.compress(r, 9)) for r in raw) / total
    xz = lzma.compress(b"".join(raw), preset=9 | lzma.PRESET_EXTREME)
    assert got["xz_together"] == 8 * len(xz) / total
    real = compressed_bits_per_byte(python.validation)
    raw = [d.text.encode() for d in python.validation]
    preset = 9 | lzma.PRESET_EXTREME
    size = sum(len(lzma.compress(data, preset=preset)) for data in raw)
    assert real["xz"] == 8 * size / byte_count(python.validation)
    assert 1.2 < real["xz_together"] < real["xz"] < real["gzip"] < 2.6
    with pytest.raises(ValueError, match="without any text"):
        compressed_bits_per_byte([Document("a", "")])


def test_a_single_text_is_cut_into_passages(tmp_path):
    text = "".join(f"line {i}\n" for i in range(900))
    (tmp_path / "book.txt").write_text(text)
    corpus = local_corpus(tmp_path / "book.txt")
    parts = [corpus.train, corpus.validation, corpus.test]
    assert all(parts) and sum(map(len, parts)) == 30
    passages = sorted((d for part in parts for d in part), key=lambda d: text.index(d.text))
    assert "".join(d.text for d in passages) == text
    assert passages[0].name == "book.txt[1/30]"
