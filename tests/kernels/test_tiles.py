"""The order in which tiles are begun: every one once, and no SM idle long before the last."""

from __future__ import annotations

import heapq

import pytest
import torch
import triton
import triton.language as tl

from longctx.kernels import tiles
from longctx.kernels.tiles import heads_abreast, place_of

SMS = 132  # of an H100
DEVICE = torch.device("cpu")


@triton.jit
def _places_kernel(TILES, HEADS, num_tiles, section):
    index = tl.program_id(0)
    tile, head = place_of(index, tl.num_programs(0), num_tiles, section)
    tl.store(TILES + index, tile)
    tl.store(HEADS + index, head)


def places(num_tiles: int, heads: int, section: int) -> list[tuple[int, int]]:
    """(tile, head) by the order in which they are begun."""
    found = torch.full((2, num_tiles * heads), -1, dtype=torch.int32)
    _places_kernel[(num_tiles * heads,)](found[0], found[1], num_tiles, section)
    return list(zip(*found.tolist(), strict=True))


@pytest.mark.parametrize("num_tiles", [1, 2, 5])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_every_tile_of_every_head_once(num_tiles, heads, interpreter):
    for section in range(1, heads + 1):
        order = interpreter(places, num_tiles, heads, section)
        assert sorted(order) == [(tile, head) for tile in range(num_tiles) for head in range(heads)]
        # The first tiles of the first section's heads come first, and no head of another before its last tile.
        first = heads if heads < 2 * section else section
        assert order[: first * num_tiles] == [(tile, head) for tile in range(num_tiles) for head in range(first)]


def busy(order: list[tuple[int, int]], num_tiles: int) -> float:
    """The share of the time in which SMs compute, where tile 0 of a head takes longest and the last shortest."""
    work = [num_tiles - tile for tile, _ in order]
    ends = [0] * SMS
    for piece in work:
        heapq.heapreplace(ends, ends[0] + piece)
    return sum(work) / SMS / max(ends)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(tiles, "num_sms", lambda device: SMS)


# Columns of key heads and rows of query heads, in tiles of 128: 4k and 8k of 32/8, 4 x 8k of 16, 16k of 16/4.
@pytest.mark.parametrize(
    ("num_tiles", "heads"), [(32, 8), (64, 8), (32, 32), (64, 32), (64, 64), (128, 4), (128, 16)]
)  # fmt: skip
def test_no_sm_idles_long_before_the_last_tile_of_a_causal_block(num_tiles, heads, interpreter, hopper):
    section = heads_abreast(num_tiles, heads, DEVICE)
    assert busy(interpreter(places, num_tiles, heads, section), num_tiles) > 0.97


def test_one_head_after_the_other_would_leave_sms_idle(interpreter):
    """What the sections are for: 8 key heads of 8k tokens."""
    assert busy(interpreter(places, 64, 8, 1), 64) < 0.85


def test_long_heads_are_begun_one_after_the_other(hopper):
    """Beside each other they would not fit into L2."""
    assert heads_abreast(256, 8, DEVICE) == 1
    assert heads_abreast(1, 8, DEVICE) == 8
