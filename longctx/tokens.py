"""Tokens on disk: the memory-mapped cache that a corpus is tokenised into once.

A cache is a folder named after its corpus and a fingerprint of everything it was made from (paths, sizes and times of
the files, the tokeniser, the format):

    tokens.bin       every document after the other, each with an end-of-document id; uint16, or uint32 for large vocabularies
    documents.npy    int64 [documents + 1], where each document begins, then the end of the last
    meta.json        counts, largest id, a digest of the content, notes

It is written under a lock into a temporary folder and renamed when complete, so any number of processes, on any number of
nodes that share the disk, may open the same cache at the same time: one builds it and the others wait.
"""

from __future__ import annotations

import array
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from longctx.corpus import Chunk, Corpus, find_corpus
from longctx.errors import DataError
from longctx.tokenizer import Tokenizer, id_dtype, load_tokenizer

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1


class TokenDataset:
    """A token cache opened for reading; what is not read stays on disk.

    Args:
        folder: where the cache lies.

    Attributes:
        tokens: uint16 or uint32 [num_tokens], memory-mapped.
        documents: int64 [num_documents + 1], memory-mapped; document i is tokens[documents[i]:documents[i + 1]].
        digest: of all tokens and boundaries: equal wherever the same text was tokenised in the same way.
        notes: what was unusual about the text.

    Raises:
        DataError: the folder is not a complete cache of this format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        again = f"delete {folder} and start again: it is rebuilt from the text"
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.source: str = meta["source"]
            self.tokenizer: str = meta["tokenizer"]
            self.vocab_size: int = meta["vocab_size"]
            self.end_of_document: int = meta["end_of_document"]
            self.max_token_id: int = meta["max_token_id"]
            self.num_tokens: int = meta["num_tokens"]
            self.num_documents: int = meta["num_documents"]
            self.longest_document: int = meta["longest_document"]
            self.digest: str = meta["digest"]
            self.notes: tuple[str, ...] = tuple(meta["notes"])
            dtype = np.dtype(meta["dtype"])
            size = (folder / "tokens.bin").stat().st_size
            self.documents: np.ndarray = np.load(folder / "documents.npy", mmap_mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"the token cache {folder} is damaged: {error!r}\n       {again}") from error
        if size != self.num_tokens * dtype.itemsize or len(self.documents) != self.num_documents + 1:
            raise DataError(
                f"the token cache {folder} is damaged: tokens.bin has {size:_} bytes where {self.num_tokens:_} tokens take "
                f"{self.num_tokens * dtype.itemsize:_}, documents.npy {len(self.documents) - 1:_} documents where "
                f"{self.num_documents:_} are noted\n       {again}"
            )
        self.tokens: np.ndarray = np.memmap(folder / "tokens.bin", dtype, mode="r", shape=(self.num_tokens,))

    def num_sequences(self, seq_len: int) -> int:
        """Whole sequences of `seq_len` tokens; what is left at the end, less than one sequence, is not used."""
        return self.num_tokens // seq_len

    def read(self, start: int, stop: int) -> np.ndarray:
        """tokens[start:stop], read from disk when used; shorter at the end of the stream."""
        return self.tokens[start:stop]

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """The documents' ends e with start < e <= stop: int64, ascending. O(log documents) reads."""
        first, last = np.searchsorted(self.documents, [start, stop], side="right")
        return np.asarray(self.documents[max(first, 1) : last])

    def describe(self) -> str:
        """A line or more about what was read, for people."""
        mean = self.num_tokens / self.num_documents
        lines = [
            f"{self.source}: {self.num_tokens:_} tokens ({self.tokenizer}, ids up to {self.max_token_id} of "
            f"{self.vocab_size}) in {self.num_documents:_} documents (mean {mean:_.0f}, longest {self.longest_document:_})"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def open_tokens(
    *, path: str | None, tokenizer: str, text_key: str, cache_dir: str, stall_timeout_s: float = 600
) -> TokenDataset:
    """Open the token cache of a corpus, after building it if it is not there yet.

    Cost: one pass over the text the first time; later a few file accesses, plus one stat per file of the corpus.

    Args:
        path, text_key: the corpus, see `find_corpus`.
        tokenizer: "bytes", or the path of a tokenizer.json.
        cache_dir: where caches are kept; made if need be.
        stall_timeout_s: give up waiting for another process's build when it has not written anything for so long.

    Raises:
        DataError: the text or the tokenizer cannot be read, the text is empty, the cache cannot be written, or another
            process's build has stopped.
    """
    corpus = find_corpus(path, text_key=text_key)
    encoder = load_tokenizer(tokenizer)
    identity = {"format": CACHE_FORMAT, "tokenizer": encoder.identity, **corpus.identity()}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", corpus.title)[-40:].strip("-").lower()
    folder = Path(cache_dir).expanduser() / f"{slug}-{fingerprint[:16]}"
    if not (folder / "meta.json").exists():
        try:
            _build_once(folder, partial(_build, corpus, encoder, fingerprint), stall_timeout_s)
        except OSError as error:
            raise DataError(
                f"cannot write the token cache in {cache_dir}: {error.strerror or error}\n"
                "       make room there, or choose another folder with data.cache_dir"
            ) from error
    return TokenDataset(folder)


def _build_once(folder: Path, build: Callable[[Path], None], stall_timeout_s: float) -> None:
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    # The operating system drops this lock when its holder dies, so a killed build never blocks the next one.
    lock = FileLock(f"{folder}.lock")
    written = -1
    since = told = time.monotonic()
    while not (folder / "meta.json").exists():
        try:
            lock.acquire(timeout=0.2, poll_interval=0.05)
        except Timeout:
            now, size = time.monotonic(), _bytes_being_built(folder)
            if size != written:
                written, since = size, now
            if now - since > stall_timeout_s:
                raise DataError(
                    f"another process builds the token cache {folder} and has written nothing for {stall_timeout_s:.0f} s\n"
                    f"       end that process (it holds {folder.name}.lock), or choose another data.cache_dir"
                ) from None
            if now - told > 10:
                told = now
                logger.info("waiting for another process to tokenise the text: %.0f MB so far", max(size, 0) / 1e6)
            continue
        try:
            if not folder.exists():
                _build_and_rename(folder, build)
            elif not (folder / "meta.json").exists():
                TokenDataset(folder)  # raises: it says what is missing and what to do
        finally:
            lock.release()


def _bytes_being_built(folder: Path) -> int:
    size = 0
    for file in folder.parent.glob(f"{folder.name}.building-*/*"):
        try:
            size += file.stat().st_size
        except FileNotFoundError:  # renamed since it was listed: the build is complete
            continue
    return size


def _build_and_rename(folder: Path, build: Callable[[Path], None]) -> None:
    for left in folder.parent.glob(f"{folder.name}.building-*"):
        # Left by a build that was killed. Recent ones are spared: should the lock not reach across nodes, they may be alive.
        if time.time() - max((f.stat().st_mtime for f in left.iterdir()), default=left.stat().st_mtime) > 3600:
            shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.building-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        build(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Where locks do not reach across nodes, another node may have been first: its cache is the same.
            if not (folder / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(corpus: Corpus, tokenizer: Tokenizer, fingerprint: str, folder: Path) -> None:
    from tqdm import tqdm

    started = time.monotonic()
    dtype = id_dtype(tokenizer.vocab_size)
    documents = array.array("q", [0])
    num_tokens, max_token_id = 0, 0
    digest = hashlib.blake2b(digest_size=16)
    not_utf8: list[str] = []
    with (
        (folder / "tokens.bin").open("wb", buffering=1 << 22) as out,
        tqdm(
            total=corpus.num_bytes, unit="B", unit_scale=True, desc=f"tokenising {corpus.title}", disable=None
        ) as progress,
    ):
        for piece in tokenizer.encode(_noting(corpus.chunks(), not_utf8)):
            data = piece.ids.astype(dtype, copy=False).tobytes()
            out.write(data)
            digest.update(data)
            num_tokens += len(piece.ids)
            max_token_id = max(max_token_id, int(piece.ids.max(initial=0)))
            if piece.ends:
                documents.append(num_tokens)
            progress.update(piece.consumed)
        out.flush()
        os.fsync(out.fileno())
    num_documents = len(documents) - 1
    if num_tokens == num_documents:
        raise DataError(
            f"{corpus.title} holds no text: {num_documents:_} documents, all of them empty\n       name a path with text"
        )
    starts = np.frombuffer(documents, np.int64)
    digest.update(starts.tobytes())
    np.save(folder / "documents.npy", starts)
    notes = []
    if not_utf8:
        named = ", ".join(not_utf8[:5]) + (", ..." if len(not_utf8) > 5 else "")
        notes.append(
            f"{len(not_utf8):_} of {num_documents:_} documents are not UTF-8 ({named}): {tokenizer.undecodable}"
        )
    meta = {
        **{"format": CACHE_FORMAT, "fingerprint": fingerprint, "source": corpus.title, "tokenizer": tokenizer.name},
        **{"vocab_size": tokenizer.vocab_size, "end_of_document": tokenizer.end_of_document, "dtype": dtype.name},
        **{"max_token_id": max_token_id, "num_tokens": num_tokens, "num_documents": num_documents},
        **{"longest_document": int(np.diff(starts).max()), "digest": digest.hexdigest(), "notes": notes},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    logger.info(
        "tokenised %s: %s tokens of %s bytes in %.1f s",
        *(corpus.title, f"{num_tokens:_}", f"{corpus.num_bytes:_}", time.monotonic() - started),
    )
    for note in notes:
        logger.warning("%s: %s", corpus.title, note)


def _noting(chunks: Iterable[Chunk], not_utf8: list[str]) -> Iterator[Chunk]:
    for chunk in chunks:
        if not chunk.is_utf8:
            not_utf8.append(chunk.name)
        yield chunk
