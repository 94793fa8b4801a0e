"""What FlashAttention-2 came after, as contenders, and all of them in the order of their years: the benchmark's sweep."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from longctx.peers import Case, Contender, Differentiated, Ours, Unavailable, contenders


class Standard(Differentiated):
    """Attention as its formula says: scores, softmax and output by three calls of torch, the scores in memory.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1.
    """

    name, title = "standard", "standard (torch)"

    def attend(self, case: Case) -> Callable[..., torch.Tensor]:
        # Scores, probabilities and both gradients, and one copy on the way; bf16.
        needed = 5 * 2 * case.batch * case.heads * case.seq_len**2
        there = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 4 << 30
        if needed > there:
            raise Unavailable(f"its scores need about {needed / 2**30:.0f} GiB, the device has {there / 2**30:.0f}")
        hidden = None if case.mask == "full" else ~case.rule.materialize(case.seq_len)
        hidden_on: dict[torch.device, torch.Tensor] = {}
        group = case.heads // case.kv_heads

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
            s = q @ k.transpose(-1, -2) * case.scale
            if hidden is not None:
                if s.device not in hidden_on:
                    hidden_on[s.device] = hidden.to(s.device)
                s = s.masked_fill(hidden_on[s.device], float("-inf"))
            return (s.softmax(-1) @ v).transpose(1, 2)

        return attend


class FlashAttention1(Differentiated):
    """The schedule of FlashAttention-1; see `longctx.flash1`."""

    name, title = "fa1", "FA1 schedule"

    def attend(self, case: Case) -> Callable[..., torch.Tensor]:
        from longctx.flash1 import HEAD_DIMS, Flash1
        from longctx.kernels.tiles import INTERPRETING

        if not (torch.cuda.is_available() or INTERPRETING):
            raise Unavailable("runs on GPUs, or in Triton's interpreter")
        if case.mask not in ("causal", "full") or case.heads != case.kv_heads or case.head_dim not in HEAD_DIMS:
            raise Unavailable(f"it is causal or full, with as many key heads as query heads, of {HEAD_DIMS}")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return Flash1.apply(q, k, v, case.scale, case.mask == "causal")

        return attend

    def lse(self, case: Case) -> Callable[..., torch.Tensor] | None:
        from longctx.flash1 import forward

        def lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            _, m, l = forward(q, k, v, scale=case.scale, is_causal=case.mask == "causal")
            return (m + l.log2()) * math.log(2)

        return lse


def sweep_contenders(ours: tuple[str, ...]) -> list[Contender]:
    """From attention's formula to today's kernels, in the order in which they came: what is measured over the length.

    Flex is not among them: it compiles every length anew, which takes longer than all the others together.
    """
    peers = [c for c in contenders(()) if c.name != "flex"]
    return [Standard(), FlashAttention1(), *peers, *(Ours(name) for name in ours)]
