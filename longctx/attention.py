"""The attention module that a model calls: the same call on one device and over many."""

from __future__ import annotations

from torch import Tensor, nn

from longctx.errors import ShapeError
from longctx.functional import attention, context_parallel_attention
from longctx.kernels import check_softcap
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.strategy import ContextStrategy, get_strategy
from longctx.sequence import SequenceMeta


class ParallelAttention(nn.Module):
    """Attention over sequences that are cut over the ring, or Ulysses, or both, of a mesh. Owns no parameters.

    Put it where a model attends, after positions were applied to q and k (from `meta.positions`, never from a local
    count): the rest of the model works on its shard alone.

    Args:
        mesh: whose processes share the sequences. None: this process holds them whole.
        kernel: "auto", or a name from `longctx.kernels.kernel_names`.
        scale: multiplies q @ k^T. None: 1 / sqrt(head dim).
        softcap: bends the scores s to softcap * tanh(s / softcap), as in Gemma 2; 0 leaves them.
        strategy: how the ranks of a ring see each other's keys, as in `longctx.functional.ring_attention`. None: what the
            plan of the mesh says.
        layer: which layer of the model this is, for reports about its messages. None: they name no layer.

    Raises:
        ShapeError: `mesh` is something else.
        KernelError: softcap is negative.
        PlanError: unknown strategy.
    """

    def __init__(
        self,
        mesh: ParallelMesh | None = None,
        *,
        kernel: str = "auto",
        scale: float | None = None,
        softcap: float = 0.0,
        strategy: str | ContextStrategy | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__()
        if mesh is not None and not isinstance(mesh, ParallelMesh):
            raise ShapeError(
                f"mesh is a {type(mesh).__name__}: make one with ParallelMesh.create(plan, device=...), on every rank"
            )
        self.mesh = mesh if mesh is None or layer is None else mesh.for_layer(layer)
        self.kernel = kernel
        self.scale = scale
        self.softcap = check_softcap(softcap)
        if isinstance(strategy, str) and strategy != "auto":
            get_strategy(strategy)
        self.strategy = strategy

    def forward(self, q: Tensor, k: Tensor, v: Tensor, meta: SequenceMeta, *, sinks: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            q: "b s h d", this rank's shard, in the order of `meta.positions`.
            k, v: "b s hk d", likewise.
            meta: where the shard stands in the sequence, and who sees whom.
            sinks: [h], a learned logit for each head that joins every row's softmax, as in gpt-oss; the same on every rank
                of the ring. Its gradient is of the local rows.

        Returns:
            "b s h d" in q's dtype.

        Raises:
            ShapeError, KernelError, DistributedError: as `longctx.functional.context_parallel_attention`.
        """
        if not isinstance(meta, SequenceMeta):
            raise ShapeError(f"meta is a {type(meta).__name__}: make it with SequenceMeta.of(seq_len, ...)")
        if self.mesh is None:
            if meta.ring_world * meta.ulysses_world != 1:
                raise ShapeError(
                    f"this shard is one of {meta.ring_world * meta.ulysses_world}, but ParallelAttention has no mesh: give it the ParallelMesh"
                )
            if meta.padded_len != q.shape[1]:
                raise ShapeError(
                    f"meta describes {meta.padded_len:_} positions, but q {list(q.shape)} has {q.shape[1]:_}; q is 'b s h d'"
                )
            return attention(
                q, k, v, mask=meta.padded_mask, scale=self.scale, softcap=self.softcap, sinks=sinks, kernel=self.kernel
            )
        return context_parallel_attention(
            q,
            k,
            v,
            meta=meta,
            mesh=self.mesh,
            scale=self.scale,
            softcap=self.softcap,
            sinks=sinks,
            kernel=self.kernel,
            strategy=self.strategy,
        )

    def extra_repr(self) -> str:
        ring, ulysses = (1, 1) if self.mesh is None else (self.mesh.ring.size, self.mesh.ulysses.size)
        said = [f"ring={ring}"] + [f"ulysses={ulysses}"] * (ulysses > 1) + [f"kernel={self.kernel!r}"]
        said += [f"scale={self.scale}"] * (self.scale is not None) + [f"softcap={self.softcap:g}"] * bool(self.softcap)
        return ", ".join(said)
