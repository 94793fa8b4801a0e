"""`longctx layout`: the drawn numbers are the layout's, the words are right, and what cannot be drawn is refused."""

from __future__ import annotations

import re

import pytest
import torch
from dense_masks import dense
from hypothesis import given
from hypothesis import strategies as st

from longctx.draw import Drawing, describe, main, mask_of, parser
from longctx.layout import LAYOUTS, Contiguous, Striped, ZigZag
from longctx.masks import Causal, Documents, Full, PrefixLM, SlidingWindow


def drawing(layout=None, mask=None, ring=4, seq_len=64) -> Drawing:
    return Drawing(layout=layout or ZigZag(), mask=mask or Causal(), ring=ring, seq_len=seq_len)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@given(ring=st.integers(1, 5), pieces=st.integers(1, 6))
def test_owner_work_and_imbalance_are_those_of_the_dense_mask(layout, ring, pieces):
    seq_len = layout.multiple(ring) * pieces
    d = drawing(layout, Causal() & SlidingWindow(5), ring, seq_len)
    pairs = dense(d.mask, seq_len)
    work = torch.zeros(ring, ring, dtype=torch.float64)
    for q, k in pairs.nonzero().tolist():
        rank, source = int(d.owner[q]), int(d.owner[k])
        work[rank, (rank - source) % ring] += 1
    torch.testing.assert_close(d.shares, work / work.sum())
    per_rank = work.sum(1)
    assert d.imbalance == pytest.approx(float(per_rank.max() / per_rank.mean()))
    assert d.step_imbalance == pytest.approx(float(work.max(0).values.sum() / per_rank.mean()))
    assert d.dead_hops == [hop for hop in range(ring) if not work[:, hop].any()]


class TestBar:
    def test_a_mark_is_the_rank_that_holds_the_piece(self):
        assert drawing(seq_len=64).bar(8, False) == "01233210"
        assert drawing(Contiguous(), seq_len=64).bar(8, False) == "00112233"
        assert drawing(Contiguous(), ring=2, seq_len=4).bar(96, False) == "0011"

    def test_pieces_of_many_ranks_are_no_ones(self):
        bar = drawing(Striped(), seq_len=64).bar(8, False)
        assert bar.splitlines() == ["~" * 8, "~ ranks take turns; the first runs of positions: " + "0123" * 8]

    def test_colour_changes_no_mark(self):
        for layout in LAYOUTS.values():
            d = drawing(layout)
            coloured = d.bar(16, True)
            assert "\x1b[" in coloured
            assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == d.bar(16, False)


def test_a_table_has_a_line_a_rank_and_its_shares():
    lines = drawing(Contiguous(), Full(), ring=2, seq_len=4).table().splitlines()
    assert [line.split() for line in lines] == [
        ["rank", "hop", "0", "hop", "1", "all"],
        ["0", "25", "%", "25", "%", "50", "%"],
        ["1", "25", "%", "25", "%", "50", "%"],
    ]


def test_a_long_ring_shows_the_least_and_the_most():
    lines = drawing(ring=16, seq_len=64).table().splitlines()
    assert lines[0].split() == ["rank", "least", "hop", "most", "hop", "all"]
    assert len(lines) == 17


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Causal(), "causal"),
        (Full(), "full"),
        (PrefixLM(2048), "prefix 2_048"),
        (Causal() & SlidingWindow(16), "causal and window 16"),
        (Causal() & Documents((0, 3, 8)), "causal and 2 documents"),
    ],
    ids=str,
)
def test_masks_in_words(mask, words):
    assert describe(mask) == words


class TestOptions:
    def mask(self, *words):
        return mask_of(parser().parse_args(["--seq-len", "16", *words]))

    def test_masks(self):
        assert self.mask() == Causal()
        assert self.mask("--mask", "full") == Full()
        assert self.mask("--mask", "full", "--window", "4") == SlidingWindow(4)
        assert self.mask("--prefix", "3") == PrefixLM(3)
        assert self.mask("--docs", "5") == Causal() & Documents((0, 5, 10, 15, 16))
        assert self.mask("--docs", "8,2") == Causal() & Documents((0, 8, 10, 16))
        assert self.mask("--docs", "16") == Causal() & Documents((0, 16))
        assert self.mask("--docs", "4k", "--window", "2").parts[1:] == (SlidingWindow(2), Documents((0, 16)))

    def test_sizes(self):
        assert parser().parse_args(["--seq-len", "64k"]).seq_len == 65536


class TestCommand:
    def test_one_layout(self, capsys):
        assert main(["--seq-len", "64k", "--ring", "4", "--layout", "zigzag"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("zigzag, ring 4, 65_536 tokens, causal\n")
        assert (
            "slowest rank / mean 1.00; waiting at every hop 1.00; in tiles and with messages 1.00; dead hops: none"
            in out
        )
        assert "\x1b[" not in out
        assert "padding" not in out

    def test_ulysses_ranks_hold_pieces_of_a_ring_ranks_part(self, capsys):
        assert main(["--seq-len", "64", "--ring", "2", "--ulysses", "2", "--width", "8"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("zigzag, ring 2 x ulysses 2, 64 tokens, causal\n\n00223311\n")
        assert "the 2 Ulysses ranks of each (0, 1 of the first) do equal parts" in out

    def test_auto_and_padding_are_said(self, capsys):
        assert main(["--seq-len", "65537", "--ring", "4", "--layout", "auto"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("auto (zigzag), ring 4, 65_537 tokens, causal\n")
        assert out.rstrip().endswith("; padding: 7")

    def test_a_window_shows_its_dead_hops(self, capsys):
        assert main(["--seq-len", "64", "--ring", "4", "--layout", "contiguous", "--window", "4"]) == 0
        assert "dead hops: 2, 3" in capsys.readouterr().out

    def test_compare_shows_all_layouts_and_what_auto_takes(self, capsys):
        assert main(["--seq-len", "64k", "--ring", "4", "--compare"]) == 0
        out = capsys.readouterr().out
        for name in LAYOUTS:
            assert f"\n{name}" in out
        assert out.rstrip().endswith("auto takes zigzag")

    @pytest.mark.parametrize("words", [[], ["--compare", "--docs", "5,20"]], ids=["one", "compare"])
    def test_png(self, tmp_path, capsys, words):
        path = tmp_path / "new" / "x.png"
        assert main(["--seq-len", "64", "--png", str(path), *words]) == 0
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert str(path) in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--ulysses", "0"], "PlanError: ulysses rank 0 is not one of 0"),
            (["--compare", "--ring", "0"], "PlanError: contiguous over 0 ranks"),
            (["--layout", "zigzga"], "PlanError: unknown layout 'zigzga': did you mean 'zigzag'"),
            (["--ring", "0"], "PlanError: zigzag over 0 ranks"),
            (["--prefix", "4", "--mask", "full"], "ConfigError: --prefix says who sees whom, and so does --mask full"),
            (["--width", "0"], "ConfigError: --width 0"),
        ],
        ids=["ulysses", "compare", "layout", "ring", "prefix", "width"],
    )
    def test_what_cannot_be_drawn_is_refused(self, capsys, words, message):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith(message)

    @pytest.mark.parametrize("words", [["--seq-len", "0"], ["--docs", "4,x"], ["--window", "1.5"]], ids=str)
    def test_bad_sizes_are_refused(self, capsys, words):
        with pytest.raises(SystemExit) as error:
            main(words)
        assert error.value.code == 2
        assert "is not a size" in capsys.readouterr().err

    def test_without_matplotlib_the_extra_is_named(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
        assert main(["--seq-len", "64", "--png", str(tmp_path / "x.png")]) == 2
        assert "pip install 'longctx[plot]'" in capsys.readouterr().err
