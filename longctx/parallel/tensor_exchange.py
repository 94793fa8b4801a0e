"""The messages of tensor parallelism: sums, maxima and gathered tokens over the ranks that share matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from longctx.errors import DistributedError
from longctx.parallel.exchange import find, register
from longctx.parallel.journal import Journal


class TensorExchange:
    """Sums and maxima over the ranks that share matrices.

    Its messages are noted in the journal, so that a report of a hang names them, and are no part of what the journal
    accounts for attention.

    Args:
        group: of the ranks, in tp order; None for one rank alone.
        prefix: how this rank's messages to the user begin.
        journal: where its messages are noted; None: one of its own.

    Attributes:
        handle: names this exchange in a custom op's arguments; empty for one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, prefix: str = "", journal: Journal | None = None) -> None:
        self._group = group
        self._prefix = prefix
        self.journal = Journal() if journal is None else journal
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world = dist.get_world_size(group) if group is not None else 1
        self._peers = tuple(dist.get_process_group_ranks(group)) if group is not None else (0,)
        self.handle = "" if group is None else register(self, "tensor")

    def all_reduce(
        self,
        x: torch.Tensor,
        *,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        what: str = "sum",
        layer: int | None = None,
    ) -> torch.Tensor:
        """Replace x, contiguous and of one shape and dtype on all ranks, by the sum (or maximum) of every rank's; returns it.

        Args:
            what: names the message in errors and reports, as in `all_gather` and `reduce_scatter`.
            layer: of a model, likewise.

        Raises:
            DistributedError: a rank died, or did not answer in time.
        """
        if self._group is not None:
            self._carry(lambda: dist.all_reduce(x, op=op, group=self._group), what, layer)
        return x

    def all_gather(self, x: torch.Tensor, *, what: str = "gathering", layer: int | None = None) -> list[torch.Tensor]:
        """Every rank's x, of one shape and dtype on all, in rank order.

        Raises:
            DistributedError: as `all_reduce`.
        """
        if self._group is None:
            return [x]
        gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world)]
        self._carry(lambda: dist.all_gather(gathered, x.contiguous(), group=self._group), what, layer)
        return gathered

    def reduce_scatter(
        self, pieces: list[torch.Tensor], *, what: str = "scattered sum", layer: int | None = None
    ) -> torch.Tensor:
        """The sum of every rank's `pieces[rank]`: a new tensor. `pieces`: one for each rank, contiguous, of one shape and dtype.

        Raises:
            DistributedError: as `all_reduce`.
        """
        if self._group is None:
            return pieces[0].clone()
        out = torch.empty_like(pieces[0])
        self._carry(lambda: dist.reduce_scatter(out, pieces, group=self._group), what, layer)
        return out

    def warm_up(self, device: torch.device) -> None:
        """Add up one number of everyone, so that connections are made now, in the same order on all ranks."""
        if self._group is None:
            return
        heard = float(self.all_reduce(torch.full((1,), float(self.rank), device=device), what="first contact"))
        if heard != self.world * (self.world - 1) / 2:
            raise DistributedError(f"{self._prefix} first contact: the tp ranks add up to {heard:g}")

    def _carry(self, collective: Callable[[], object], what: str, layer: int | None) -> None:
        """One message, an operation of its own: noted, posted and waited for at once."""
        try:
            self.journal.exchange(what, layer, self._peers, collective)
        except RuntimeError as error:
            where = "" if layer is None else f"layer {layer}, "
            raise DistributedError(
                f"{self._prefix} {where}{what} over the tp ranks {list(self._peers)} failed: {error}\n"
                "       one of them died, hangs, or is at another place of the program: look for the first error among "
                "all ranks"
            ) from error


def get_tensor_exchange(handle: str) -> tuple[TensorExchange, int | None]:
    """The exchange of that handle, and the layer that uses it if `at_layer` said so; an empty handle is one rank alone.

    Raises:
        DistributedError: its mesh is gone.
    """
    return find(handle, TensorExchange) if handle else (TensorExchange(None), None)
