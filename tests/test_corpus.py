"""What cannot be read as text is refused, with the file, the line and what to do."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
from token_cases import opened, write_jsonl, write_parquet

from longctx.errors import DataError


def _make(kind: str, root: Path) -> Path:
    path = root / "text.txt"
    match kind:
        case "missing":
            path.write_text("there")
            return root / "texd.txt"
        case "missing_folder":
            return root / "no" / "where.txt"
        case "empty":
            path.write_bytes(b"")
        case "empty_folder":
            (root / "folder").mkdir()
            return root / "folder"
        case "empty_files":
            (root / "folder").mkdir()
            (root / "folder" / "a").touch()
            return root / "folder"
        case "empty_documents":
            path = root / "a.jsonl"
            write_jsonl(path, ["", ""])
        case "not_json":
            path = root / "a.jsonl"
            path.write_text('{"text": "a"}\n{"text": \n')
        case "not_an_object":
            path = root / "a.jsonl"
            path.write_text('["text"]\n')
        case "not_text":
            path = root / "a.jsonl"
            path.write_text('{"text": 3}\n')
        case "cut_gzip":
            path = root / "a.jsonl.gz"
            path.write_bytes(gzip.compress(b'{"text": "abcdefgh"}\n' * 100)[:-12])
        case "not_gzip":
            path = root / "a.jsonl.gz"
            path.write_text('{"text": "a"}\n')
        case "not_parquet":
            path = root / "a.parquet"
            path.write_text("PAR1 not really")
        case "parquet_null":
            path = root / "a.parquet"
            write_parquet(path, ["a", None])
        case "parquet_column":
            path = root / "a.parquet"
            write_parquet(path, ["a"], key="txt")
        case "device":
            return Path("/dev/null")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"texd\.txt' does not exist\n.*did you mean 'text\.txt'\?"),
        ("missing_folder", r"where\.txt' does not exist\n.*name a file or a folder"),
        ("empty", r"is empty: 1 files, 0 bytes\n.*name a path with text"),
        ("empty_folder", r"is a folder without files\n"),
        ("empty_files", r"is empty: 1 files, 0 bytes"),
        ("empty_documents", r"holds no text: 2 documents, all of them empty"),
        ("not_json", r"a\.jsonl:2 is not JSON: .*\n.*one object per line: \{\"text\""),
        ("not_an_object", r"a\.jsonl:1 is a JSON list, not an object"),
        ("not_text", r"a\.jsonl:1: 'text' is int, not text"),
        ("cut_gzip", r"cannot read .*a\.jsonl\.gz: "),
        ("not_gzip", r"cannot read .*a\.jsonl\.gz: Not a gzipped file"),
        ("not_parquet", r"cannot read .*a\.parquet as parquet: "),
        ("parquet_null", r"a\.parquet:2: 'text' is NoneType, not text"),
        ("parquet_column", r"a\.parquet has no column 'text': did you mean 'txt'\?"),
        ("device", r"'/dev/null' is neither a file nor a folder"),
    ],
)
def test_what_cannot_be_read_is_refused(kind, message, tmp_path):
    (tmp_path / "in").mkdir()
    path = _make(kind, tmp_path / "in")
    with pytest.raises(DataError, match=message):
        opened(path, tmp_path / "cache")
    # A build that fails leaves nothing that a later one could take for a cache.
    assert [p.name for p in (tmp_path / "cache").glob("*") if p.suffix != ".lock"] == []


def test_empty_path_is_not_the_current_folder(tmp_path):
    with pytest.raises(DataError, match=r"data\.path is an empty text"):
        opened("", tmp_path)


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    real = Path.open

    def refuse(self, *args, **kw):
        if self.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kw)

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no mode stops
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied\n.*make it readable"):
        opened(tmp_path / "a.txt", tmp_path / "cache")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'longctx\[parquet\]'"):
        opened(tmp_path / "a.parquet", tmp_path / "cache")
