"""From a token cache to the batches of one rank: packing, document masks, labels, sharding, and the sample cursor.

Packing: the documents of a corpus stand one after the other, each with its end-of-document token, and sample i is the
`seq_len` tokens from i * seq_len on. Nothing is padded; less than one sequence is left over at the end and not used.

    stream      a a a a $ b b $ c c c c c c $ ...          $ ends a document
    sample 0    a a a a $ b                                 seq_len 6, boundaries (0, 5, 6)
    labels      a a a $ - b                                 mask_documents: - is no target (-100)
    labels      a a a $ b b                                 without

Order: the sample cursor counts samples since the start of training. Sample n of the training is sample n % N of the
permutation of epoch n // N, drawn from (seed, epoch), N being the number of samples. So a cursor alone says what comes
next, for any number of ranks: a run resumed at other degrees goes on with the same samples in the same order.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch

from longctx.corpus import find_corpus
from longctx.errors import DataError, Problem
from longctx.layout import SequenceLayout
from longctx.masks import AttentionMask, Causal, Documents, Full, SlidingWindow
from longctx.sequence import SequenceMeta
from longctx.shapes import NO_TARGET
from longctx.tokenizer import load_tokenizer
from longctx.tokens import TokenDataset, open_tokens

# The token at positions that only fill up a shard.
PADDING_TOKEN = 0

# Runs of positions closer together than this are read as one slice: 4 KiB, the page that the disk gives anyway, of uint16.
_READ_GAP = 2048


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how it is cut into sequences.

    Args:
        path: a text file, a folder of them, .jsonl(.gz), .parquet; None: the source text of Python's standard library.
        eval_path: text of the same kinds that is not trained on, for the loss on it; None: none is measured.
        tokenizer: "bytes" (257 ids), or the path of a tokenizer.json.
        text_key: where a .jsonl or .parquet record keeps its text.
        seq_len: tokens of one sequence, over all ranks.
        mask_documents: attention stays within a document, and the end of a document predicts nothing. Without it,
            documents are one causal stream.
        shuffle: every epoch in another order; without it, the order of the text.
        seed: decides the orders.
        cache_dir: where tokenised text is kept.
    """

    path: str | None = None
    eval_path: str | None = None
    tokenizer: str = "bytes"
    text_key: str = "text"
    seq_len: int = 4096
    mask_documents: bool = True
    shuffle: bool = True
    seed: int = 0
    cache_dir: str = ".cache/longctx"

    def problems(self) -> list[Problem]:
        """What can be said without tokenising: numbers out of range, a text or tokenizer that is not there."""
        found = []
        if self.seq_len < 2:
            found.append(
                Problem(f"data.seq_len = {self.seq_len}: a sequence has at least 2 tokens", "try data.seq_len = 4096")
            )
        if not 0 <= self.seed < 1 << 64:
            found.append(Problem(f"data.seed = {self.seed} does not fit 64 bits", "use 0 or a positive number"))
        looks = [lambda: find_corpus(self.path, text_key=self.text_key), lambda: load_tokenizer(self.tokenizer)]
        if self.eval_path is not None:
            looks.append(lambda: find_corpus(self.eval_path, text_key=self.text_key, setting="data.eval_path"))
        for look in looks:
            try:
                look()
            except DataError as error:
                what, _, hint = str(error).partition("\n")
                found.append(Problem(what, hint.strip()))
        return found


@dataclass(frozen=True)
class ShardedBatch:
    """One micro-batch of one rank.

    Args:
        tokens: int64 [b, s]; 0 at padding.
        labels: int64 [b, s], the token after each one; -100 where there is no target, as at padding.
        meta: positions, mask and layout.
        num_target_tokens: targets in the whole optimizer step: all data-parallel ranks, all of each sequence, all micro-batches.
        cursor: the sample cursor at the start of the step.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    meta: SequenceMeta
    num_target_tokens: int
    cursor: int


def open_dataset(config: DataConfig) -> TokenDataset:
    """The token cache of `config`'s text, built first if need be (see `open_tokens`). Any number of processes may ask.

    Raises:
        DataError: the text cannot be read, is empty, or is shorter than one sequence.
    """
    dataset = open_tokens(
        path=config.path, tokenizer=config.tokenizer, text_key=config.text_key, cache_dir=config.cache_dir
    )
    _check_length(dataset, config.seq_len)
    return dataset


def _check_length(dataset: TokenDataset, seq_len: int) -> None:
    if dataset.num_sequences(seq_len) < 1:
        raise DataError(
            f"{dataset.source} has {dataset.num_tokens:_} tokens, less than one sequence of data.seq_len = {seq_len:_}\n"
            f"       give more text, or a data.seq_len of at most {dataset.num_tokens:_}"
        )


def check_vocab(dataset: TokenDataset, vocab_size: int) -> list[Problem]:
    """The problem, if there is one, with training a model of `vocab_size` ids on `dataset`."""
    if dataset.max_token_id < vocab_size:
        return []
    # A multiple of 64 keeps the output layer's matrix products on full tiles.
    rounded = -(-dataset.vocab_size // 64) * 64
    return [
        Problem(
            f"{dataset.source} tokenised with {dataset.tokenizer} has ids up to {dataset.max_token_id:_}, "
            f"but model.vocab_size = {vocab_size:_} ends at {vocab_size - 1:_}",
            f"set model.vocab_size to {dataset.vocab_size:_} or more ({rounded:_} is a multiple of 64)",
        )
    ]


class ShardedLoader:
    """The batches of one rank, as a function of the sample cursor alone.

    Every data-parallel rank takes its own samples; the ring and Ulysses ranks of one data-parallel rank take the same
    samples and, of each, the tokens at their own positions (`SequenceMeta`) only. Micro-batch m of data-parallel rank d holds the samples from
    `cursor + (m * dp_world + d) * micro_batch_size` on. Targets are counted from the documents' boundaries, so all ranks
    know the number for the whole step without reading one another's tokens and without a collective.

    Memory: one step's shard twice (this one and the next, which a thread reads meanwhile), and an epoch's permutation.

    Args:
        dataset: what to read.
        seq_len: global sequence length, any; what the ranks cannot share evenly is padded (`SequenceMeta`).
        micro_batch_size: sequences per micro-batch and data-parallel rank.
        accumulation_steps: micro-batches per optimizer step.
        dp_rank, dp_world: place among the data-parallel ranks.
        layout, ring_rank, ring_world, ulysses_rank, ulysses_world: which tokens of a sequence are this rank's. A layout that
            fits masks is fitted to those of each micro-batch.
        local_multiple: what this rank's tokens are padded to a multiple of.
        sliding_window: the model's, which such a layout takes into account.
        seed, shuffle: the order of the samples.
        mask_documents: see `DataConfig`.
        device: where the tensors go.
        prefetch: read the step after the one asked for in a thread.

    Raises:
        DataError: the dataset is shorter than one sequence.
        PlanError: there is no such rank.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        micro_batch_size: int,
        accumulation_steps: int,
        dp_rank: int,
        dp_world: int,
        layout: SequenceLayout,
        ring_rank: int = 0,
        ring_world: int = 1,
        ulysses_rank: int = 0,
        ulysses_world: int = 1,
        local_multiple: int = 1,
        sliding_window: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        mask_documents: bool = True,
        device: torch.device | str = "cpu",
        prefetch: bool = True,
    ) -> None:
        _check_length(dataset, seq_len)
        if min(micro_batch_size, accumulation_steps) < 1:
            raise DataError(
                f"a step of {accumulation_steps} micro-batches of {micro_batch_size} sequences is empty\n"
                "       both are at least 1"
            )
        if not 0 <= dp_rank < dp_world:
            raise DataError(f"data-parallel rank {dp_rank} is not one of {dp_world}")
        self.dataset = dataset
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.accumulation_steps = accumulation_steps
        self.dp_rank, self.dp_world = dp_rank, dp_world
        self.seed, self.shuffle, self.mask_documents = seed, shuffle, mask_documents
        self.device = torch.device(device)
        self.num_samples = dataset.num_sequences(seq_len)
        self.layout = layout
        self._window = SlidingWindow(sliding_window) if sliding_window is not None else Full()
        self._meta_of = partial(
            SequenceMeta.of,
            seq_len,
            ring_rank=ring_rank,
            ring_world=ring_world,
            ulysses_rank=ulysses_rank,
            ulysses_world=ulysses_world,
            local_multiple=local_multiple,
        )
        # Refuses ranks that are none.
        self._meta_of()
        self._moved: tuple[torch.Tensor, torch.Tensor] | None = None
        # One worker: steps are prepared one at a time, in the order asked for, and what it remembers needs no lock.
        self._worker = ThreadPoolExecutor(1, "longctx-data") if prefetch else None
        self._ahead: tuple[int, Future[_HostStep]] | None = None
        self._order = lru_cache(maxsize=2)(self._permutation)

    @property
    def samples_per_step(self) -> int:
        """Sequences in one optimizer step, over all data-parallel ranks and micro-batches."""
        return self.dp_world * self.micro_batch_size * self.accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step, over all ranks."""
        return self.samples_per_step * self.seq_len

    @property
    def order(self) -> str:
        """What decides which text a cursor stands for, as text; equal where the same cursor reads the same tokens."""
        shuffled = f"shuffled by seed {self.seed}" if self.shuffle else "in order"
        return f"text {self.dataset.digest}, sequences of {self.seq_len}, {shuffled}"

    def sample_index(self, cursor: int) -> int:
        """Which sample of the dataset is the `cursor`-th of the training."""
        epoch, place = divmod(cursor, self.num_samples)
        return int(self._order(epoch)[place]) if self.shuffle else place

    def step(self, cursor: int) -> list[ShardedBatch]:
        """This rank's micro-batches of the optimizer step that begins at `cursor`, on the device.

        The next cursor is `cursor + samples_per_step`.

        Raises:
            DataError: the cursor is negative.
        """
        if cursor < 0:
            raise DataError(f"sample cursor {cursor} is negative; training starts at 0")
        if self._worker is None:
            host = self._read_step(cursor)
        else:
            ahead, self._ahead = self._ahead, None
            if ahead is not None and ahead[0] == cursor:
                host = ahead[1].result()
            else:
                if ahead is not None:
                    ahead[1].cancel()
                host = self._worker.submit(self._read_step, cursor).result()
            following = cursor + self.samples_per_step
            self._ahead = (following, self._worker.submit(self._read_step, following))
        return [
            ShardedBatch(
                tokens=self._to_device(tokens),
                labels=self._to_device(labels),
                meta=self._on_device(meta),
                num_target_tokens=host.num_target_tokens,
                cursor=cursor,
            )
            for tokens, labels, meta in host.micro_batches
        ]

    def _meta(self, mask: AttentionMask) -> SequenceMeta:
        """Where this rank's tokens of a micro-batch with that mask stand; on the CPU."""
        # Fitted to what the model will attend with, which is less than the documents show.
        return replace(self._meta_of(mask=mask & self._window, layout=self.layout), mask=mask)

    def _on_device(self, meta: SequenceMeta) -> SequenceMeta:
        if self._moved is None or not torch.equal(self._moved[0], meta.positions):
            # Mostly the same in every batch: on the device once.
            self._moved = (meta.positions, meta.to(self.device).positions)
        return replace(meta, positions=self._moved[1])

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        # Pinned here and not in the thread, whose current device would be GPU 0 on every rank.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _read_step(self, cursor: int) -> _HostStep:
        micro_batches = []
        for m in range(self.accumulation_steps):
            first = cursor + (m * self.dp_world + self.dp_rank) * self.micro_batch_size
            micro_batches.append(self._read_micro_batch(range(first, first + self.micro_batch_size)))
        targets = sum(self._num_targets(self.sample_index(n)) for n in range(cursor, cursor + self.samples_per_step))
        return _HostStep(micro_batches, targets)

    def _read_micro_batch(self, cursors: range) -> tuple[np.ndarray, np.ndarray, SequenceMeta]:
        starts = [self.sample_index(cursor) * self.seq_len for cursor in cursors]
        ends = [self.dataset.document_ends(start, start + self.seq_len) - start for start in starts]
        meta = self._meta(self._mask(ends))
        positions = meta.positions.numpy()
        # Padding stands at the end.
        positions = positions[: np.searchsorted(positions, self.seq_len)]
        tokens = np.full((len(cursors), meta.local_len), PADDING_TOKEN, np.int64)
        labels = np.full((len(cursors), meta.local_len), NO_TARGET, np.int64)
        for row, start in enumerate(starts):
            self._read_shard(start, positions, tokens[row], labels[row])
            if self.mask_documents:
                # An end e means that position e - 1 is the last of its document: it predicts nothing.
                is_last = np.isin(positions, ends[row] - 1, assume_unique=True)
                labels[row, : len(positions)][is_last] = NO_TARGET
        return tokens, labels, meta

    def _mask(self, ends: list[np.ndarray]) -> AttentionMask:
        """Of sequences whose documents end there."""
        rows = [(0, *row[row < self.seq_len].tolist(), self.seq_len) for row in ends]
        if not self.mask_documents or not any(len(cu) > 2 for cu in rows):
            # One document each: plain causal says the same, and its schedule is found again in the next step.
            return Causal()
        return Documents(rows[0] if len(rows) == 1 else tuple(rows)) & Causal()

    def _read_shard(self, start: int, positions: np.ndarray, tokens: np.ndarray, labels: np.ndarray) -> None:
        for first, last in _spans(positions):
            lo, hi = int(positions[first]), int(positions[last - 1]) + 1
            stream = self.dataset.read(start + lo, start + hi + 1).astype(np.int64)
            if len(stream) == hi - lo:
                # The very last token of the stream has none after it.
                stream = np.append(stream, NO_TARGET)
            local = positions[first:last] - lo
            tokens[first:last] = stream[local]
            labels[first:last] = stream[local + 1]

    def _num_targets(self, sample: int) -> int:
        """Targets of a sample on all ranks that share it, from the boundaries alone."""
        start, stop = sample * self.seq_len, (sample + 1) * self.seq_len
        if self.mask_documents:
            return self.seq_len - len(self.dataset.document_ends(start, stop))
        return self.seq_len - (stop == self.dataset.num_tokens)

    def _permutation(self, epoch: int) -> np.ndarray:
        # RandomState, not Generator: its streams are frozen for good, so a resume under another numpy finds the same order.
        return np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32, epoch]).permutation(self.num_samples)


@dataclass(frozen=True)
class _HostStep:
    micro_batches: list[tuple[np.ndarray, np.ndarray, SequenceMeta]]
    num_target_tokens: int


def _spans(positions: np.ndarray) -> list[tuple[int, int]]:
    """Half-open runs of indices into `positions` whose positions lie close enough to be read as one slice."""
    if not len(positions):
        return []
    cuts = np.flatnonzero(np.diff(positions) > _READ_GAP) + 1
    edges = [0, *cuts.tolist(), len(positions)]
    return list(itertools.pairwise(edges))
