"""Which degrees of parallelism given heads and matrices allow, and into which ring x ulysses a number of processes is best split.

By arithmetic alone, from the estimates of `longctx.parallel.cost`: of each split's time of one attention layer, forward and
backward, on machines of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from longctx.errors import PlanError, Problem
from longctx.layout import SequenceLayout
from longctx.masks import AttentionMask
from longctx.parallel.cost import (
    KERNEL_FLOPS,
    Estimate,
    Rates,
    Shape,
    attention_seconds,
    estimates,
    exchange_estimates,
    hop_shares,
    ranked,
)
from longctx.sequence import padded_sequence

# Parts that a rank's heads are thought of as being exchanged in at most.
_PARTS = 8
# Splits that the reason names, the fastest first.
_NAMED = 4


def tensor_problems(tp: int, ring: int, sizes: dict[str, int | None]) -> list[Problem]:
    """What keeps `tp` ranks from sharing matrices of such sizes, with what would work.

    Args:
        ring: what fewer of them could be made up for by.
        sizes: what is divided among the ranks, by name; None: not asked about.
    """
    asked = {name: size for name, size in sizes.items() if size is not None and size >= 1}
    if tp <= 1 or all(size % tp == 0 for size in asked.values()):
        return []
    # More heads or another model are seldom a choice, a longer vocabulary is: it needs rows that no token uses.
    fixed = [size for name, size in asked.items() if name != "vocab_size"]
    degrees = [t for t in range(1, min(asked.values()) + 1) if all(size % t == 0 for size in fixed)]
    wrong = [f"{name} {size:_}" for name, size in asked.items() if size % tp]
    hints = []
    if tp not in degrees:
        nearest = max(t for t in degrees if t < tp and tp * ring % t == 0)
        hints.append(
            f"nearest for the same processes: tp {nearest} with ring {tp * ring // nearest}; these heads and projections "
            f"allow tp {', '.join(map(str, degrees))}"
        )
    if asked.get("vocab_size", 0) % tp:
        hints.append(f"model.vocab_size {-(-asked['vocab_size'] // tp) * tp:_} is a multiple of {tp}")
    verb = "is not a multiple" if len(wrong) == 1 else "are no multiples"
    what = " and ".join([", ".join(wrong[:-1]), wrong[-1]]) if wrong[1:] else wrong[0]
    return [Problem(f"{what} {verb} of tp {tp}", "; ".join(hints))]


def ulysses_problems(num_heads: int, num_kv_heads: int, *, ulysses: int, ring: int, tp: int = 1) -> list[Problem]:
    """What keeps Ulysses of that degree from dividing such heads, with the nearest degrees that would.

    Every rank gets as many query heads as the others, and whole key heads that serve just these: query heads must be a
    multiple of the degree, and key heads a multiple of it or a divisor.

    Args:
        num_heads, num_kv_heads: that each of the `tp` ranks that share the heads has.
    """
    if heads_divide(num_heads, num_kv_heads, ulysses):
        return []
    each = f" of each of {tp} tp ranks" if tp > 1 else ""
    if num_heads % ulysses:
        what = f"num_heads {num_heads}{each} is not a multiple of ulysses {ulysses}"
    else:
        what = (
            f"num_kv_heads {num_kv_heads}{each} and ulysses {ulysses}: neither is a multiple of the other, so ranks would need "
            "different numbers of key heads"
        )
    sp = ring * ulysses
    same = [u for u in range(1, sp + 1) if sp % u == 0 and heads_divide(num_heads, num_kv_heads, u)]
    same.sort(key=lambda u: (abs(u - ulysses), -u))
    plans = " or ".join(f"ulysses {u} with ring {sp // u}" for u in same[:2])
    degrees = [u for u in range(1, num_heads + 1) if heads_divide(num_heads, num_kv_heads, u)]
    return [
        Problem(
            what, f"nearest for the same processes: {plans}; these heads allow ulysses {', '.join(map(str, degrees))}"
        )
    ]


def heads_divide(num_heads: int, num_kv_heads: int, ulysses: int) -> bool:
    return num_heads % ulysses == 0 and (num_kv_heads % ulysses == 0 or ulysses % num_kv_heads == 0)


def possible_chunks(num_heads: int, num_kv_heads: int, *, ring: int) -> list[int]:
    """Numbers of equal chunks that the heads of one Ulysses rank can be exchanged in, ascending.

    Whole groups of query heads with their key heads, or parts of one such group; not the latter beside a ring, which would
    pass the same keys round for each part.

    Args:
        num_heads, num_kv_heads: of one rank.
        ring: degree of the ring inside.
    """
    return [
        n
        for n in range(1, num_heads + 1)
        if num_heads % n == 0 and (num_kv_heads % n == 0 or (ring == 1 and n % num_kv_heads == 0))
    ]


def chunk_problems(chunks: int | None, num_heads: int, num_kv_heads: int, *, ulysses: int, ring: int) -> list[Problem]:
    """What keeps the heads that Ulysses exchanges from going in so many chunks, with what would work; None: as fits.

    Args:
        num_heads, num_kv_heads: which the `ulysses` ranks divide.
    """
    if chunks is None or not heads_divide(num_heads, num_kv_heads, ulysses):
        return []
    if ulysses == 1:
        return [Problem(f"ulysses_chunks = {chunks}, but no heads are exchanged", "leave it out, or use ulysses 2")]
    mine, mine_kv = num_heads // ulysses, max(num_kv_heads, ulysses) // ulysses
    possible = possible_chunks(mine, mine_kv, ring=ring)
    if chunks in possible:
        return []
    return [
        Problem(
            f"ulysses_chunks = {chunks}: the {mine} query and {mine_kv} key heads of a rank cannot be exchanged in so many "
            f"parts{' beside a ring' * (ring > 1)}",
            f"one of {', '.join(map(str, possible))}, or leave it out",
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Attention of one layer over one sequence, as far as the choice of degrees depends on it.

    Args:
        num_heads, num_kv_heads: of each tp rank.
        seq_len: global length.
        mask: who sees whom; documents, which differ from batch to batch, are best left out.
        batch: sequences at a time.
        itemsize, grad_itemsize: bytes of one element of activations, and of key gradients between the ring's processes.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    seq_len: int
    mask: AttentionMask
    batch: int = 1
    itemsize: int = 2
    grad_itemsize: int = 4


@lru_cache(maxsize=16)
def choose_degrees(
    context: int,
    work: Work,
    *,
    layout: SequenceLayout,
    strategies: tuple[str, ...],
    tp: int = 1,
    node_size: int | None = None,
    may_cross_nodes: bool = False,
    chunks: int | None = None,
) -> tuple[int, int, str]:
    """ring, ulysses, and why, for `context` processes that share each sequence. The same wherever it is asked; remembered.

    Args:
        layout: of the ring.
        strategies: names of those that the ring may use.
        tp: processes that share the matrices; those of one Ulysses rank stand between it and the next.
        node_size: processes on each machine; None: all are on one.
        may_cross_nodes: whether Ulysses may exchange heads between machines.
        chunks: in which heads are exchanged; None: the best.

    Raises:
        PlanError: no split serves these heads, this length and these machines.
    """
    splits = [(context // u, u) for u in range(1, context + 1) if context % u == 0]
    fitting = [(r, u) for r, u in splits if heads_divide(work.num_heads, work.num_kv_heads, u)]
    if node_size is not None and not may_cross_nodes:
        fitting = [(r, u) for r, u in fitting if node_size % (u * tp) == 0]
    if chunks is not None:
        fitting = [
            (r, u)
            for r, u in fitting
            if not chunk_problems(chunks, work.num_heads, work.num_kv_heads, ulysses=u, ring=r)
        ]
    if work.seq_len < context or not fitting:
        raise PlanError(
            f"context {context} cannot be split into a ring and ulysses for sequences of {work.seq_len:_} tokens and "
            f"{work.num_heads}/{work.num_kv_heads} heads\n"
            "       use a context that is shorter than the sequence, and leave out ulysses_chunks"
        )

    def of_machine(size: int) -> bool:
        return node_size is None or node_size % (size * tp) == 0

    found = {
        (ring, ulysses): attention_estimate(
            ring,
            ulysses,
            work,
            layout,
            strategies,
            chunks,
            ring_in_one_node=of_machine(context),
            ulysses_in_one_node=of_machine(ulysses),
        )
        for ring, ulysses in fitting
    }
    # Among equals the one that exchanges fewer heads: a ring's messages are behind attention.
    ranked = sorted(found, key=lambda split: (found[split].total, split[1]))
    told = [
        f"{_split(*split)} {1e3 * found[split].total:.2f} ms ({1e3 * found[split].exposed:.2f} of it waiting)"
        for split in ranked[:_NAMED]
    ]
    left = f", {len(ranked) - _NAMED} more" * (len(ranked) > _NAMED)
    out = [_split(*split) for split in splits if split not in found]
    refused = f"; {', '.join(out)} would not fit the heads or a machine" * bool(out)
    where = "one machine" if node_size is None or context * tp <= node_size else f"machines of {node_size}"
    ring, ulysses = ranked[0]
    return (
        ring,
        ulysses,
        (
            f"{_split(ring, ulysses)} of context {context}: {work.seq_len:_} tokens, {work.num_heads}/{work.num_kv_heads} heads of "
            f"{work.head_dim}, {where}; estimated for attention of a layer, forward and backward: {', '.join(told)}{left}{refused}"
        ),
    )


@lru_cache(maxsize=256)
def attention_estimate(
    ring: int,
    ulysses: int,
    work: Work,
    layout: SequenceLayout,
    strategies: tuple[str, ...],
    chunks: int | None,
    *,
    ring_in_one_node: bool,
    ulysses_in_one_node: bool,
) -> Estimate:
    """Of one split, with the strategy that the ring would take and the way in which heads would be exchanged; remembered."""
    length, mask, layout = padded_sequence(work.seq_len, work.mask, layout, ring, ulysses)
    hops = hop_shares(mask, layout, ring, length)
    shape = Shape(
        batch=work.batch,
        local_len=length // ring,
        num_heads=work.num_heads // ulysses,
        num_kv_heads=max(work.num_kv_heads, ulysses) // ulysses,
        head_dim=work.head_dim,
        itemsize=work.itemsize,
        grad_itemsize=work.grad_itemsize,
    )
    rates = Rates(*KERNEL_FLOPS["hopper"])
    of_ring = estimates(shape, hops, dict.fromkeys(strategies, rates), in_one_node=ring_in_one_node)
    best = of_ring[ranked(of_ring)[0]]
    if ulysses == 1:
        return best
    possible = possible_chunks(shape.num_heads, shape.num_kv_heads, ring=ring) if chunks is None else [chunks]
    splits = exchange_estimates(
        shape,
        hops,
        rates,
        ulysses=ulysses,
        chunks=[n for n in possible if n <= _PARTS or chunks is not None],
        in_one_node=ulysses_in_one_node,
    )
    split = ranked(splits)[0]
    exchange = splits[split]
    # Both count the products.
    added = exchange.total - attention_seconds(shape, hops, rates)
    return replace(
        best,
        total=best.total + added,
        exposed=best.exposed + exchange.exposed,
        exchanged=exchange.exchanged,
        groups=best.groups * split.chunks,
    )


def _split(ring: int, ulysses: int) -> str:
    return f"ring {ring} x ulysses {ulysses}"
