"""Where the text comes from: files, folders, .jsonl and .parquet, read as a stream of byte chunks.

A corpus is an ordered list of files; what a file's documents are depends on its name alone:

| name                    | documents                                                      |
|-------------------------|----------------------------------------------------------------|
| `*.jsonl`, `*.jsonl.gz` | one per line: the string under `text_key` of a JSON object     |
| `*.parquet`             | one per row: the string in the column `text_key`               |
| anything else (`.gz` too) | the whole file                                               |

Nothing here holds more than one chunk, or one record of a .jsonl or .parquet file, in memory.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from longctx.errors import DataError, did_you_mean

CHUNK_BYTES = 1 << 20

# Not read of the standard library: what is not there, or not the same, on every machine (distributions leave the tests
# out, site-packages is whatever was installed, _sysconfigdata is how this Python was built), and tables of character codes,
# a tenth of the bytes, which are no text.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})
_NOT_STDLIB_PREFIX = "_sysconfigdata"


class Chunk(NamedTuple):
    """A piece of one document.

    Args:
        data: its bytes.
        ends: whether the document ends with this chunk.
        consumed: bytes of the source file that were read for it (compressed ones, where the file is compressed).
        name: the document, for messages: a file, or a file and line.
        is_utf8: False where the source turned out not to be UTF-8 in this chunk.
    """

    data: bytes
    ends: bool
    consumed: int
    name: str
    is_utf8: bool = True


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus; `name` is its path relative to the corpus, with forward slashes: the sort key."""

    path: Path
    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Corpus:
    """An ordered list of files with text.

    Args:
        title: what it is, for messages.
        files: in reading order.
        text_key: where a .jsonl or .parquet record keeps its text.
    """

    title: str
    files: tuple[SourceFile, ...]
    text_key: str

    @property
    def num_bytes(self) -> int:
        """Size of the files, compressed ones as they lie on disk."""
        return sum(file.size for file in self.files)

    def identity(self) -> dict[str, Any]:
        """What decides whether a cache made of this corpus is still good, JSON-able."""
        return {
            "text_key": self.text_key,
            "files": [[str(file.path.absolute()), file.size, file.mtime_ns] for file in self.files],
        }

    def chunks(self) -> Iterator[Chunk]:
        """Every document, in order, as chunks; an empty document is one chunk without bytes.

        Raises:
            DataError: a file cannot be read, or a record has no text; names the file and the line or row.
        """
        for file in self.files:
            kind = _kind(file.path)
            try:
                if kind == "jsonl":
                    yield from _jsonl_chunks(file, self.text_key)
                elif kind == "parquet":
                    yield from _parquet_chunks(file, self.text_key)
                else:
                    yield from _text_chunks(file)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(
                    f"cannot read {file.path}: {_reason(error)}\n"
                    "       make it readable and whole, or leave it out of data.path"
                ) from error


def find_corpus(path: str | None, *, text_key: str = "text", setting: str = "data.path") -> Corpus:
    """The corpus at `path`.

    Args:
        path: a file; a folder, taken recursively in the order of the relative paths, without hidden files, hidden folders,
            `__pycache__`, and without following links to folders; None: the source text of Python's standard library
            without its tests (10 to 15 MB, on every machine that runs this).
        text_key: see `Corpus`.
        setting: the name that errors call `path` by.

    Raises:
        DataError: nothing there, no file there, or only files without a single byte.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        title = "Python's standard library"
        files = [
            f
            for f in _walk(root, setting, skip=_NOT_STDLIB)
            if f.name.endswith(".py") and not f.name.startswith(_NOT_STDLIB_PREFIX)
        ]
        if not files:
            raise DataError(f"{title} has no source files in {root}\n       name a text with data.path")
    else:
        if not path.strip():
            raise DataError(
                f"{setting} is an empty text\n"
                "       name a file or a folder, or leave it out for Python's standard library"
            )
        root = Path(path).expanduser()
        title = str(path)
        if root.is_dir():
            files = _walk(root, setting)
            if not files:
                raise DataError(
                    f"{setting} = {path!r} is a folder without files\n"
                    "       hidden files and __pycache__ are not read; put the text there, or name another path"
                )
        else:
            files = [_source_file(root, root.name, path, setting)]
    if not any(file.size for file in files):
        raise DataError(f"{setting} = {path!r} is empty: {len(files)} files, 0 bytes\n       name a path with text")
    return Corpus(title, tuple(files), text_key)


def _source_file(path: Path, name: str, given: str, setting: str) -> SourceFile:
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        hint = "name a file or a folder, or leave it out for Python's standard library"
        if path.parent.is_dir():
            siblings = sorted(os.listdir(path.parent))[:1000]
            guess = did_you_mean(path.name, siblings)
            if guess.startswith("did you mean"):
                hint = f"in {path.parent.absolute()}: {guess}"
        raise DataError(f"{setting} = {given!r} does not exist\n       {hint}") from error
    except OSError as error:
        raise DataError(f"{setting} = {given!r} cannot be read: {_reason(error)}") from error
    if not path.is_file():
        raise DataError(f"{setting} = {given!r} is neither a file nor a folder\n       name a file or a folder")
    return SourceFile(path, name, stat.st_size, stat.st_mtime_ns)


def _walk(root: Path, setting: str, skip: frozenset[str] = frozenset()) -> list[SourceFile]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {_reason(error)}\n       make the folder readable") from error

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__" and f not in skip]
        for name in names:
            path = Path(folder, name)
            # is_file: a link that leads nowhere, a socket and a pipe are not text.
            if not name.startswith(".") and path.is_file():
                found.append(_source_file(path, path.relative_to(root).as_posix(), str(path), setting))
    return sorted(found, key=lambda file: file.name)


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1].removeprefix(".") if suffixes else ""


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


class _Reader:
    """A file opened for reading bytes, unpacked if it ends in .gz; `consumed()` counts the bytes read from disk."""

    def __init__(self, path: Path) -> None:
        self._raw = path.open("rb")
        is_packed = path.suffix.lower() == ".gz"
        self.stream: IO[bytes] = gzip.GzipFile(fileobj=self._raw) if is_packed else self._raw  # type: ignore[assignment]
        self._last = 0

    def consumed(self) -> int:
        before, self._last = self._last, self._raw.tell()
        return self._last - before

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self._raw.close()


def _text_chunks(file: SourceFile) -> Iterator[Chunk]:
    # Strict, and only looked at for its verdict: the bytes go on as they are.
    check = codecs.getincrementaldecoder("utf-8")()
    is_checked = True
    read = 0
    with _Reader(file.path) as reader:
        while True:
            data = reader.stream.read(CHUNK_BYTES)
            is_utf8 = True
            if (at := data.find(b"\0")) >= 0:
                raise DataError(
                    f"{file.path} is no text: byte {read + at:_} is NUL\n"
                    "       give text or .jsonl, also as .gz, or .parquet; tokens that are already numbers are not read"
                )
            read += len(data)
            if is_checked:
                try:
                    check.decode(data, final=not data)
                except UnicodeDecodeError:
                    is_utf8 = is_checked = False
            yield Chunk(data, not data, reader.consumed(), file.name, is_utf8)
            if not data:
                return


def _jsonl_chunks(file: SourceFile, text_key: str) -> Iterator[Chunk]:
    with _Reader(file.path) as reader:
        for number, line in enumerate(reader.stream, 1):
            if not line.strip():
                continue
            name = f"{file.name}:{number}"
            is_utf8 = True
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                text, is_utf8 = line.decode("utf-8", "replace"), False
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{file.path}:{number} is not JSON: {error}\n"
                    f'       a .jsonl file holds one object per line: {{"{text_key}": "..."}}'
                ) from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{file.path}:{number} is a JSON {type(record).__name__}, not an object\n"
                    f'       a .jsonl file holds one object per line: {{"{text_key}": "..."}}'
                )
            yield _record_chunk(record, text_key, file, number, name, reader.consumed(), is_utf8)


def _record_chunk(
    record: dict[str, Any], text_key: str, file: SourceFile, number: int, name: str, consumed: int, is_utf8: bool
) -> Chunk:
    if text_key not in record:
        raise DataError(
            f"{file.path}:{number} has no {text_key!r}: {did_you_mean(text_key, record)}\n"
            "       say where the text is with data.text_key"
        )
    text = record[text_key]
    if isinstance(text, bytes):
        return Chunk(text, True, consumed, name, is_utf8 and _is_utf8(text))
    if not isinstance(text, str):
        raise DataError(
            f"{file.path}:{number}: {text_key!r} is {type(text).__name__}, not text\n"
            "       correct or remove the record, or name another data.text_key"
        )
    try:
        return Chunk(text.encode(), True, consumed, name, is_utf8)
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair (\ud800), which no UTF-8 can.
        return Chunk(text.encode("utf-8", "replace"), True, consumed, name, False)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _parquet_chunks(file: SourceFile, text_key: str) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{file.path} is a .parquet file, and pyarrow is not installed\n       pip install 'longctx[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                raise DataError(
                    f"{file.path} has no column {text_key!r}: {did_you_mean(text_key, columns)}\n"
                    "       say where the text is with data.text_key"
                )
            num_rows = max(1, table.metadata.num_rows)
            number = 0
            for batch in table.iter_batches(batch_size=128, columns=[text_key]):
                for text in batch.column(0):
                    # Rows carry no file offset: the file's bytes are spread evenly over them.
                    consumed = file.size * (number + 1) // num_rows - file.size * number // num_rows
                    number += 1
                    record = {text_key: text.as_py()}
                    yield _record_chunk(record, text_key, file, number, f"{file.name}:{number}", consumed, True)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"cannot read {file.path} as parquet: {error}\n       make it whole, or leave it out"
        ) from error
