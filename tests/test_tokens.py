"""Reading text, tokenising it, and the cache on disk."""

from __future__ import annotations

import gzip
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from filelock import FileLock
from token_cases import EOD, as_bytes, documents_of, opened, write_jsonl, write_parquet

from longctx import corpus as corpus_module
from longctx import tokenizer as tokenizer_module
from longctx import tokens as tokens_module
from longctx.corpus import find_corpus
from longctx.errors import DataError
from longctx.tokenizer import FileTokenizer
from longctx.tokens import TokenDataset


def word_tokenizer(path: Path, special: list[str]) -> Path:
    """A small byte-level BPE with truncation and padding set, as files of published models have them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat, and the dog sat there too"] * 4, trainer)
    made.enable_truncation(8)
    made.enable_padding(length=64)
    made.save(str(path))
    return path


TEXTS = ["first\n", "", "höhe — zwei", "x"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "folder", "folder_of_jsonl"])
def test_documents_are_what_was_written(kind, tmp_path):
    path = tmp_path / f"corpus.{kind}"
    if kind == "folder":
        # Written in another order than that of the names, and one folder deeper.
        for i in (2, 0, 3, 1):
            (path / f"d{i}").mkdir(parents=True)
            (path / f"d{i}" / "part.txt").write_bytes(TEXTS[i].encode())
    elif kind == "folder_of_jsonl":
        path.mkdir()
        write_jsonl(path / "b.jsonl", TEXTS[2:])
        write_jsonl(path / "a.jsonl.gz", TEXTS[:2])
    else:
        (write_parquet if kind == "parquet" else write_jsonl)(path, TEXTS)
    dataset = opened(path, tmp_path / "cache")
    assert documents_of(dataset) == as_bytes(*TEXTS)
    assert dataset.num_documents == 4
    assert dataset.num_tokens == sum(len(t.encode()) + 1 for t in TEXTS)
    assert dataset.max_token_id == EOD
    assert dataset.vocab_size == 257
    assert dataset.notes == ()


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.md", "README", "a.txt.gz"])
def test_a_file_is_one_document(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(b"one\ntwo") if name.endswith(".gz") else b"one\ntwo")
    assert documents_of(opened(tmp_path / name, tmp_path / "cache")) == as_bytes("one\ntwo")


def test_a_file_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_BYTES", 7)
    text = "größere Höhe " * 50  # chunks of 7 bytes cut its two-byte letters
    (tmp_path / "a.txt").write_text(text)
    dataset = opened(tmp_path / "a.txt", tmp_path / "cache")
    assert documents_of(dataset) == as_bytes(text)
    assert dataset.notes == ()


def test_hidden_files_and_caches_are_left_out(tmp_path):
    for name in (".git/config", "__pycache__/a.pyc", ".hidden.txt", "seen.txt"):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text(name)
    (tmp_path / "c" / "nowhere").symlink_to(tmp_path / "gone")
    assert documents_of(opened(tmp_path / "c", tmp_path / "cache")) == as_bytes("seen.txt")


def test_text_key(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["body"], key="content")
    assert documents_of(opened(tmp_path / "a.jsonl", tmp_path / "cache", text_key="content")) == as_bytes("body")
    with pytest.raises(DataError, match=r"a\.jsonl:1 has no 'contents': did you mean 'content'\?"):
        opened(tmp_path / "a.jsonl", tmp_path / "cache", text_key="contents")


def test_standard_library_is_the_default():
    corpus = find_corpus(None)
    names = [file.name for file in corpus.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any({"test", "site-packages", "encodings"} & set(Path(name).parts) for name in names)
    assert not any("_sysconfigdata" in name for name in names)
    assert all(name.endswith(".py") for name in names)
    assert 5e6 < corpus.num_bytes < 50e6
    assert find_corpus(None) == corpus


def test_bytes_that_are_not_utf8_train_with_a_note(tmp_path, caplog):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "bad.txt").write_bytes(b"caf\xe9 \xff")
    (tmp_path / "c" / "cut.txt").write_bytes("é".encode()[:1])  # ends inside a letter
    (tmp_path / "c" / "good.txt").write_text("café")
    with caplog.at_level(logging.WARNING):
        dataset = opened(tmp_path / "c", tmp_path / "cache")
    assert documents_of(dataset) == as_bytes(b"caf\xe9 \xff", b"\xc3", "café")
    assert "2 of 3 documents are not UTF-8 (bad.txt, cut.txt)" in caplog.text
    assert "2 of 3 documents are not UTF-8 (bad.txt, cut.txt)" in dataset.describe()


def test_jsonl_that_is_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n\n{"text": "ok"}\n{"text": "\\ud800"}\n')
    dataset = opened(tmp_path / "a.jsonl", tmp_path / "cache")
    assert documents_of(dataset) == as_bytes("caf�", "ok", "?")
    assert "2 of 3 documents are not UTF-8 (a.jsonl:1, a.jsonl:4)" in dataset.notes[0]


def test_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot write the token cache in .*\n.*data\.cache_dir"):
        opened(tmp_path / "a.txt", tmp_path / "cache")


@pytest.mark.parametrize("special", ["<|endoftext|>", "</s>", "none_of_the_names"])
def test_tokenizer_file(special, tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", [special])
    texts = ["the cat sat on the mat, and the dog sat there too" * 3, "", "<|endoftext|> is text here </s>"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    dataset = opened(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer=path)
    library = tokenizers.Tokenizer.from_file(str(path))
    is_named = special != "none_of_the_names"
    end = library.token_to_id(special) if is_named else library.get_vocab_size()
    assert dataset.end_of_document == end
    assert dataset.vocab_size == library.get_vocab_size() + (not is_named)
    for got, text in zip(documents_of(dataset), texts, strict=True):
        # Not truncated to 8, not padded to 64; one end, at the end: a text cannot forge it.
        assert got[-1] == end
        assert end not in got[:-1]
        assert library.decode(got[:-1], skip_special_tokens=False) == text
    assert len(documents_of(dataset)[0]) < len(texts[0]) / 2
    assert dataset.max_token_id == int(dataset.tokens.max())


def test_tokenizer_folder_is_taken_for_its_file(tmp_path):
    word_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    assert FileTokenizer(str(tmp_path)).identity == FileTokenizer(str(tmp_path / "tokenizer.json")).identity


def test_tokenizer_replaces_what_is_not_utf8(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 cat")
    dataset = opened(tmp_path / "a.txt", tmp_path / "cache", tokenizer=path)
    assert tokenizers.Tokenizer.from_file(str(path)).decode(dataset.tokens[:-1].tolist()) == "caf� cat"
    assert "(a.txt): the bytes that cannot be decoded were replaced" in dataset.notes[0]


@pytest.mark.parametrize(
    "text", ["höher und weiter\n" * 40, "höher und weiter " * 40, "h" * 800], ids=["lines", "words", "one"]
)
def test_long_document_is_tokenised_in_pieces(text, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_BYTES", 10)
    monkeypatch.setattr(tokenizer_module, "CHUNK_BYTES", 100)
    path = word_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    (tmp_path / "a.txt").write_text(text)
    pieces = []
    real = FileTokenizer._encode_batch

    def spy(self, batch):
        pieces.extend(piece for piece, _, _ in batch)
        return real(self, batch)

    monkeypatch.setattr(FileTokenizer, "_encode_batch", spy)
    dataset = opened(tmp_path / "a.txt", tmp_path / "cache", tokenizer=path)
    assert dataset.num_documents == 1
    assert tokenizers.Tokenizer.from_file(str(path)).decode(dataset.tokens[:-1].tolist()) == text
    assert len(pieces) > 4
    assert max(map(len, pieces)) < 120


def test_large_vocabulary_takes_four_bytes(tmp_path):
    vocab = {f"w{i}": i for i in range(70_000)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("w5 w69999 w65536")
    dataset = opened(tmp_path / "a.txt", tmp_path / "cache", tokenizer=tmp_path / "t.json")
    assert dataset.tokens.dtype == np.uint32
    assert dataset.tokens.tolist() == [5, 69_999, 65_536, 70_000]
    assert dataset.vocab_size == 70_001


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), (b"{}", "is not a tokenizer.json")])
def test_bad_tokenizer_is_refused(content, message, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.txt", tmp_path / "cache", tokenizer=tmp_path / "tokenizer.json")


def test_cache_is_built_once_and_again_when_the_text_changes(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    builds = []
    real = tokens_module._build
    monkeypatch.setattr(tokens_module, "_build", lambda *args: (builds.append(1), real(*args)))
    first = opened(tmp_path / "a.txt", tmp_path / "cache")
    again = opened(tmp_path / "a.txt", tmp_path / "cache")
    assert (len(builds), again.digest) == (1, first.digest)
    (tmp_path / "a.txt").write_text("other text")
    changed = opened(tmp_path / "a.txt", tmp_path / "cache")
    assert len(builds) == 2
    assert documents_of(changed) == as_bytes("other text")
    assert changed.digest != first.digest
    opened(tmp_path / "a.txt", tmp_path / "cache", tokenizer=word_tokenizer(tmp_path / "t.json", ["</s>"]))
    assert len(builds) == 3


def test_digest_is_of_the_content(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text("the same")
    one, two = (opened(tmp_path / name, tmp_path / "cache") for name in ("one", "two"))
    assert one.folder != two.folder
    assert one.digest == two.digest
    # The same tokens with another boundary are not the same text.
    write_jsonl(tmp_path / "a.jsonl", ["ab", "c"])
    write_jsonl(tmp_path / "b.jsonl", ["a", "bc"])
    a, b = (opened(tmp_path / name, tmp_path / "cache") for name in ("a.jsonl", "b.jsonl"))
    assert a.digest != b.digest


@pytest.mark.parametrize("damage", ["tokens_cut", "no_documents", "meta_cut", "no_meta"])
def test_damaged_cache_is_refused(damage, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    folder = opened(tmp_path / "a.txt", tmp_path / "cache").folder
    if damage == "tokens_cut":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    elif damage == "no_documents":
        (folder / "documents.npy").unlink()
    elif damage == "meta_cut":
        (folder / "meta.json").write_text((folder / "meta.json").read_text()[:40])
    else:
        (folder / "meta.json").unlink()
    with pytest.raises(
        DataError, match=rf"token cache .*{folder.name} is damaged(.|\n)*delete .*{folder.name} and start"
    ):
        opened(tmp_path / "a.txt", tmp_path / "cache")


def test_processes_that_open_at_once_build_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(20_000)])
    # Started early by sleeping until one moment, so that all find no cache; a build takes much longer than the spread.
    code = (
        "import sys, time, logging\n"
        "from longctx.tokens import open_tokens\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s')\n"
        "time.sleep(max(0, float(sys.argv[3]) - time.time()))\n"
        "d = open_tokens(path=sys.argv[1], tokenizer='bytes', text_key='text', cache_dir=sys.argv[2])\n"
        "print('opened', d.num_documents, d.digest)\n"
    )
    at = str(time.time() + 2)
    args = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), at]
    ranks = [subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    outs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, outs
    assert sum("tokenised" in out for out, _ in outs) == 1
    opened_lines = {line for out, _ in outs for line in out.splitlines() if line.startswith("opened")}
    assert len(opened_lines) == 1
    assert opened_lines.pop().startswith("opened 20000 ")
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_waiting_for_a_build_that_stopped_ends(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    cache = tmp_path / "cache"
    folder = opened(tmp_path / "a.txt", cache).folder
    folder.rename(tmp_path / "elsewhere")
    with FileLock(f"{folder}.lock"), pytest.raises(DataError, match=r"written nothing for 0 s\n.*holds .*\.lock"):
        opened(tmp_path / "a.txt", cache, stall_timeout_s=0.3)


def test_leftovers_of_a_killed_build_do_not_matter(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    cache = tmp_path / "cache"
    folder = opened(tmp_path / "a.txt", cache).folder
    folder.rename(tmp_path / "elsewhere")
    old, young = (cache / f"{folder.name}.building-other-{i}" for i in (1, 2))
    for left in (old, young):
        left.mkdir()
        (left / "tokens.bin").write_bytes(b"half")
    os.utime(old / "tokens.bin", (0, 0))
    assert documents_of(opened(tmp_path / "a.txt", cache)) == as_bytes("text")
    assert not old.exists()
    assert young.exists()  # it may be alive on another node


def test_the_other_node_was_first(tmp_path, monkeypatch):
    """Without locks across nodes two builds may run; the one that comes second takes the first one's cache."""
    (tmp_path / "a.txt").write_text("text")
    real = tokens_module._build

    def build(corpus, tokenizer, fingerprint, folder):
        real(corpus, tokenizer, fingerprint, folder)
        first = folder.with_name(folder.name.split(".building-")[0])
        first.mkdir()
        for file in folder.iterdir():
            (first / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(tokens_module, "_build", build)
    dataset = opened(tmp_path / "a.txt", tmp_path / "cache")
    assert documents_of(dataset) == as_bytes("text")
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [dataset.folder.name]


def test_document_ends():
    dataset = TokenDataset.__new__(TokenDataset)
    dataset.documents = np.array([0, 3, 4, 9])
    ends = {(a, b): dataset.document_ends(a, b).tolist() for a in range(9) for b in range(a, 10)}
    assert ends == {(a, b): [e for e in (3, 4, 9) if a < e <= b] for a, b in ends}
