"""Does a ring cost precision? The error of out, dq, dk and dv against float64, over rings of any size in this process.

`python -m longctx.numerics` runs virtual rings (`longctx.testing.run_virtual_ring`: the same code as between processes, the
ranks as threads) with 16-bit inputs, prints each error beside that of one rank, and with `--csv` keeps them. Gradients of
keys and values travel in fp32 or, as `parallel.grad_dtype = "bf16"` has it, in bf16, rounded at each hop.
The strategy is the relay, whose gradients are rounded most often.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from longctx.errors import ConfigError, LongCtxError
from longctx.functional import attention, context_parallel_attention
from longctx.parallel.mesh import ParallelMesh
from longctx.results import Measurement, append, environment
from longctx.sequence import SequenceMeta
from longctx.table_parts import markdown
from longctx.testing import run_virtual_ring

WORLDS = (1, 2, 4, 8, 16, 64)
TENSORS = ("out", "dq", "dk", "dv")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What key and value gradients travel in.
WIRES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class RingNumerics:
    """One ring: causal attention, two query heads to a key head, zigzag.

    Args:
        world: ranks.
        dtype: of q, k, v and dout: fp16 or bf16.
        wire: of gradients of keys and values between ranks: fp32 or bf16.
        seq_len: whole length.
    """

    world: int
    dtype: str = "bf16"
    wire: str = "fp32"
    seq_len: int = 1024
    head_dim: int = 32
    kernel: str = "reference"

    @property
    def label(self) -> str:
        """Inputs and wire in words."""
        return f"{self.dtype} inputs, dk and dv sent in {self.wire}"

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and dout, "1 s h d" with 2 and 1 heads, the same for every ring of that length and dtype."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, self.seq_len, heads, self.head_dim) for heads in (2, 1, 1, 2)]
        return [torch.randn(shape, generator=generator).to(DTYPES[self.dtype]) for shape in shapes]

    def errors(self) -> dict[str, float]:
        """The error of each tensor: RMS of the difference from float64 over the RMS of the tensor."""
        shards = run_virtual_ring(_on_rank, self, world=self.world, grad_dtype=WIRES[self.wire], timeout_s=600.0)
        meta = SequenceMeta.of(self.seq_len, ring_world=self.world)
        whole = [meta.unshard(parts).double() for parts in zip(*shards, strict=True)]
        exact = _exact(replace(self, world=1, wire="fp32"))
        return {
            name: math.sqrt(float((got - right).square().sum() / right.square().sum()))
            for name, got, right in zip(TENSORS, whole, exact, strict=True)
        }


def _on_rank(mesh: ParallelMesh, case: RingNumerics) -> list[torch.Tensor]:
    meta = SequenceMeta.of(case.seq_len, ring_rank=mesh.ring.rank, ring_world=mesh.ring.size)
    q, k, v, dout = (meta.shard(x, fill=0.0) for x in case.inputs())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = context_parallel_attention(q, k, v, meta=meta, mesh=mesh, kernel=case.kernel, strategy="relay")
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@lru_cache(maxsize=2)
def _exact(case: RingNumerics) -> list[torch.Tensor]:
    q, k, v, dout = (x.double() for x in case.inputs())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, kernel="reference")
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def measurements(case: RingNumerics) -> list[Measurement]:
    """The errors of one ring, as rows of a results file."""
    config = f"ring {case.world}, {case.label}, {case.seq_len} tokens"
    where = environment("cpu", 0)
    return [
        Measurement(name="numerics/ring", config=config, metric=name, value=error, unit="relative RMS", **where)  # type: ignore[arg-type]
        for name, error in case.errors().items()
    ]


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m longctx.numerics`."""
    p = argparse.ArgumentParser(prog="python -m longctx.numerics", description=(__doc__ or "").splitlines()[0])
    p.add_argument(
        "--rings", default=",".join(map(str, WORLDS)), metavar="N,N,...", help="ranks; the first is compared with"
    )
    p.add_argument(
        "--csv", type=Path, metavar="FILE", help="append the errors, such as benchmarks/results/numerics.csv"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m longctx.numerics`; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        words = args.rings.split(",")
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            raise ConfigError(f"--rings {args.rings}: give whole numbers of ranks, such as 1,2,4")
        body, rows = [], []
        for dtype in DTYPES:
            for wire in WIRES:
                cases = [RingNumerics(world=int(word), dtype=dtype, wire=wire) for word in words]
                found = [measurements(case) for case in cases]
                rows += [row for of_ring in found for row in of_ring]
                for tensor in zip(*found, strict=True):
                    cells = [f"{row.value:.3e} ({row.value / tensor[0].value:.3f})" for row in tensor]
                    body.append([f"{cases[0].label}: {tensor[0].metric}", *cells])
        print(markdown(["relative RMS error (over the first)", *(f"ring {word}" for word in words)], body))
        if args.csv:
            append(args.csv, rows)
    except LongCtxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
