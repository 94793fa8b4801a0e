"""Which degrees of parallelism given heads and matrices allow."""

from __future__ import annotations

from longctx.errors import Problem


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
