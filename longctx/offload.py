"""What recomputed layers keep for backward, in the host's memory: copied out while later layers compute, fetched ahead of need.

    compute   | layer 0 | layer 1 | layer 2 | layer 3 | ... loss | backward 3 | backward 2 | backward 1 | backward 0 |
    out           | copy 0  | copy 1  | copy 2  | copy 3 |
    in                                                                        | fetch 1    | fetch 0    |

With activation checkpointing a layer keeps its input and what attention gave (`longctx.model`). The device holds this of
`LAYERS_HELD` layers (the last two never leave before backward comes); of the others it lies on the host until backward
reaches the layer behind them. That costs no time
where the copies of a layer take no longer than its compute does. A pipeline has several micro-batches under way, forward
and backward in turn: each is a chain of its own, and only the fetch of the first layer that it goes back through has no
compute to hide behind.

Nothing here waits on the host. Two rules keep streams out of each other's memory: a copy begins after all that compute was
given before it; and compute is made to wait for a copy before anyone else may use either end of it. So

*   the source of a copy out is held until the layer after the next begins, and compute waits there: only then may the
    allocator, which goes by the order of compute, hand the memory out again. (`Tensor.record_stream` would give it back when
    the host sees the copy done; a host that runs ahead of the device would meanwhile take memory for every layer.)
*   a fetch goes into memory allocated in the order of compute, which waits for it before the first use; what an abandoned
    backward pass had fetched is held until compute has waited.
*   host memory is pages of one size, pinned when first needed and kept for the next step. A page that is free was read by a
    fetch that compute has waited for, or will before the next copy out. (torch's own cache of pinned memory gives a block
    out again when the host sees its last copy done, so a host that runs ahead would pin more; and it rounds sizes up to
    powers of two.)

On a CPU the same happens with copies at once and ordinary memory: for tests.

Source: Bekman et al. 2025 (arXiv 2506.13996) for layers' inputs in the host's memory; Korthikanti et al. 2022
(arXiv 2205.05198) for what is kept and what is recomputed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.errors import LongCtxError

# Layers of which the device holds what they keep: the one at work, and the one whose copies are under way.
LAYERS_HELD = 2

# Of the host's memory. Less would be more copies; more would be left empty at the end of every tensor.
PAGE_BYTES = {"cuda": 16 << 20}
PAGE_BYTES_ELSEWHERE = 64 << 10

# (operator, its arguments) -> whether its results are kept.
IsKept = Callable[[Any, Sequence[Any]], bool]


class Lane:
    """Copies in order, beside what a device computes; on a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event | None:
        """Fill the first of each pair from the second, after all that compute was given so far."""
        if self._stream is None:
            for into, source in pairs:
                into.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def join(self, event: torch.cuda.Event | None) -> None:
        """What compute is given from now on comes after the event."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Pages:
    """Host memory that copies out take, and fetches give back."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self.page_bytes = PAGE_BYTES.get(device.type, PAGE_BYTES_ELSEWHERE)
        self._free: list[torch.Tensor] = []
        self.taken = self.made = 0

    def take(self, num_bytes: int) -> list[torch.Tensor]:
        needed = -(-num_bytes // self.page_bytes)
        while len(self._free) < needed:
            self._free.append(torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=self._pinned))
            self.made += 1
        self.taken += needed
        return [self._free.pop() for _ in range(needed)]

    def give(self, pages: list[torch.Tensor]) -> None:
        """Back, and empty the list."""
        self.taken -= len(pages)
        self._free += pages
        pages.clear()

    def parts(self, pages: list[torch.Tensor], x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(of a page, of the contiguous x), as bytes, until there is no more of x."""
        parts = x.view(-1).view(torch.uint8).split(self.page_bytes)
        return [(page[: len(part)], part) for page, part in zip(pages, parts, strict=True)]


class ActivationOffload:
    """What the layers of one model keep, of all micro-batches under way. All on one device, which the first input decides.

    Attributes:
        out, into: lanes of the copies to the host, and from it.
        pages: the host's memory.
    """

    out: Lane
    into: Lane
    pages: _Pages

    def __init__(self) -> None:
        self.device: torch.device | None = None
        # Whose tensors are on the device still; and who is being fetched.
        self._held: deque[KeptLayer] = deque()
        self._coming: KeptLayer | None = None

    def layer(self, previous: KeptLayer | None, device: torch.device) -> KeptLayer:
        """What the next layer will keep.

        Args:
            previous: of the layer before it and the same micro-batch; None for the first.
        """
        if device != self.device:
            assert self.device is None, f"layers on {self.device} and on {device} share one offload"
            self.device, self.pages, self.out, self.into = device, _Pages(device), Lane(device), Lane(device)
        self.expect(None)
        while len(self._held) >= LAYERS_HELD:
            self._held.popleft().leave()
        self._held.append(KeptLayer(self, previous))
        return self._held[-1]

    def expect(self, coming: KeptLayer | None) -> None:
        """Hold what is about to be fetched. What was fetched before may be let go once compute waits for it."""
        if self._coming is not None:
            self.into.join(self._coming.arrived)
        self._coming = coming

    @property
    def host_bytes(self) -> int:
        """Of the host's memory that holds something now. What was pinned for it stays pinned."""
        return 0 if self.device is None else self.pages.taken * self.pages.page_bytes


@dataclass
class _Tensor:
    """A kept tensor on the device (`here`), on the host (`pages`), on both, or, when backward has taken it, on neither."""

    like: torch.Tensor
    here: torch.Tensor | None
    pages: list[torch.Tensor]
    # Of the copy out.
    copied: torch.cuda.Event | None


class KeptLayer:
    """What one layer keeps of one micro-batch: its input, and results of operators in the order of the forward pass.

    Attributes:
        arrived: of the fetch; None before it, and where none was needed.
    """

    def __init__(self, offload: ActivationOffload, previous: KeptLayer | None) -> None:
        self._offload, self._previous = offload, previous
        self._tensors: list[_Tensor] = []
        # Results of an operator as they were, each tensor replaced by its place in `_tensors`.
        self._results: deque[Any] = deque()
        self.arrived: torch.cuda.Event | None = None

    def __del__(self) -> None:
        # Nobody went back through the layer, or not as far as it kept something. Copies out are in order: the next into
        # these pages comes after those that may be under way.
        for kept in self._tensors:
            self._offload.pages.give(kept.pages)

    def input(self, x: torch.Tensor) -> saved_tensors_hooks:
        """Around torch's checkpoint: x, one of its arguments, is kept here. The others stay where they are."""
        # A checkpoint hides what is saved within from hooks around it, but not its own arguments.
        address, shape = x.data_ptr(), x.shape

        def pack(saved: torch.Tensor) -> torch.Tensor | int:
            return self._keep(saved) if (saved.data_ptr(), saved.shape) == (address, shape) else saved

        def unpack(packed: torch.Tensor | int) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            self._begin_backward()
            return self._take(packed)

        return saved_tensors_hooks(pack, unpack)

    def contexts(self, is_kept: IsKept) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """`context_fn` of torch's checkpoint: results of these operators are kept here, and not computed again.

        torch's own contexts for this (`create_selective_checkpoint_contexts`) keep results where nobody else gets at them.
        """
        return _Keep(self, is_kept), _Recall(self, is_kept)

    def keep(self, results: Any) -> None:
        self._results.append(_mapped(results, torch.Tensor, self._keep))

    def recall(self) -> Any:
        return _mapped(self._results.popleft(), int, self._take)

    def leave(self) -> None:
        """Let go of the device's memory, which later layers need."""
        for kept in self._tensors:
            if kept.pages:
                self._offload.out.join(kept.copied)
                kept.here = None

    def fetch(self) -> None:
        """Start fetching what is on the host alone."""
        offload, gone = self._offload, [kept for kept in self._tensors if kept.pages and kept.here is None]
        if not gone:
            return
        offload.expect(self)
        todo = []
        for kept in gone:
            kept.here = torch.empty_like(kept.like, device=offload.device)
            todo += [(part, page) for page, part in offload.pages.parts(kept.pages, kept.here)]
        self.arrived = offload.into.copy(todo)
        for kept in gone:
            offload.pages.give(kept.pages)

    def _begin_backward(self) -> None:
        """What this layer kept must be here now, and what the one before it kept is next."""
        self.fetch()
        self._offload.into.join(self.arrived)
        if self._previous is not None:
            self._previous.fetch()
            self._previous = None

    def _keep(self, x: torch.Tensor) -> int:
        # Detached: the graph that x may hang on holds this layer. Empty ones have no pages, and so never leave.
        x, offload = x.detach().contiguous(), self._offload
        pages = offload.pages.take(x.nbytes)
        copied = offload.out.copy(offload.pages.parts(pages, x)) if pages else None
        self._tensors.append(_Tensor(torch.empty_like(x, device="meta"), x, pages, copied))
        return len(self._tensors) - 1

    def _take(self, index: int) -> torch.Tensor:
        kept = self._tensors[index]
        if kept.here is None:
            raise LongCtxError(
                "backward ran twice, but what a layer kept in the host's memory is given back the first time\n"
                "       compute the loss again for a second backward, or train without activation_offload"
            )
        if kept.pages:  # it never left
            self._offload.out.join(kept.copied)
            self._offload.pages.give(kept.pages)
        x, kept.here = kept.here, None
        return x


class _Keep(TorchDispatchMode):
    def __init__(self, layer: KeptLayer, is_kept: IsKept) -> None:
        super().__init__()
        self._layer, self._is_kept = layer, is_kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if self._is_kept(func, args):
            self._layer.keep(results)
        return results


class _Recall(_Keep):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._layer.recall() if self._is_kept(func, args) else func(*args, **(kwargs or {}))


def _mapped(x: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Every `kind` among what an operator returned, changed."""
    if isinstance(x, kind):
        return change(x)
    return type(x)(_mapped(each, kind, change) for each in x) if isinstance(x, tuple | list) else x
