"""Texts as files of every kind, and what the token cache makes of them."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

from longctx.tokenizer import ByteTokenizer
from longctx.tokens import TokenDataset, open_tokens

EOD = ByteTokenizer.end_of_document


def opened(path, cache, *, tokenizer="bytes", text_key="text", **kw) -> TokenDataset:
    name = None if path is None else str(path)
    return open_tokens(path=name, tokenizer=str(tokenizer), text_key=text_key, cache_dir=str(cache), **kw)


def documents_of(dataset: TokenDataset) -> list[list[int]]:
    cuts = dataset.documents
    return [dataset.tokens[a:b].tolist() for a, b in itertools.pairwise(cuts)]


def as_bytes(*texts: str | bytes) -> list[list[int]]:
    return [[*(t.encode() if isinstance(t, str) else t), EOD] for t in texts]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> None:
    lines = "".join(json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(texts))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as out:
        out.write(lines)


def write_parquet(path: Path, texts: list, key: str = "text") -> None:
    import pyarrow
    import pyarrow.parquet

    # Row groups of two: the reader must cross them.
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), key: texts}), path, row_group_size=2)
