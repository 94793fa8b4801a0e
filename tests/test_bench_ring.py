"""`longctx bench ring` on tiny sizes: every contender is checked before it is timed, and leaves a time or a reason."""

from __future__ import annotations

import contextlib

import pytest
import torch

from longctx import bench, bench_ring, bench_ring_output, bench_ring_timing
from longctx.peers import Case, Unavailable
from longctx.peers_ring import OneGpuHalo, Ranks, RingContender, SilentLink, ring_contenders
from longctx.results import read
from longctx.testing import run_distributed

NAMES = [c.name for c in ring_contenders(["auto"])]


def test_smoke(tmp_path):
    """As a user calls it: processes of its own, a file and a picture."""
    csv, png = tmp_path / "x.csv", tmp_path / "x.png"
    assert bench.main(["ring", "--smoke", "--csv", str(csv), "--plot", str(png)]) == 0
    rows = read(csv)
    # Two key heads over two ranks: in 4 chunks they do not go, nor do two of query heads.
    ours = {name for name in NAMES if "torch" not in name} - {"ulysses-4"}
    assert {r.name.removeprefix("ring/") for r in rows} == ours | {
        "ulysses-torch",
        "one GPU: ours",
        "one GPU: cuDNN (torch)",
        "one GPU: ours, share and halo",
    }
    assert {r.config for r in rows} == {f"{c.label}, 2 ranks" for c in bench_ring.SMOKE_CASES}
    assert all(r.value > 0 for r in rows if r.unit == "TFLOP/s")
    silent = {r.name for r in rows if r.metric == "forward+backward exposed"}
    assert silent == {f"ring/{name}" for name in ours}
    assert {r.name for r in rows if r.metric == "forward waiting" and r.value >= 0} == silent
    window = [r for r in rows if r.name == "ring/one GPU: ours, share and halo"]
    assert {r.config for r in window} == {f"{bench_ring.SMOKE_CASES[1].label}, 2 ranks"}
    assert png.read_bytes()[:4] == b"\x89PNG"


class Wrong(RingContender):
    name, title, is_ours = "wrong", "wrong", True

    def __init__(self, spoil):
        self.spoil = spoil
        self.ours = next(c for c in ring_contenders(["auto"]) if c.name == "direct-auto")

    def meta(self, case, ranks):
        return self.ours.meta(case, ranks)

    def prepare(self, case, ranks):
        return contextlib.nullcontext(lambda q, k, v: self.spoil(self.ours.prepare(case, ranks).__enter__()(q, k, v)))


class NanInGradients(torch.autograd.Function):
    """The same, with gradients that are no numbers."""

    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout * float("nan")


class Refusing(Wrong):
    name = "refusing"

    def prepare(self, case, ranks):
        raise Unavailable("not today")


def twins(rank: int) -> dict[str, object]:
    ranks = Ranks(rank, 2, torch.device("cpu"))
    case = bench_ring.SMOKE_CASES[0]
    found = {}
    # The second is wrong on one rank only, the third in its gradients only.
    spoils = {
        "right": lambda out: out,
        "one rank": lambda out: out + rank,
        "gradients": lambda out: out + (out * 0.1 - (out * 0.1).detach()),
        "nan": lambda out: NanInGradients.apply(out),
    }
    for name, spoil in spoils.items():
        result = bench_ring.measure(case, [Wrong(spoil), Refusing(spoil)], ranks, torch.float32)
        found[name] = (result.wrong, result.refused.get("wrong", ""), result.refused["refusing"], "wrong" in result.ms)
    return found


def test_wrong_results_have_no_time():
    for found in run_distributed(twins, world=2):
        assert found["right"] == ([], "", "not today", True)
        for name in ("one rank", "gradients", "nan"):
            wrong, why, _, has_time = found[name]
            assert wrong == ["wrong"]
            assert why.startswith("WRONG RESULT: relative error ")
            assert not has_time


def turns(rank: int) -> list[tuple]:
    """What a side did in two turns, of which the first says that a call is short."""
    done = []

    def local():
        done.append("local")
        return [torch.ones(1, 4, 1, 8) for _ in range(4)]

    @contextlib.contextmanager
    def opened():
        done.append("open")
        yield [attend("as it is"), attend("silent")]
        done.append("close")

    def attend(name):
        def run(q, k, v):
            done.append(name)
            return q + k + v

        return run

    side = bench_ring_timing.Side("x", local, opened)
    ranks = Ranks(rank, 2, torch.device("cpu"))
    side.take_turn(ranks)
    first, done[:] = list(done), []
    side.take_turn(ranks)
    (real, silent) = side.medians_ms(ranks)
    return [first, done, side.rounds, sorted(real), sorted(silent)]


def test_a_side_takes_its_turn():
    for first, second, rounds, *metrics in run_distributed(turns, world=2):
        assert first == ["local", "open", *2 * ["as it is", "silent"], "close"]
        # A short call is warmed up and repeated, with messages and without by turns.
        often = bench_ring_timing.MOST_CALLS
        assert second == ["local", "open", *2 * (1 + often) * ["as it is", "silent"], "close"]
        assert rounds == bench_ring_timing.ROUNDS
        assert metrics == 2 * [sorted(bench_ring_output.METRICS)]


def test_shares_and_rates():
    case = Case(batch=1, seq_len=1024, heads=4, kv_heads=2, head_dim=64)
    result = bench_ring.RingResult(case)
    result.ms = {
        "one GPU: ours": {"forward": 2.0, "forward+backward": 8.0},
        "one GPU: cuDNN (torch)": {"forward": 3.0, "forward+backward": 7.0},
        "direct-nccl": {"forward": 4.0, "forward+backward": 10.0},
    }
    result.silent_ms["direct-nccl"] = {"forward": 3.5, "forward+backward": 9.0}
    result.waited_ms["direct-nccl"] = {"forward": 0.25, "forward+backward": 0.75}
    for metric, ms in zip(bench_ring_output.METRICS, (2.0, 7.0), strict=True):
        work = case.forward_flops / 2 * (1 if metric == "forward" else 3.5)
        assert result.best_alone(metric, 2) == pytest.approx(work / ms / 1e9)
    assert result.tflops("direct-nccl", "forward", 2) == pytest.approx(case.forward_flops / 2 / 4e-3 / 1e12)
    assert result.tflops("direct-nccl", "forward+backward", 2) == pytest.approx(
        3.5 * case.forward_flops / 2 / 1e-2 / 1e12
    )
    assert result.exposed("direct-nccl", "forward+backward") == 1.0
    assert result.exposed("one GPU: ours", "forward") is None
    said = bench_ring.table([result], ring_contenders(["nccl"]), 2)
    assert said.startswith(f"{case.label}\n")
    assert "0.500" in said
    assert "0.700" in said
    assert "+0.50 ms (+12.5%) / +1.00 ms (+10.0%)  0.25 ms / 0.75 ms" in said
    # A GPU that had more to do is measured by its rate.
    result.flops["one GPU: ours"] = case.forward_flops
    assert result.best_alone("forward", 2) == pytest.approx(case.forward_flops / 2.0 / 1e9)


def test_the_default_table_is_the_projects():
    assert [c.label for c in bench_ring.DEFAULT_CASES] == [
        "1 x 16k, 32/8 heads of 128, causal",
        "1 x 32k, 32/8 heads of 128, causal",
        "1 x 64k, 32/8 heads of 128, causal",
        "1 x 128k, 32/8 heads of 128, causal",
        "1 x 64k, 32/32 heads of 128, causal",
        "1 x 128k, 32/8 heads of 128, docs",
        "1 x 256k, 32/8 heads of 128, window 4k",
    ]


def test_rows_and_sms_are_chosen_by_name():
    args = bench_ring.parser().parse_args(
        ["--rows", "docs", "window", "--sms", "4", "16", "--only", "direct-nccl-4sms"]
    )
    assert [c.label for c in bench_ring._cases(args, 2)] == [c.label for c in bench_ring.DEFAULT_CASES[-2:]]
    (chosen,) = bench_ring._entrants(args, 2)
    assert chosen.title == "ours: direct, nccl (4sms)"
    names = [c.name for c in ring_contenders(["nccl"], [4, 16])]
    assert {"direct-nccl-4sms", "direct-nccl-16sms", "direct-nccl-no-priority", "direct-nccl-again"} <= set(names)
    assert len(set(names)) == len(names)


def test_lengths_may_be_of_each_gpu():
    words = ["--tokens-per-gpu", "8k", "32k", "--heads", "64", "--kv-heads", "8", "--mask", "docs"]
    assert [c.label for c in bench_ring._cases(bench_ring.parser().parse_args(words), 8)] == [
        "1 x 64k, 64/8 heads of 128, docs",
        "1 x 256k, 64/8 heads of 128, docs",
    ]


def test_rings_of_ulysses_are_measured_where_there_are_enough_ranks():
    def hybrids(world):
        return [c.name for c in ring_contenders(["nccl"], world=world) if c.name.startswith("hybrid")]

    assert [hybrids(n) for n in (2, 3, 4, 8)] == [[], [], ["hybrid-2x2"], ["hybrid-2x4", "hybrid-4x2"]]


def test_on_four_ranks_a_hybrid_is_right_and_has_its_times(tmp_path):
    csv = tmp_path / "x.csv"
    words = ["--smoke", "--nproc", "4", "--only", "hybrid-2x2", "--rows", "causal", "--csv", str(csv)]
    assert bench.main(["ring", *words]) == 0
    rows = [r for r in read(csv) if r.name == "ring/hybrid-2x2"]
    assert {r.config for r in rows} == {f"{bench_ring.SMOKE_CASES[0].label}, 4 ranks"}
    assert {"forward", "forward+backward", "forward exposed", "forward waiting"} <= {r.metric for r in rows}


def wrong_in_one_head(rank: int) -> list[str]:
    """What is said of contenders whose output errs in one head, of a sequence of which two of three key heads are compared."""
    case = Case(batch=1, seq_len=64, heads=6, kv_heads=3, head_dim=16)
    bench_ring.CHECKED_WHOLE = 32
    said = []
    for head in (0, 2, 5):
        off = (torch.arange(case.heads) == head).float()[:, None]
        entrant = Wrong(lambda out, off=off: out + off)
        result = bench_ring.measure(case, [entrant], Ranks(rank, 2, torch.device("cpu")), torch.float32)
        said.append(result.refused.get("wrong", ""))
    return said


def test_of_long_sequences_the_first_and_the_last_heads_are_compared():
    for first, middle, last in run_distributed(wrong_in_one_head, world=2):
        assert first.startswith("WRONG RESULT")
        assert middle == ""
        assert last.startswith("WRONG RESULT")


def test_what_is_not_sent_is_replaced_by_numbers():
    """A GPU computes faster on zeros, and on what happens to lie in a new buffer."""
    link = SilentLink(0, 2)
    kv, heads = torch.zeros(2, 3, 4), torch.zeros(2, 8, dtype=torch.uint8)
    link.swap([], [kv, kv[0]], to=1, source=1, room=1000)()
    assert (kv != 0).all()
    link.all_to_all(torch.ones(2, 8, dtype=torch.uint8), heads)()
    assert (heads == 1).all()


def test_a_share_with_its_halo():
    """The last rank's rows see the window before them, which the ring sends; one GPU has as many tokens more."""
    case = bench_ring.DEFAULT_CASES[-1]
    share, _ = OneGpuHalo().attend(case, Ranks(0, 2, torch.device("cpu")))
    assert share.seq_len == (128 << 10) + 4096
    assert share.heads == case.heads
    # Its rate is what counts; it has the halo's own rows more to do than a rank.
    assert case.forward_flops / 2 < share.forward_flops < case.forward_flops / 2 * (1 + 4096 / (128 << 10))
    with pytest.raises(Unavailable, match="only a window"):
        OneGpuHalo().attend(bench_ring.DEFAULT_CASES[0], Ranks(0, 2, torch.device("cpu")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--smoke", "--only", "dirct-auto"], "ConfigError: --only dirct-auto: did you mean 'direct-auto'?"),
        (["--smoke", "--heads", "4", "--kv-heads", "3"], "--heads 4 is not a multiple of --kv-heads 3"),
        (["--smoke", "--sms", "4"], "--sms is about NCCL's kernels"),
        (["--smoke", "--rows", "16k"], "ConfigError: --rows '16k' is in none of:"),
        (["--smoke", "--nproc", "1"], "a ring has at least two GPUs"),
        (["--smoke", "--tokens-per-gpu", "32", "--shapes", "64"], "--tokens-per-gpu and --shapes both say how long"),
    ],
    ids=["only", "heads", "sms", "rows", "one", "lengths"],
)
def test_bad_options_are_refused(capsys, words, message):
    assert bench.main(["ring", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without GPUs")
def test_without_gpus_it_refuses(capsys):
    assert bench.main(["ring"]) == 2
    assert "`longctx bench ring --smoke` runs tiny sizes on the CPU" in capsys.readouterr().err
