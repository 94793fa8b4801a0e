"""The attention module that a model calls: the same call on one device and over many."""

from __future__ import annotations

from torch import Tensor, nn

from longctx.errors import ShapeError
from longctx.functional import attention, context_parallel_attention
from longctx.layout import SequenceMeta
from longctx.parallel.mesh import ParallelMesh


class ParallelAttention(nn.Module):
    """Attention over sequences that are cut over the ring, or Ulysses, or both, of a mesh. Owns no parameters.

    Put it where a model attends, after positions were applied to q and k (from `meta.positions`, never from a local
    count): the rest of the model works on its shard alone.

    Args:
        mesh: whose processes share the sequences. None: this process holds them whole.
        kernel: "auto", or a name from `longctx.kernels.kernel_names`.
        scale: multiplies q @ k^T. None: 1 / sqrt(head dim).
    """

    def __init__(self, mesh: ParallelMesh | None = None, *, kernel: str = "auto", scale: float | None = None) -> None:
        super().__init__()
        self.mesh = mesh
        self.kernel = kernel
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, meta: SequenceMeta) -> Tensor:
        """Attend.

        Args:
            q: "b s h d", this rank's shard, in the order of `meta.positions`.
            k, v: "b s hk d", likewise.
            meta: where the shard stands in the sequence, and who sees whom.

        Returns:
            "b s h d" in q's dtype.

        Raises:
            ShapeError, KernelError, DistributedError: as `longctx.functional.context_parallel_attention`.
        """
        if self.mesh is None:
            if meta.ring_world * meta.ulysses_world != 1:
                raise ShapeError(
                    f"this shard is one of {meta.ring_world * meta.ulysses_world}, but ParallelAttention has no mesh: give it the ParallelMesh"
                )
            if meta.seq_len != q.shape[1]:
                raise ShapeError(f"meta describes {meta.seq_len:_} positions, but q has {q.shape[1]:_}")
            return attention(q, k, v, mask=meta.mask, scale=self.scale, kernel=self.kernel)
        return context_parallel_attention(q, k, v, meta=meta, mesh=self.mesh, scale=self.scale, kernel=self.kernel)

    def extra_repr(self) -> str:
        ring, ulysses = (1, 1) if self.mesh is None else (self.mesh.ring.size, self.mesh.ulysses.size)
        degrees = f"ring={ring}" + (f", ulysses={ulysses}" if ulysses > 1 else "")
        return f"{degrees}, kernel={self.kernel!r}" + (f", scale={self.scale}" if self.scale is not None else "")
