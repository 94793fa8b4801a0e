"""Tokenisers: text in, ids of documents out. Bytes, or any `tokenizer.json`."""

from __future__ import annotations

import codecs
import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from longctx.corpus import CHUNK_BYTES, Chunk
from longctx.errors import DataError

logger = logging.getLogger(__name__)

# Names of the special token that ends a document, the most specific first.
_END_OF_DOCUMENT = (
    *("<|end_of_text|>", "<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>"),
    *("<eos>", "<|eos|>", "<EOS>", "[EOS]"),
)


class Encoded(NamedTuple):
    """Token ids of a piece of a document; where `ends`, the last one is the end-of-document id."""

    ids: np.ndarray
    ends: bool
    consumed: int


class Tokenizer(Protocol):
    """Turns chunks of bytes into token ids.

    `vocab_size` is one more than the largest id it can make, `end_of_document` included. `identity` decides whether a
    cache is still good. `undecodable` says what becomes of bytes that are not UTF-8.
    """

    name: str
    vocab_size: int
    end_of_document: int
    identity: str
    undecodable: str

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[Encoded]: ...


class ByteTokenizer:
    """One token per byte: ids 0 to 255 are the bytes, 256 ends a document, so 257 ids.

    A model's `vocab_size` may be larger; 264, the next multiple of 8, suits the matrix units of a GPU. The ids in between
    never occur as targets and cost a row of the embedding each.
    """

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    identity = "bytes"
    undecodable = "their bytes are trained on as they are"

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[Encoded]:
        for chunk in chunks:
            ids = np.frombuffer(chunk.data, np.uint8).astype(np.uint16)
            if chunk.ends:
                ids = np.append(ids, np.uint16(self.end_of_document))
            yield Encoded(ids, chunk.ends, chunk.consumed)


class FileTokenizer:
    """A `tokenizer.json` of the `tokenizers` library.

    No token is added at the start of a document. The end-of-document id is that of the tokenizer's own special token
    where one has a name that says so (`<|end_of_text|>`, `<|endoftext|>`, `</s>`, `<eos>`, ...); else it is a new id after
    the largest, and the model needs one more row. Text that spells a special token stays text. Bytes that are not UTF-8
    become U+FFFD. A document longer than 1 MiB is tokenised in pieces cut after a line break (or a space, or anywhere,
    where there is none), so memory does not grow with its length and tokens differ at the cuts at most.

    Args:
        path: the file, or a folder that holds `tokenizer.json`.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """

    undecodable = "the bytes that cannot be decoded were replaced by U+FFFD"

    def __init__(self, path: str) -> None:
        import tokenizers

        file = Path(path).expanduser()
        what = "is a folder without a tokenizer.json" if file.is_dir() else "does not exist"
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise DataError(
                f"data.tokenizer = {path!r} {what}\n"
                "       'bytes' needs no file; else name a tokenizer.json, or a folder with one. Nothing is downloaded: "
                "`hf download NAME tokenizer.json` does that"
            )
        try:
            content = file.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except OSError as error:
            raise DataError(f"data.tokenizer = {path!r} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise DataError(
                f"data.tokenizer = {path!r} is not a tokenizer.json of the `tokenizers` library: {error}\n"
                "       save one with tokenizer.save('tokenizer.json'); a sentencepiece model has to be converted first"
            ) from error
        # What a tokenizer.json says about one model input does not hold for documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

        self.name = file.name if file.name != "tokenizer.json" else f"{file.absolute().parent.name}/{file.name}"
        self.identity = hashlib.sha256(content).hexdigest()
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        special = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        named = [special[name] for name in _END_OF_DOCUMENT if name in special]
        self.end_of_document = named[0] if named else largest + 1
        self.vocab_size = max(largest, self.end_of_document) + 1
        self._dtype = id_dtype(self.vocab_size)

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[Encoded]:
        # Pieces are handed over several at a time because the library spreads a batch over threads.
        batch: list[tuple[str, bool, int]] = []
        size = 0
        for piece in self._pieces(chunks):
            batch.append(piece)
            size += len(piece[0])
            if size >= 8 * CHUNK_BYTES or len(batch) >= 4096:
                yield from self._encode_batch(batch)
                batch, size = [], 0
        yield from self._encode_batch(batch)

    def _pieces(self, chunks: Iterable[Chunk]) -> Iterator[tuple[str, bool, int]]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, consumed = "", 0
        for chunk in chunks:
            text += decoder.decode(chunk.data, final=chunk.ends)
            consumed += chunk.consumed
            if chunk.ends:
                yield text, True, consumed
                text, consumed = "", 0
                decoder.reset()
            elif len(text) >= CHUNK_BYTES:
                cut = text.rfind("\n") + 1 or text.rfind(" ") or len(text)
                cut = cut if cut > 0 else len(text)
                yield text[:cut], False, consumed
                text, consumed = text[cut:], 0

    def _encode_batch(self, batch: list[tuple[str, bool, int]]) -> Iterator[Encoded]:
        encodings = self._tokenizer.encode_batch_fast([text for text, _, _ in batch], add_special_tokens=False)
        for (text, ends, consumed), encoding in zip(batch, encodings, strict=True):
            ids = encoding.ids if text else []
            yield Encoded(np.array([*ids, self.end_of_document] if ends else ids, self._dtype), ends, consumed)


def load_tokenizer(name: str) -> Tokenizer:
    """`"bytes"`, or the tokenizer.json at that path.

    Raises:
        DataError: there is no such file, or it is not a tokenizer.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest of the cache's types that holds the ids of such a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
