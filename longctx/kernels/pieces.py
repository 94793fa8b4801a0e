"""What every kernel does around its launch: a block is checked and cut into the pieces that the kernel knows.

The kernels differ in what they launch on a piece, and in which pieces there are: the Triton ones take most blocks whole,
cuDNN only what is full or causal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from longctx.errors import KernelError
from longctx.kernels import SoftmaxState, check_block, check_softcap
from longctx.masks import KeyRange


class Piece(NamedTuple):
    """An interval of a block's rows and one of its keys, and which of these the rows see."""

    rows: slice
    keys: slice
    visible: KeyRange


def plain_pieces(key_range: KeyRange, sq: int, sk: int) -> Iterator[Piece]:
    """The block as one piece; of one whose rows see one interval of keys or nothing, these rows and keys as a full piece.

    Raises:
        ShapeError: `key_range` was made for other lengths.
    """
    if key_range.kind == "empty" or sq == 0 or sk == 0:
        return
    found = key_range.rectangle
    if found is None:
        yield Piece(slice(0, sq), slice(0, sk), key_range)
        return
    key_range.bounds(sq, sk)  # refuses intervals of other lengths
    yield Piece(slice(*found[:2]), slice(*found[2:]), KeyRange.full())


class PiecewiseAttention(ABC):
    """`BlockAttention` for kernels that are told pieces: `attend` and `differentiate` are called with what is not empty."""

    def pieces(self, key_range: KeyRange, sq: int, sk: int) -> Iterator[Piece]:
        """The pieces of a block, which cover what is visible once; none where nothing is."""
        return plain_pieces(key_range, sq, sk)

    def check_options(self, scale: float, softcap: float) -> None:
        """
        Raises:
            KernelError: a scale or softcap that this kernel cannot do.
        """
        check_softcap(softcap)

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visible: KeyRange,
        *,
        scale: float,
        softcap: float,
        state: SoftmaxState | None,
        final: bool,
    ) -> SoftmaxState:
        """`BlockAttention.forward` of one piece."""

    @abstractmethod
    def differentiate(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        visible: KeyRange,
        *,
        scale: float,
        softcap: float,
        out: torch.Tensor,
        dq_acc: torch.Tensor,
        dk_acc: torch.Tensor,
        dv_acc: torch.Tensor,
        fresh: bool,
    ) -> None:
        """`BlockAttention.backward` of one piece."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_range: KeyRange,
        *,
        scale: float,
        softcap: float = 0.0,
        state: SoftmaxState | None = None,
        final: bool = False,
    ) -> SoftmaxState:
        check_block(q, k, v)
        self.check_options(scale, softcap)
        pieces = self._pieces(key_range, q, k)
        options: dict[str, Any] = {"scale": scale, "softcap": softcap}
        if len(pieces) == 1 and pieces[0].rows == slice(0, q.shape[1]):
            _, keys, visible = pieces[0]
            return self.attend(q, k[:, keys], v[:, keys], visible, state=state, final=final, **options)
        state = SoftmaxState.empty_like(q) if state is None else state
        for rows, keys, visible in pieces:
            part = SoftmaxState(state.out[:, rows], state.lse[:, :, rows])
            # Not final: what is written must be the state's memory.
            self.attend(q[:, rows], k[:, keys], v[:, keys], visible, state=part, final=False, **options)
        return state

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        key_range: KeyRange,
        *,
        scale: float,
        softcap: float = 0.0,
        out: torch.Tensor,
        dq_acc: torch.Tensor,
        dk_acc: torch.Tensor,
        dv_acc: torch.Tensor,
        fresh: bool = False,
    ) -> None:
        check_block(q, k, v, dout=dout, out=out)
        self.check_options(scale, softcap)
        pieces = self._pieces(key_range, q, k)
        if fresh and not pieces:
            dk_acc.zero_()
            dv_acc.zero_()
        for i, (rows, keys, visible) in enumerate(pieces):
            is_first = fresh and i == 0
            dk_part, dv_part = (_begin_fresh(acc, keys) if is_first else acc[:, keys] for acc in (dk_acc, dv_acc))
            self.differentiate(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], lse[:, :, rows], delta[:, :, rows], visible,
                scale=scale, softcap=softcap, out=out[:, rows],
                dq_acc=dq_acc[:, rows], dk_acc=dk_part, dv_acc=dv_part, fresh=is_first,
            )  # fmt: skip

    def _pieces(self, key_range: KeyRange, q: torch.Tensor, k: torch.Tensor) -> list[Piece]:
        # No heads or no batch: nothing to launch either.
        if q.numel() == 0 or k.numel() == 0:
            return []
        return list(self.pieces(key_range, q.shape[1], k.shape[1]))


def _begin_fresh(acc: torch.Tensor, keys: slice) -> torch.Tensor:
    """The part of a fresh accumulator ("b sk hk d") that a block of `keys` writes; the keys around it are set to 0."""
    if keys == slice(0, acc.shape[1]):
        return acc
    acc[:, : keys.start].zero_()
    acc[:, keys.stop :].zero_()
    return acc[:, keys]


def check_scale(scale: float) -> None:
    """
    Raises:
        KernelError: it is below 0: kernels take the running maximum before scores are scaled, which must keep their order.
    """
    if not scale >= 0:
        raise KernelError(f"scale is {scale}, but the Triton kernels need scale >= 0: negate q instead")


def refuse_softcap(kernel: str, softcap: float, why: str) -> None:
    """
    Raises:
        KernelError: there is a softcap, or what should be one is none.
    """
    if check_softcap(softcap):
        raise KernelError(f"softcap is {softcap}, but kernel {kernel!r} has none ({why}); use kernel 'auto'")


def add_gradients(
    dq_acc: torch.Tensor, dk_acc: torch.Tensor, dv_acc: torch.Tensor, grads: tuple[torch.Tensor, ...], fresh: bool
) -> None:
    """Add a piece's (dq, dk, dv) in 16 bits to the accumulators, without a copy of them in fp32.

    Args:
        fresh: dk and dv are written instead; see `BlockAttention.backward`.
    """
    dq, *of_keys = grads
    dq_acc.add_(dq)
    for acc, grad in zip((dk_acc, dv_acc), of_keys, strict=True):
        if fresh:
            acc.copy_(grad)
        else:
            acc.add_(grad)
