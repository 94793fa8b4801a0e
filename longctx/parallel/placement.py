"""Who is where in a plan, and which part of a sequence each holds, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from longctx.sequence import SequenceMeta

if TYPE_CHECKING:
    from longctx.parallel.plan import Coords, ParallelPlan

# The token spans of a rank that `describe` writes out before it only counts them.
SHOWN_SPANS = 4


def describe(plan: ParallelPlan, seq_len: int | None = None, layers: Sequence[range] | None = None) -> str:
    """`ParallelPlan.describe`."""
    is_fitted = seq_len is not None and plan.ring > 1 and plan.sequence_layout.fits_masks
    fitted = "; positions for a causal mask, other masks may have others" if is_fitted else ""
    lines = [f"{plan}: {plan.world_size} ranks, layout {plan.layout}{fitted}"]
    width = len(str(plan.world_size - 1))
    for rank in range(plan.world_size):
        coords = plan.coords(rank)
        line = f"  rank {rank:>{width}}  {coords}"
        if seq_len is not None:
            meta = SequenceMeta.of(
                seq_len,
                layout=plan.sequence_layout,
                ring_rank=coords.ring,
                ring_world=plan.ring,
                ulysses_rank=coords.ulysses,
                ulysses_world=plan.ulysses,
                local_multiple=plan.local_multiple,
            )
            real = meta.positions[meta.positions < seq_len]
            line += f"  tokens {_spans(real)}" if len(real) else "  tokens none"
            line += f", {meta.local_len - len(real)} of padding" * (len(real) < meta.local_len)
        if layers is not None:
            held = []
            for stage in plan.stages_of(coords.pp):
                of_stage = f"{layers[stage].start}-{layers[stage].stop - 1}"
                of_stage += " and embedding" * (stage == 0) + " and head" * (stage == plan.num_stages - 1)
                held.append(of_stage)
            line += f"  layers {', '.join(held)}"
        lines.append(line + _peers(plan, coords))
    return "\n".join(lines)


def _peers(plan: ParallelPlan, at: Coords) -> str:
    """The ranks on each axis through `at` that has more than one, as text."""
    sizes = {"tp": plan.tp, "ulysses": plan.ulysses, "ring": plan.ring, "dp": plan._resolved_dp, "pp": plan.pp}
    found = [
        f"{axis} {','.join(str(plan.rank_of(replace(at, **{axis: i}))) for i in range(size))}"
        for axis, size in sizes.items()
        if size > 1
    ]
    return f"  with {'; '.join(found)}" if found else ""


def _spans(positions: torch.Tensor) -> str:
    """Ascending positions as runs, `0-7, 24-31`; the first few, and how many there are."""
    is_break = positions.diff() != 1
    ends = torch.cat([positions[:-1][is_break], positions[-1:]]).tolist()
    starts = torch.cat([positions[:1], positions[1:][is_break]]).tolist()
    shown = [f"{a:_}-{b:_}" if a != b else f"{a:_}" for a, b in zip(starts, ends, strict=True)][:SHOWN_SPANS]
    more = f", ... ({len(starts):_} spans)" if len(starts) > SHOWN_SPANS else ""
    return ", ".join(shown) + more
