"""What a kernel module launches in real runs, as data: a test compiles every one of these without a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """One compiled instance, described by a block that leads to it.

    Args:
        direction: "forward" or "backward".
        head_dim: of the tensors, before any padding.
        kind: "full", "causal", "window" (a band with both ends) or "rows".
        dtype: "bfloat16", "float16" or "float32".
        seq_len: of q and of k.
        heads, kv_heads: of q, and of k and v.
        carry: a forward that continues from a state.
        final: a forward whose out is written in q's dtype.
        fresh: a backward that writes dk and dv in k's dtype instead of adding to fp32.
        softcap: as in `BlockAttention`.
        deterministic: the backward in its deterministic mode.
        known_spills: spilled loads and stores in one pass of a loop with matrix instructions that are known and were measured
            faster than what spills nothing. None: not asserted.
        waits: the numbers N of `wgmma.wait_group N` that must occur in the code: products that stay in flight at a wait. A
            compiler that serialises them leaves only 0.
    """

    direction: str
    head_dim: int
    kind: str
    dtype: str = "bfloat16"
    seq_len: int = 8192
    heads: int = 32
    kv_heads: int = 8
    carry: bool = False
    final: bool = False
    fresh: bool = False
    softcap: float = 0.0
    deterministic: bool = False
    known_spills: int | None = 0
    waits: frozenset[int] = frozenset({0})

    @property
    def id(self) -> str:
        """A readable name, the same for equal blocks."""
        words = [self.direction, f"d{self.head_dim}", self.kind]
        words += [word for word in ("carry", "final", "fresh", "deterministic") if getattr(self, word)]
        words += [f"softcap{self.softcap:g}"] if self.softcap else []
        words += [self.dtype] if self.dtype != "bfloat16" else []
        words += [f"heads{self.heads}over{self.kv_heads}"] if (self.heads, self.kv_heads) != (32, 8) else []
        words += [f"len{self.seq_len}"] if self.seq_len != 8192 else []
        return "-".join(words)
