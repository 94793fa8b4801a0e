"""flash-attn-4 as a block kernel: the calls that are made of it, on a stand-in that computes what its interface promises."""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import subprocess
import sys
import types

import block_cases
import pytest
import torch
from block_cases import VISIBLE, Case

from longctx import peers
from longctx.errors import KernelError
from longctx.kernels import block_kind, flash4, get_kernel
from longctx.masks import UNBOUNDED, KeyRange

# The arguments of flash-attn-4 4.0.0b36, in their order, as far as its calls reach.
RECORDED = {
    "_flash_attn_fwd": (
        *(
            "q",
            "k",
            "v",
            "qv",
            "cu_seqlens_q",
            "cu_seqlens_k",
            "seqused_q",
            "seqused_k",
            "max_seqlen_q",
            "max_seqlen_k",
        ),
        *("min_seqlen_k", "page_table", "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right"),
        *("learnable_sink", "tile_mn", "mma_pv_is_rs", "intra_wg_overlap", "num_threads", "num_splits", "pack_gqa"),
        *("_arch", "score_mod", "mask_mod", "block_sparse_tensors", "return_lse", "out", "lse"),
    ),
    "_flash_attn_bwd": (
        *("q", "k", "v", "out", "dout", "lse", "softmax_scale", "causal", "softcap", "window_size_left"),
        *("window_size_right", "m_block_size", "n_block_size", "num_threads", "pack_gqa"),
    ),
    "flash_attn_func": ("q", "k", "v", "qv", "gather_kv_indices", "softmax_scale", "causal", "window_size"),
    "flash_attn_varlen_func": (
        *("q", "k", "v", "qv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "min_seqlen_k"),
        *("seqused_q", "seqused_k", "gather_kv_indices", "page_table", "softmax_scale", "causal", "window_size"),
    ),
}
KINDS = [name for name in VISIBLE if name not in ("rows", "rows_per_sequence")]


def _scores(q, k, scale, causal, left, right):
    """s "b h sq sk", -inf where the mask hides; k for every query head. The last row stands beside the last key."""
    for limit in (left, right):
        assert limit is None or limit >= 0, "what a negative limit means, the interface does not say"
    sq, sk = q.shape[1], k.shape[1]
    place = torch.arange(sq)[:, None] + sk - sq
    key = torch.arange(sk)[None]
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if causal:
        right = 0
    if left is not None:
        seen &= key >= place - left
    if right is not None:
        seen &= key <= place + right
    assert bool(seen.any(1).all()), "a row sees nothing"
    return (torch.einsum("bihd,bjhd->bhij", q, k) * scale).masked_fill(~seen, -math.inf)


def _flash_attn_fwd(
    q, k, v, *, softmax_scale, causal=False, window_size_left=None, window_size_right=None, return_lse=False
):
    assert return_lse
    assert q.dtype == k.dtype == v.dtype
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = _scores(q, k, softmax_scale, causal, window_size_left, window_size_right)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v), s.logsumexp(-1), None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, *, softmax_scale, causal=False, window_size_left=None, window_size_right=None
):
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert q.dtype == k.dtype == v.dtype == out.dtype == dout.dtype
    assert q.shape == out.shape == dout.shape
    b, sk, hk, d = k.shape
    group = q.shape[2] // hk
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    p = torch.exp(_scores(q, k, softmax_scale, causal, window_size_left, window_size_right) - lse[..., None])
    delta = (out * dout).sum(-1).transpose(1, 2)
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta[..., None]) * softmax_scale
    dk, dv = torch.einsum("bhij,bihd->bjhd", ds, q), torch.einsum("bhij,bihd->bjhd", p, dout)
    return torch.einsum("bhij,bjhd->bihd", ds, k), *(t.view(b, sk, hk, group, d).sum(3) for t in (dk, dv))


@pytest.fixture
def stand_in(monkeypatch):
    """A `flash_attn.cute.interface`; supports() takes the CPU for the GPU that it needs."""
    interface = types.ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    for name in ("flash_attn", "flash_attn.cute"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(flash4.FlashAttention4, "supports", lambda self, **_: None)


@pytest.mark.parametrize(("sq", "sk"), [(45, 45), (20, 61), (61, 20), (1, 9), (9, 1)])
@pytest.mark.parametrize("visible", KINDS)
def test_every_block_that_it_takes(visible, sq, sk, stand_in):
    block_cases.check(Case("flash4", "float32", visible, sq, sk, heads=4, kv_heads=2, strided=True))


def test_state_is_carried_over_blocks(stand_in):
    block_cases.check(Case("flash4", "float32", "full", 45, 45, blocks=3, heads=4, kv_heads=2))


@pytest.mark.parametrize("visible", KINDS)
def test_last_and_only_blocks(visible, stand_in):
    block_cases.check_last_and_only(Case("flash4", "float32", visible, 33, 51))


def test_a_causal_block_is_called_causal(stand_in):
    """Not a window without a left end: that is another kernel of theirs, and a slower one."""

    def calls(key_range):
        return [
            (rows, keys, flash4._limits(inside, rows.stop - rows.start, keys.stop - keys.start))
            for rows, keys, inside in get_kernel("flash4").pieces(key_range, 6, 9)
        ]

    assert calls(KeyRange.causal()) == [(slice(0, 6), slice(0, 6), {"causal": True})]
    window = {"window_size_left": 2, "window_size_right": 0}
    assert calls(KeyRange("band", -2, 1)) == [(slice(0, 6), slice(0, 6), window)]
    # Rows that see nothing are cut off: the last one's place is beside the last key of what is left.
    assert calls(KeyRange("band", -UNBOUNDED, -3)) == [(slice(4, 6), slice(0, 2), {"causal": True})]
    assert calls(KeyRange("band", -UNBOUNDED, -5)) == []


def test_what_it_leaves_to_others(monkeypatch):
    kernel = get_kernel("flash4")
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(KernelError, match="kernel 'flash4' has none"):
        kernel.forward(q, q, q, KeyRange.full(), scale=1.0, softcap=2.0)
    monkeypatch.setattr(flash4, "flash4_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    block = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128, "kind": "causal"}
    assert kernel.supports(**block) is None
    for change, said in (
        ({"device": torch.device("cpu")}, "NVIDIA GPU"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 100}, "multiple of 8"),
        ({"head_dim": 264}, "up to 256"),
        ({"kind": "rows"}, "not 'rows'"),
        ({"softcap": 30.0}, "softcap"),
    ):
        assert said in kernel.supports(**(block | change))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "9.0 only, this GPU has 10.0" in kernel.supports(**block)


def test_only_the_known_release_is_taken(monkeypatch):
    flash4.flash4_missing.cache_clear()
    for version, said in (
        (None, "is not installed"),
        ("4.1.0", "4.1.0 is installed, and this code"),
        ("4.0.0b36", None),
    ):

        def answer(name, version=version):
            if version is None:
                raise importlib.metadata.PackageNotFoundError
            return version

        monkeypatch.setattr(importlib.metadata, "version", answer)
        missing = flash4.flash4_missing()
        assert missing is None if said is None else said in missing
        flash4.flash4_missing.cache_clear()


def test_asking_what_it_can_does_not_import_it():
    code = """
import sys, torch
from longctx.kernels import get_kernel
get_kernel("flash4").supports(device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=64, kind="full")
assert not any(name.split(".")[0] == "flash_attn" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_stand_in_takes_what_the_release_takes():
    for ours in (_flash_attn_fwd, _flash_attn_bwd):
        arguments, recorded = inspect.signature(ours).parameters.values(), RECORDED[ours.__name__]
        assert {x.name for x in arguments} <= set(recorded)
        # What is passed by its place has the same one there.
        placed = [x.name for x in arguments if x.kind == x.POSITIONAL_OR_KEYWORD]
        assert placed == list(recorded[: len(placed)])


def test_the_recorded_arguments_are_those_of_the_installed_release():
    if (missing := flash4.flash4_missing()) is not None:
        pytest.skip(missing)
    from flash_attn.cute import interface

    for name, recorded in RECORDED.items():
        assert tuple(inspect.signature(getattr(interface, name)).parameters)[: len(recorded)] == recorded


def test_the_benchmarks_calls_are_those_of_the_release(monkeypatch):
    """The peer in tables: packed documents and windows, by names that the release has."""
    package, called = types.ModuleType("flash_attn.cute"), []

    def accepting(name):
        def call(q, k, v, **options):
            assert set(options) <= {*RECORDED[name], "return_lse"}
            called.append((name, options))
            return q, torch.zeros(*q.shape[:-3], q.shape[-2], q.shape[-3])

        return call

    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        setattr(package, name, accepting(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    plain = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, device=None, **k: plain(*a, **k))
    fa4 = next(c for c in peers.contenders(()) if c.name == "fa4")
    for mask in ("causal", "full", "window", "docs"):
        case = peers.Case(batch=1, seq_len=40, heads=4, kv_heads=2, head_dim=16, mask=mask, window=8)
        t = case.inputs(torch.device("cpu"), torch.float32)
        assert fa4.attend(case)(t["q"], t["k"], t["v"]).shape == t["q"].shape
        assert fa4.lse(case)(t["q"], t["k"], t["v"]).shape == (1, 4, 40)
    kinds = [(name, x["causal"], x.get("window_size")) for name, x in called[::2]]
    assert kinds == [
        ("flash_attn_func", True, None),
        ("flash_attn_func", False, None),
        # flash-attention counts the keys to the left, without the row's own.
        ("flash_attn_func", True, (7, 0)),
        ("flash_attn_varlen_func", True, None),
    ]
    assert called[-1][1]["cu_seqlens_q"].tolist() == [0, 40]
    assert called[-1][1]["return_lse"]


@pytest.mark.gpu
# What flash-attn-4 imports, and compiles, says so of itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("visible", KINDS)
def test_on_a_gpu(visible, head_dim):
    case = Case("flash4", "bfloat16", visible, 333, 515, heads=4, kv_heads=2, head_dim=head_dim)
    kind = block_kind(VISIBLE[visible](case.batch, case.sq, case.sk))
    reason = get_kernel("flash4").supports(
        device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=head_dim, kind=kind, direction="backward"
    )
    if reason is not None:
        pytest.skip(reason)
    block_cases.check(case, "cuda")
