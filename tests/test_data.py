"""Packing, labels, sharding and order: the batches of one rank against the whole stream, computed the plain way."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data import DataConfig, ShardedLoader, check_vocab, open_dataset
from longctx.errors import DataError, PlanError
from longctx.layout import LAYOUTS, Balanced, Contiguous, Striped, ZigZag, get_layout, layout_names
from longctx.masks import Causal, Documents
from longctx.shapes import NO_TARGET
from longctx.tokens import TokenDataset

EOD = 256


def dataset_of(lengths: list[int], seed: int = 0) -> TokenDataset:
    """A token dataset in memory with documents of these lengths, each the end-of-document token included."""
    random = np.random.RandomState(seed)
    made = TokenDataset.__new__(TokenDataset)
    made.documents = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    made.num_documents = len(lengths)
    made.num_tokens = int(made.documents[-1])
    # The end-of-document id occurs within the text, too: boundaries must not be read off the ids.
    made.tokens = random.randint(0, EOD + 1, made.num_tokens).astype(np.uint16)
    made.tokens[made.documents[1:] - 1] = EOD
    made.source, made.tokenizer, made.vocab_size, made.max_token_id = "made up", "bytes", 257, EOD
    return made


def plain_sample(dataset: TokenDataset, i: int, seq_len: int, mask_documents: bool):
    """Sample i by definition: tokens, labels and the document number of each position, token by token."""
    tokens, labels, document = [], [], []
    for p in range(i * seq_len, (i + 1) * seq_len):
        here = int(np.searchsorted(dataset.documents, p, side="right"))
        after = int(np.searchsorted(dataset.documents, p + 1, side="right"))
        is_target = p + 1 < dataset.num_tokens and (here == after or not mask_documents)
        tokens.append(int(dataset.tokens[p]))
        labels.append(int(dataset.tokens[p + 1]) if is_target else NO_TARGET)
        document.append(here)
    return torch.tensor(tokens), torch.tensor(labels), torch.tensor(document)


def loader(dataset, **kw) -> ShardedLoader:
    settings = {
        **{"seq_len": 8, "micro_batch_size": 1, "accumulation_steps": 1, "dp_rank": 0, "dp_world": 1},
        **{"layout": ZigZag(), "prefetch": False},
    }
    return ShardedLoader(dataset, **{**settings, **kw})


LENGTHS = [5, 1, 1, 3, 20, 2, 1, 9, 30, 4, 4, 1, 40, 7]  # 128 tokens


@pytest.mark.parametrize("mask_documents", [True, False], ids=["documents", "stream"])
@pytest.mark.parametrize(("world", "seq_len"), [(1, 24), (2, 24), (3, 24), (4, 24), (3, 23), (4, 25)])
@pytest.mark.parametrize("layout", layout_names())
def test_shards_make_up_the_samples(layout, world, seq_len, mask_documents):
    """tokens, labels, mask and the number of targets of every rank, put together, are the sample by definition."""
    dataset, layout = dataset_of(LENGTHS), get_layout(layout)
    batch, accumulation = 2, 2
    assert dataset.num_sequences(seq_len) == 5
    ranks = [
        loader(
            dataset,
            **{"seq_len": seq_len, "micro_batch_size": batch, "accumulation_steps": accumulation, "layout": layout},
            **{"ring_rank": r, "ring_world": world, "mask_documents": mask_documents, "seed": 3},
        )
        for r in range(world)
    ]
    steps = [rank.step(8) for rank in ranks]
    counted = 0
    for m in range(accumulation):
        shards = [step[m] for step in steps]
        tokens = shards[0].meta.unshard([shard.tokens for shard in shards])
        labels = shards[0].meta.unshard([shard.labels for shard in shards])
        for shard in shards:
            padding = shard.meta.positions >= seq_len
            assert bool((shard.labels[:, padding] == NO_TARGET).all())
            assert bool((shard.tokens[:, padding] == 0).all())
        assert tokens.dtype == labels.dtype == torch.int64
        mask = shards[0].meta.mask
        assert all(shard.meta.mask == mask for shard in shards)
        visible = mask.materialize(seq_len).expand(batch, seq_len, seq_len)
        for row in range(batch):
            sample = ranks[0].sample_index(8 + m * batch + row)
            want_tokens, want_labels, document = plain_sample(dataset, sample, seq_len, mask_documents)
            assert torch.equal(tokens[row], want_tokens)
            assert torch.equal(labels[row], want_labels)
            want = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
            if mask_documents:
                want &= document[:, None] == document[None]
            assert torch.equal(visible[row], want)
            counted += int((want_labels != NO_TARGET).sum())
    for rank, step in enumerate(steps):
        for batch_of_rank in step:
            assert batch_of_rank.num_target_tokens == counted
            assert batch_of_rank.cursor == 8
            meta = batch_of_rank.meta
            fitted = layout.for_mask(meta.padded_mask, world, meta.padded_len)
            assert torch.equal(meta.positions, fitted.positions(rank, world, meta.padded_len))
            assert (meta.seq_len, meta.ring_rank, meta.ring_world) == (seq_len, rank, world)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_ulysses_ranks_share_what_the_ring_rank_would_hold(layout):
    dataset = dataset_of(LENGTHS)
    common = {"seq_len": 24, "micro_batch_size": 2, "layout": layout, "ring_rank": 1, "ring_world": 2}
    (whole,) = loader(dataset, **common).step(2)
    parts = [loader(dataset, **common, ulysses_rank=u, ulysses_world=3).step(2)[0] for u in range(3)]
    for name in ("tokens", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name))
    assert torch.equal(torch.cat([part.meta.positions for part in parts]), whole.meta.positions)
    for u, part in enumerate(parts):
        assert (part.meta.ulysses_rank, part.meta.ulysses_world) == (u, 3)
        assert (part.meta.mask, part.num_target_tokens) == (whole.meta.mask, whole.num_target_tokens)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    seq_len=st.sampled_from([2, 4, 7, 8, 11, 12]),
    layout=st.sampled_from([Contiguous(), ZigZag(), Striped(), Balanced()]),
    mask_documents=st.booleans(),
    cursor=st.integers(0, 200),
    seed=st.integers(0, 2**40),
)
def test_any_documents(lengths, seq_len, layout, mask_documents, cursor, seed):
    dataset = dataset_of(lengths)
    if dataset.num_tokens < seq_len:
        with pytest.raises(DataError, match="less than one sequence"):
            loader(dataset, seq_len=seq_len)
        return
    world = 2
    ranks = [
        loader(
            dataset,
            **{"seq_len": seq_len, "layout": layout, "ring_rank": r, "ring_world": world, "seed": seed},
            **{"mask_documents": mask_documents},
        )
        for r in range(world)
    ]
    shards = [rank.step(cursor)[0] for rank in ranks]
    tokens, labels, _ = plain_sample(dataset, ranks[0].sample_index(cursor), seq_len, mask_documents)
    assert torch.equal(shards[0].meta.unshard([s.tokens for s in shards])[0], tokens)
    assert torch.equal(shards[0].meta.unshard([s.labels for s in shards])[0], labels)
    assert {s.num_target_tokens for s in shards} == {int((labels != NO_TARGET).sum())}


def test_the_picture_in_the_docstring(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("aaaa", "bb", "cccccc")))
    config = DataConfig(path=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path), seq_len=6)
    dataset = open_dataset(config)
    a, b = (ord(x) for x in "ab")
    for mask_documents, after_end in ((True, NO_TARGET), (False, b)):
        batch = loader(dataset, seq_len=6, shuffle=False, mask_documents=mask_documents).step(0)[0]
        assert batch.tokens.tolist() == [[a, a, a, a, EOD, b]]
        assert batch.labels.tolist() == [[a, a, a, EOD, after_end, b]]
        assert batch.meta.mask == (Documents((0, 5, 6)) & Causal() if mask_documents else Causal())


def test_mask_of_a_batch_has_a_row_per_sequence():
    dataset = dataset_of([5, 3, 8, 2, 6])
    batch = loader(dataset, micro_batch_size=3, shuffle=False).step(0)[0]
    assert batch.meta.mask == Documents(((0, 5, 8), (0, 8), (0, 2, 8))) & Causal()
    # Where no sample has a boundary, plain causal says the same and is cheaper to schedule.
    assert loader(dataset, shuffle=False).step(1)[0].meta.mask == Causal()


def test_ranks_without_any_target():
    """Documents of one token (empty records of real data), and of two under the striped layout."""
    dataset = dataset_of([1] * 8 + [8])
    shards = [loader(dataset, ring_rank=r, ring_world=2, shuffle=False).step(0)[0] for r in range(2)]
    assert all((s.labels == NO_TARGET).all() for s in shards)
    assert [s.num_target_tokens for s in shards] == [0, 0]
    pairs = dataset_of([2] * 4)
    shards = [loader(pairs, layout=Striped(), ring_rank=r, ring_world=2).step(0)[0] for r in range(2)]
    assert [(s.labels != NO_TARGET).sum().item() for s in shards] == [4, 0]
    assert [s.num_target_tokens for s in shards] == [4, 4]


def test_last_token_of_the_stream_has_no_target():
    dataset = dataset_of([16])
    for mask_documents in (True, False):
        batch = loader(dataset, shuffle=False, mask_documents=mask_documents).step(1)[0]
        assert batch.labels[0, -1] == NO_TARGET
        assert (batch.labels[0, :-1] != NO_TARGET).all()
        assert batch.num_target_tokens == 7
        # The one before goes on in the same document: its last position has a target.
        first = loader(dataset, shuffle=False, mask_documents=mask_documents).step(0)[0]
        assert first.labels[0, -1] == dataset.tokens[8]


class CountingDataset(TokenDataset):
    """Notes which tokens are read."""

    def read(self, start: int, stop: int) -> np.ndarray:
        self.ranges.append((start, stop))
        return super().read(start, stop)


@pytest.mark.parametrize(("name", "slices"), [("contiguous", 1), ("zigzag", 2), ("striped", 1)])
def test_a_rank_reads_its_shard_only(name, slices):
    seq_len, world, rank = 1 << 16, 4, 1
    dataset = dataset_of([seq_len // 4] * 16)
    dataset.__class__ = CountingDataset
    dataset.ranges = []
    layout = LAYOUTS[name]
    made = loader(dataset, seq_len=seq_len, layout=layout, ring_rank=rank, ring_world=world, accumulation_steps=2)
    made.step(0)
    assert len(dataset.ranges) == 2 * slices
    read = np.concatenate([np.arange(*r) for r in dataset.ranges])
    starts = [made.sample_index(n) * seq_len for n in range(2)]
    own = np.concatenate([start + layout.positions(rank, world, seq_len).numpy() for start in starts])
    if name == "striped":
        # Neighbouring tokens are on one page of the disk: the stripes of all ranks come with it.
        assert len(read) <= 2 * seq_len
    else:
        assert set(read) == set(own) | set(own + 1)
        assert len(read) == 2 * (seq_len // world + slices)


@pytest.mark.parametrize(
    ("dp", "micro", "accumulation", "ring"), [(1, 4, 1, 2), (4, 1, 1, 1), (2, 1, 2, 4), (1, 1, 4, 1), (2, 2, 1, 2)]
)
def test_order_does_not_depend_on_the_degrees(dp, micro, accumulation, ring):
    """Every step reads the same four samples, each once, whoever reads them; so a resume at other degrees goes on."""
    dataset = dataset_of(LENGTHS)
    seen = []
    for cursor in range(0, 40, 4):
        step = []
        for rank in range(dp):
            made = loader(
                dataset,
                **{"micro_batch_size": micro, "accumulation_steps": accumulation, "dp_rank": rank, "dp_world": dp},
                **{"ring_world": ring, "ring_rank": 0, "layout": Contiguous(), "seed": 5},
            )
            assert made.samples_per_step == 4
            assert made.tokens_per_step == 32
            # The ring's first rank holds a sample's first tokens, which tell the samples of this dataset apart.
            step += [tuple(row.tolist()) for batch in made.step(cursor) for row in batch.tokens[:, :2]]
        seen.append(sorted(step))
    plain = loader(dataset, seed=5)
    order = [plain.sample_index(n) for n in range(40)]
    want = [tuple(dataset.tokens[8 * i : 8 * i + 2].tolist()) for i in order]
    assert len(set(want)) == dataset.num_sequences(8)
    assert seen == [sorted(want[n : n + 4]) for n in range(0, 40, 4)]


def test_every_epoch_is_a_permutation_of_its_own():
    made = loader(dataset_of(LENGTHS), seed=1)
    epochs = [[made.sample_index(16 * e + i) for i in range(16)] for e in range(6)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    # Asked for again after others, and by another loader of the same seed; another seed is another order.
    assert [made.sample_index(i) for i in range(16)] == epochs[0]
    assert [loader(dataset_of(LENGTHS), seed=1).sample_index(i) for i in range(16)] == epochs[0]
    assert [loader(dataset_of(LENGTHS), seed=2).sample_index(i) for i in range(16)] != epochs[0]
    assert [loader(dataset_of(LENGTHS), seed=1 + 2**32).sample_index(i) for i in range(16)] != epochs[0]
    assert [loader(dataset_of(LENGTHS), shuffle=False).sample_index(i) for i in range(20)] == [*range(16), *range(4)]


def test_the_order_of_a_seed_is_for_good():
    """A checkpoint's cursor means the same samples in every version: these numbers must never change."""
    made = loader(dataset_of(LENGTHS), seed=0)
    assert [made.sample_index(i) for i in range(20)] == [
        4,
        8,
        2,
        12,
        14,
        6,
        3,
        9,
        0,
        10,
        1,
        5,
        11,
        13,
        7,
        15,
        14,
        0,
        7,
        13,
    ]


def batches_equal(ours, theirs) -> bool:
    return all(
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.labels, b.labels)
        and a.meta.mask == b.meta.mask
        and (a.num_target_tokens, a.cursor) == (b.num_target_tokens, b.cursor)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_prefetch_changes_nothing():
    dataset = dataset_of(LENGTHS)
    plain, ahead = (loader(dataset, accumulation_steps=3, prefetch=p) for p in (False, True))
    # In order, then back (a resume), then a jump.
    for cursor in (0, 3, 6, 9, 3, 6, 100, 103):
        assert batches_equal(ahead.step(cursor), plain.step(cursor))


def test_prefetch_reads_ahead_and_carries_errors():
    dataset = dataset_of(LENGTHS)
    dataset.__class__ = CountingDataset
    dataset.ranges = []
    made = loader(dataset, shuffle=False, prefetch=True)
    made.step(0)
    made._ahead[1].result()
    assert [r[0] for r in dataset.ranges] == [0, 8]
    main = threading.current_thread()
    where = []

    def fail(start, stop):
        where.append(threading.current_thread())
        raise OSError("the disk is gone")

    dataset.read = fail
    made.step(1)  # was read before the disk went
    with pytest.raises(OSError, match="the disk is gone"):
        made.step(2)
    assert where
    assert main not in where
    del dataset.read
    assert made.step(2)[0].tokens.tolist() == [dataset.tokens[16:24].tolist()]


def test_standard_library_in_a_few_lines(tmp_path):
    config = DataConfig(cache_dir=str(tmp_path), seq_len=2048)
    dataset = open_dataset(config)
    assert dataset.notes == ()
    assert "Python's standard library" in dataset.describe()
    made = loader(dataset, seq_len=2048, ring_rank=1, ring_world=2)
    batch = made.step(0)[0]
    assert batch.tokens.shape == (1, 1024)
    assert int(batch.tokens.max()) < dataset.vocab_size
    text = bytes(dataset.tokens[: dataset.documents[1] - 1].tolist()).decode()
    assert "__future__" in text  # the first file by name


def test_shorter_than_one_sequence(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    config = DataConfig(path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), seq_len=12)
    with pytest.raises(DataError, match=r"has 11 tokens, less than one sequence of data\.seq_len = 12\n.*at most 11"):
        open_dataset(config)
    enough = open_dataset(DataConfig(path=config.path, cache_dir=config.cache_dir, seq_len=11))
    assert enough.num_sequences(11) == 1


def test_vocabulary_is_checked():
    dataset = dataset_of(LENGTHS)
    assert check_vocab(dataset, 257) == []
    (problem,) = check_vocab(dataset, 256)
    assert "ids up to 256, but model.vocab_size = 256 ends at 255" in problem.what
    assert "257 or more (320 is a multiple of 64)" in problem.hint


def test_impossible_loaders_are_refused():
    dataset = dataset_of(LENGTHS)
    with pytest.raises(PlanError, match="rank 2 is not one of the 2 ranks"):
        loader(dataset, ring_rank=2, ring_world=2)
    with pytest.raises(DataError, match="both are at least 1"):
        loader(dataset, micro_batch_size=0)
    with pytest.raises(DataError, match="data-parallel rank 2 is not one of 2"):
        loader(dataset, dp_rank=2, dp_world=2)
    with pytest.raises(DataError, match="cursor -1 is negative"):
        loader(dataset).step(-1)


def test_problems_of_the_settings(tmp_path):
    good = DataConfig(path=str(tmp_path), seq_len=2)
    (tmp_path / "a.txt").write_text("text")
    assert good.problems() == []
    bad = DataConfig(path=str(tmp_path / "b.txt"), tokenizer=str(tmp_path / "t.json"), seq_len=1, seed=-1)
    whats = [problem.what for problem in bad.problems()]
    assert len(whats) == 4
    assert all(any(part in what for what in whats) for part in ("seq_len = 1", "seed = -1", "b.txt", "t.json"))
    assert all(problem.hint for problem in bad.problems())


@pytest.mark.gpu
def test_on_the_gpu():
    dataset = dataset_of(LENGTHS)
    cpu, gpu = (loader(dataset, device=device, prefetch=True).step(3)[0] for device in ("cpu", "cuda"))
    assert gpu.tokens.device.type == gpu.labels.device.type == gpu.meta.positions.device.type == "cuda"
    assert torch.equal(cpu.tokens, gpu.tokens.cpu())
    assert torch.equal(cpu.labels, gpu.labels.cpu())
