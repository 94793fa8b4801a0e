"""`longctx layout`: who holds what, and the work of each rank at each hop, as text and as a picture."""

from __future__ import annotations

import argparse
import itertools
import os
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from longctx.balance import ring_time, tile_work
from longctx.errors import ConfigError, LongCtxError
from longctx.layout import LAYOUTS, Auto, SequenceLayout, get_layout, layout_names
from longctx.masks import AttentionMask, Causal, Documents, Full, PrefixLM, SlidingWindow
from longctx.sequence import SequenceMeta
from longctx.settings import parse_size

# One character a rank in the bar; with more ranks than these they come round again.
MARKS = string.digits + string.ascii_lowercase + string.ascii_uppercase
LONGEST_TABLE = 12
# Background colours of the 256-colour table, light enough for black text.
_COLOURS = (117, 216, 151, 222, 183, 210, 159, 187)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One layout under one mask: what is drawn of it, as numbers.

    Args:
        layout: one that fits masks is fitted to `mask`.
        ring, ulysses: ranks of the ring, and those that each of them is. The latter divide its work evenly, by heads.
        seq_len: any; padded as `SequenceMeta` does.
    """

    layout: SequenceLayout
    mask: AttentionMask
    ring: int
    seq_len: int
    ulysses: int = 1

    @cached_property
    def metas(self) -> list[SequenceMeta]:
        """Of all ranks, in the order ring_rank * ulysses + ulysses_rank."""
        return [
            SequenceMeta.of(
                self.seq_len,
                mask=self.mask,
                layout=self.layout,
                ring_rank=r,
                ring_world=self.ring,
                ulysses_rank=u,
                ulysses_world=self.ulysses,
            )
            for r, u in itertools.product(range(max(1, self.ring)), range(max(1, self.ulysses)))
        ]

    @property
    def ranks(self) -> int:
        """Of ring and Ulysses together."""
        return self.ring * self.ulysses

    @cached_property
    def owner(self) -> torch.Tensor:
        """int64 [S]: the rank that holds each position."""
        owner = torch.empty(self.metas[0].padded_len, dtype=torch.int64)
        for rank, meta in enumerate(self.metas):
            owner[meta.positions] = rank
        return owner[: self.seq_len]

    @cached_property
    def work(self) -> torch.Tensor:
        """int64 [ring, ring]: visible pairs of each ring rank at each hop."""
        meta = self.metas[0]
        return meta.layout.balance(meta.padded_mask, self.ring, meta.padded_len)

    @cached_property
    def time(self) -> float:
        """What `Auto` compares: the ring's time in tiles and messages, over an even share of the visible pairs."""
        meta = self.metas[0]
        shards = [meta.layout.positions(rank, self.ring, meta.padded_len) for rank in range(self.ring)]
        time = ring_time(*tile_work(meta.padded_mask, shards, meta.padded_len), meta.mask.batch or 1)
        return time * self.ring / max(1, int(self.work.sum()))

    @property
    def shares(self) -> torch.Tensor:
        """`work` as shares of the whole, float64."""
        return self.work.double() / max(1, int(self.work.sum()))

    @property
    def imbalance(self) -> float:
        """Work of the slowest rank over the mean: 1 is even."""
        return float(self.shares.sum(1).max() * self.ring)

    @property
    def step_imbalance(self) -> float:
        """The same when ranks wait for each other after every hop: the slowest of each hop, summed, over the mean."""
        return float(self.shares.max(0).values.sum() * self.ring)

    @property
    def dead_hops(self) -> list[int]:
        """Hops at which no rank has work: nothing is computed there, and nothing is sent for them alone."""
        return [hop for hop in range(self.ring) if not bool(self.work[:, hop].any())]

    def bar(self, width: int, colour: bool) -> str:
        """The positions as one line of `width` marks, each the rank that holds most of its piece; `~` where none does.

        Where there is a `~`, a second line shows who holds the first runs of positions, one by one.
        """
        width = min(width, self.seq_len)
        piece = torch.arange(self.seq_len) * width // self.seq_len
        held = torch.bincount(piece * self.ranks + self.owner, minlength=width * self.ranks).view(width, self.ranks)
        most, rank = held.max(1)
        ranks: list[int | None] = [
            r if 2 * m > n else None for r, m, n in zip(*map(_list, (rank, most, held.sum(1))), strict=True)
        ]
        lines = [_marks(ranks, colour)]
        if None in ranks:
            runs = torch.unique_consecutive(self.owner)[:32]
            lines.append(f"~ ranks take turns; the first runs of positions: {_marks(_list(runs), colour)}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Imbalance, dead hops and padding in words."""
        dead = ", ".join(map(str, self.dead_hops)) or "none"
        padding = self.metas[0].padded_len - self.seq_len
        return (
            f"slowest rank / mean {self.imbalance:.2f}; waiting at every hop {self.step_imbalance:.2f}; "
            f"in tiles and with messages {self.time:.2f}; dead hops: {dead}" + f"; padding: {padding:_}" * bool(padding)
        )

    def table(self) -> str:
        """The share of the work of each rank at each hop, in percent; of a long ring the least and most of its hops."""
        shares = self.shares
        if self.ring > LONGEST_TABLE:
            header = ["rank", "least hop", "most hop", "all"]
            columns = torch.stack([shares.min(1).values, shares.max(1).values, shares.sum(1)], 1)
        else:
            header = ["rank", *(f"hop {hop}" for hop in range(self.ring)), "all"]
            columns = torch.cat([shares, shares.sum(1, keepdim=True)], 1)
        lines = [
            [f"{_mark(rank)}" if self.ring <= len(MARKS) else str(rank), *map(_percent, row)]
            for rank, row in enumerate(columns.tolist())
        ]
        width = max(len(cell) for line in (header, *lines) for cell in line)
        return "\n".join("  ".join(cell.rjust(width) for cell in line) for line in (header, *lines))

    def text(self, width: int, colour: bool) -> str:
        """Bar, table and summary."""
        fitted = self.metas[0].layout.name
        name = self.layout.name + f" ({fitted})" * (fitted != self.layout.name)
        lines = [f"{name}, {self.place()}", "", self.bar(width, colour), "", self.table(), "", self.summary()]
        if self.ulysses > 1:
            first = ", ".join(_mark(rank) for rank in range(self.ulysses)) if self.ranks <= len(MARKS) else "..."
            lines.append(
                f"rows are ring ranks; the {self.ulysses} Ulysses ranks of each ({first} of the first) do equal parts"
            )
        return "\n".join(lines)

    def place(self) -> str:
        """Degrees, length and mask in words."""
        ulysses = f" x ulysses {self.ulysses}" if self.ulysses > 1 else ""
        return f"ring {self.ring}{ulysses}, {self.seq_len:_} tokens, {describe(self.mask)}"


def _list(x: torch.Tensor) -> list[int]:
    return x.tolist()


def _mark(rank: int | None) -> str:
    return "~" if rank is None else MARKS[rank % len(MARKS)]


def _marks(ranks: Sequence[int | None], colour: bool) -> str:
    """One mark a rank; runs of a rank on its colour."""
    text = []
    for rank, run in itertools.groupby(ranks):
        marks = _mark(rank) * len(list(run))
        paint = colour and rank is not None
        text.append(f"\x1b[30;48;5;{_COLOURS[(rank or 0) % len(_COLOURS)]}m{marks}\x1b[0m" if paint else marks)
    return "".join(text)


def _percent(share: float) -> str:
    return "." if share == 0 else f"{100 * share:.3g} %"


def describe(mask: AttentionMask) -> str:
    """A mask in a few words."""
    if isinstance(mask, Documents):
        rows = mask.cu_seqlens
        return f"{len(rows) - 1} documents"
    if isinstance(mask, SlidingWindow):
        return f"window {mask.window:_}"
    if isinstance(mask, PrefixLM):
        return f"prefix {mask.prefix:_}"
    parts = getattr(mask, "parts", None)
    return " and ".join(map(describe, parts)) if parts else type(mask).__name__.lower()


def comparison(drawings: Sequence[Drawing], width: int, colour: bool) -> str:
    """All layouts of one mask, a bar and a line each, and which of them "auto" takes."""
    first = drawings[0]
    blocks = [first.place(), *(f"{d.layout.name}\n{d.bar(width, colour)}\n{d.summary()}" for d in drawings)]
    taken = replace(first, layout=Auto()).metas[0].layout.name
    return "\n\n".join([*blocks, f"auto takes {taken}"])


def picture(drawings: Sequence[Drawing], path: Path) -> None:
    """A PNG: for each layout the positions coloured by rank, and the work of each rank and hop.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png needs matplotlib: pip install 'longctx[plot]'") from error
    first = drawings[0]
    figure = Figure(figsize=(10, 0.6 + 1.7 * len(drawings)), layout="constrained")
    figure.suptitle(first.place())
    tops = figure.subplots(len(drawings), 2, squeeze=False, width_ratios=(2, 1))
    scale = max(float(d.shares.max()) for d in drawings)
    for (left, right), d in zip(tops, drawings, strict=True):
        left.imshow(
            d.owner[None].numpy(), aspect="auto", interpolation="nearest", extent=(0, d.seq_len, 0, 1),
            cmap=colormaps["tab10" if d.ranks <= 10 else "turbo"], vmin=0, vmax=max(9, d.ranks - 1),
        )  # fmt: skip
        # A label in the middle of every run, as long as they can be told apart.
        ends = [0, *(d.owner.diff().nonzero().flatten() + 1).tolist(), d.seq_len]
        if len(ends) <= 40:
            for a, b in itertools.pairwise(ends):
                left.text((a + b) / 2, 0.5, str(int(d.owner[a])), ha="center", va="center", color="white")
        left.set(title=f"{d.layout.name}: rank of each position", yticks=[], xlabel="position")
        right.imshow(d.shares.numpy(), aspect="auto", cmap="Greys", vmin=0, vmax=scale)
        for rank, hop in itertools.product(range(d.ring), repeat=2) if d.ring <= 8 else ():
            share = float(d.shares[rank, hop])
            right.text(
                hop,
                rank,
                _percent(share),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if share > 0.55 * scale else "black",
            )
        right.set(title=f"work, slowest / mean {d.imbalance:.2f}", xlabel="hop", ylabel="rank")
        right.set_xticks(range(d.ring) if d.ring <= 16 else [])
        right.set_yticks(range(d.ring) if d.ring <= 16 else [])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _size(text: str) -> int:
    size = parse_size(text)
    if size is None or size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 65536 or 64k")
    return size


def _sizes(text: str) -> list[int]:
    return [_size(word) for word in text.split(",")]


def mask_of(args: argparse.Namespace) -> AttentionMask:
    """The mask that the options describe.

    Raises:
        ConfigError: options that say different things.
    """
    if args.prefix is not None:
        if args.mask is not None:
            raise ConfigError(f"--prefix says who sees whom, and so does --mask {args.mask}: give one of them")
        mask: AttentionMask = PrefixLM(args.prefix)
    else:
        mask = Full() if args.mask == "full" else Causal()
    if args.window is not None:
        mask &= SlidingWindow(args.window)
    if args.docs is not None:
        # The lengths repeat until the sequence is full; the last document is cut where it ends.
        ends = itertools.takewhile(lambda end: end < args.seq_len, itertools.accumulate(itertools.cycle(args.docs)))
        mask &= Documents((0, *ends, args.seq_len))
    return mask


def parser() -> argparse.ArgumentParser:
    """The command line of `longctx layout`."""
    p = argparse.ArgumentParser(prog="longctx layout", description=__doc__.splitlines()[0])
    p.add_argument("--seq-len", type=_size, default=65536, metavar="N", help="tokens of the whole sequence (64k)")
    p.add_argument("--ring", type=int, default=4, metavar="N", help="ranks of the ring (4)")
    p.add_argument("--ulysses", type=int, default=1, metavar="N", help="Ulysses ranks that each ring rank is (1)")
    p.add_argument("--layout", default="zigzag", help=f"{', '.join(layout_names())} (zigzag)")
    p.add_argument("--compare", action="store_true", help="all layouts instead of one")
    p.add_argument("--mask", choices=["causal", "full"], help="who sees whom (causal)")
    p.add_argument("--window", type=_size, metavar="N", help="and only within N positions")
    p.add_argument(
        "--docs", type=_sizes, metavar="N,N,...", help="and only within documents of these lengths, repeated"
    )
    p.add_argument("--prefix", type=_size, metavar="N", help="the first N see each other, the rest is causal")
    p.add_argument("--png", type=Path, metavar="FILE", help="draw it with matplotlib too")
    p.add_argument("--width", type=int, default=96, metavar="N", help="characters of the bar (96)")
    return p


def run(args: argparse.Namespace) -> int:
    """Print, and draw where asked."""
    if args.width < 1:
        raise ConfigError(f"--width {args.width}: a bar has at least 1 character")
    mask = mask_of(args)
    drawings = [
        Drawing(layout=layout, mask=mask, ring=args.ring, seq_len=args.seq_len, ulysses=args.ulysses)
        for layout in (LAYOUTS.values() if args.compare else [get_layout(args.layout)])
    ]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if args.compare:
        print(comparison(drawings, args.width, colour))
    else:
        print(drawings[0].text(args.width, colour))
    if args.png:
        picture(drawings, args.png)
        print(f"\ndrawn to {args.png}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`longctx layout`; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except LongCtxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
