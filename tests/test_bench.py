"""`longctx bench attention` on tiny sizes: every contender is checked before it is timed, and leaves a number or a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bench_contenders import CPU, SMALL, Broken
from hypothesis import given
from hypothesis import strategies as st

from longctx import bench, bench_errors, figures, kernel_rules, peers, predecessors, results, tables
from longctx.kernels import kernel_names
from longctx.peers import Case, Ours, Unavailable
from longctx.results import read


class TestCase:
    def test_the_default_table_is_the_anchors_and_two_masks_of_training(self):
        """The rows that benchmarks/results/anchors.csv has figures of, then packed documents and a window."""
        anchors = [r for r in read(results.RESULTS / "anchors.csv") if r.name == "attention/fa2"]
        labels = [c.label for c in bench.DEFAULT_CASES]
        assert labels[:-2] == list(dict.fromkeys(r.config for r in anchors))
        assert labels[-2:] == ["1 x 64k, 32/8 heads of 128, docs", "1 x 128k, 32/8 heads of 128, window 4k"]

    def test_labels(self):
        case = Case(batch=4, seq_len=8192, heads=32, kv_heads=8, head_dim=128)
        assert case.label == "4 x 8k, 32/8 heads of 128, causal"
        window = Case(batch=1, seq_len=100, heads=1, kv_heads=1, head_dim=8, mask="window", window=2048)
        assert window.label == "1 x 100, 1/1 heads of 8, window 2k"
        large = Case(batch=1, seq_len=100, heads=1, kv_heads=1, head_dim=8, logits=50.0)
        assert large.label == "1 x 100, 1/1 heads of 8, causal, logits of 50"

    def test_labels_are_read_again(self):
        for case in (*bench.DEFAULT_CASES, *bench.sweep_cases(1 << 20), *bench_errors.ERROR_CASES):
            row = results.Measurement(
                name="", commit="", date="", gpu="", gpus=1, torch="", triton="", config=case.label, metric="", value=0.0, unit=""
            )  # fmt: skip
            assert kernel_rules.AttentionCase.of(row) == (case.head_dim, case.mask, case.seq_len)

    @pytest.mark.parametrize("seq_len", [256, 4096])
    def test_large_logits_are_about_as_large_as_said(self, seq_len):
        case = Case(batch=1, seq_len=seq_len, heads=2, kv_heads=2, head_dim=64, logits=50.0)
        t = case.inputs(CPU, torch.float32)
        greatest = (torch.einsum("bihd,bjhd->bhij", t["q"], t["k"]) * case.scale).amax(-1)
        assert 35 < float(greatest.mean()) < 60
        plain = replace(case, logits=None).inputs(CPU, torch.float32)
        assert torch.equal(plain["k"], t["k"])

    def test_the_sweep(self):
        """16k tokens a batch, then one sequence, a width of 2048 that shrinks where a call would take a minute."""
        cases = bench.sweep_cases(1 << 20)
        assert len(cases) == 2 * 2 * 12
        assert {(c.head_dim, c.mask) for c in cases} == {(d, m) for d in (64, 128) for m in ("causal", "full")}
        assert {c.batch * c.seq_len for c in cases if c.seq_len <= 1 << 14} == {1 << 14}
        assert {c.batch for c in cases if c.seq_len > 1 << 14} == {1}
        assert {c.heads * c.head_dim for c in cases if c.seq_len <= 1 << 16} == {2048}
        assert {c.heads for c in cases if c.seq_len >= 1 << 19} == {1}
        # The short ones first: what a short call measures is whole.
        assert [c.seq_len for c in cases] == sorted(c.seq_len for c in cases)
        assert max(c.forward_flops for c in cases) <= 1.2e15
        assert {c.seq_len for c in bench.sweep_cases(1000)} == {512}

    @pytest.mark.parametrize("mask", ["causal", "full", "window", "docs"])
    def test_flops_are_those_of_the_masks_area(self, mask):
        case = Case(batch=2, seq_len=9000, heads=3, kv_heads=1, head_dim=8, mask=mask, window=100)
        assert case.forward_flops == 4 * 2 * 3 * 8 * case.rule.area(9000)
        assert case.key_range.area(9000, 9000, batch=2) == 2 * case.rule.area(9000)

    def test_documents_are_the_same_in_every_run_and_fill_the_sequence(self):
        ends = peers._documents(1 << 17)
        assert ends == peers._documents(1 << 17)
        assert ends[-1] == 1 << 17
        assert ends[:-1] == peers._documents(1 << 18)[: len(ends) - 1]
        assert 10 < len(ends) < 80


@given(
    seq_len=st.integers(1, 700),
    mask=st.sampled_from(["causal", "full", "window", "docs"]),
    window=st.integers(1, 300),
)
def test_flex_block_masks_are_exact(seq_len, mask, window):
    """Every visible pair is in a listed block, no block that is said to be full hides a pair."""
    case = Case(batch=1, seq_len=seq_len, heads=1, kv_heads=1, head_dim=8, mask=mask, window=window)
    block_mask = peers.flex_block_mask(case, CPU)
    dense = case.rule.materialize(seq_len)
    size, blocks = peers.FLEX_BLOCK, -(-seq_len // peers.FLEX_BLOCK)
    seen = torch.zeros(blocks, blocks, dtype=torch.bool)
    for kind in ("kv", "full_kv"):
        counts, order = getattr(block_mask, f"{kind}_num_blocks")[0, 0], getattr(block_mask, f"{kind}_indices")[0, 0]
        for i in range(blocks):
            for j in order[i, : counts[i]].tolist():
                assert not seen[i, j], "a block is listed twice"
                seen[i, j] = True
                tile = dense[i * size : (i + 1) * size, j * size : (j + 1) * size]
                if kind == "full_kv":
                    assert bool(tile.all())
                    assert tile.shape[1] == size
    for i, j in (~seen).nonzero().tolist():
        assert not dense[i * size : (i + 1) * size, j * size : (j + 1) * size].any()
    q, k = torch.arange(seq_len)[:, None], torch.arange(seq_len)[None]
    # Full blocks never ask the mask function; everywhere else it must be the mask.
    if mask != "full":
        assert torch.equal(block_mask.mask_mod(0, 0, q, k), dense)


class TestMeasure:
    def measure(self, *entrants, case=SMALL):
        return bench.measure(case, entrants, CPU, torch.float32)

    @pytest.mark.parametrize("mask", ["causal", "full", "window", "docs"])
    def test_the_reference_passes_under_every_mask(self, mask):
        case = Case(batch=2, seq_len=40, heads=4, kv_heads=2, head_dim=16, mask=mask, window=7)
        result = self.measure(Ours("reference"), case=case)
        assert result.refused == {}
        assert set(result.tflops["reference"]) == {
            "forward", "backward", "forward+backward", "block forward", "block backward",
        }  # fmt: skip
        assert all(x > 0 for x in result.tflops["reference"].values())

    @pytest.mark.parametrize(
        ("spoil", "named"),
        [
            (lambda out, dq, dk, dv: (out * 1.1, dq, dk, dv), "out"),
            (lambda out, dq, dk, dv: (out, dq.roll(1, 2), dk, dv), "dq"),
            (lambda out, dq, dk, dv: (out, dq, dk * 0.9, dv), "dk"),
            (lambda out, dq, dk, dv: (out, dq, dk, dv.roll(1, 1)), "dv"),
            (lambda out, dq, dk, dv: (out * float("nan"), dq, dk, dv), "out"),
        ],
        ids=["out", "dq", "dk", "dv", "nan"],
    )
    def test_wrong_results_get_no_number(self, spoil, named):
        result = self.measure(Ours("reference"), Broken(spoil))
        assert "broken" not in result.tflops
        assert result.wrong == ["broken"]
        assert result.refused["broken"].startswith(f"WRONG RESULT: relative error of {named} ")

    def test_whatever_is_raised_is_a_reason(self):
        class Raising(Broken):
            def prepare(self, case, q, k, v, dout):
                raise RuntimeError("no such kernel\nand more")

        class Refusing(Broken):
            name = "refusing"

            def prepare(self, case, q, k, v, dout):
                raise Unavailable("not today")

        result = self.measure(Raising(None), Refusing(None))
        assert result.refused == {"broken": "RuntimeError: no such kernel", "refusing": "not today"}
        assert result.wrong == []

    def test_both_is_the_time_of_one_after_the_other(self):
        got = self.measure(Ours("reference")).tflops["reference"]
        seconds = 1 / got["forward"] + 2.5 / got["backward"]
        assert got["forward+backward"] == pytest.approx(3.5 / seconds)

    def test_torchs_own_backend_agrees(self):
        """FA2's place is torch's flash kernel, which CPUs have too."""
        fa2 = next(c for c in peers.contenders(()) if c.name == "fa2")
        result = self.measure(fa2, Ours("reference"), case=Case(batch=1, seq_len=64, heads=2, kv_heads=2, head_dim=16))
        assert set(result.tflops) == {"fa2", "reference"}, result.refused


class TestPredecessors:
    @pytest.mark.parametrize("mask", ["causal", "full", "window", "docs"])
    def test_the_formula(self, mask):
        case = Case(batch=2, seq_len=40, heads=4, kv_heads=2, head_dim=16, mask=mask, window=7)
        result = bench.measure(case, [predecessors.Standard(), Ours("reference")], CPU, torch.float32)
        assert set(result.tflops) == {"standard", "reference"}, result.refused

    def test_scores_that_do_not_fit_are_not_tried(self):
        case = Case(batch=1, seq_len=1 << 20, heads=1, kv_heads=1, head_dim=16)
        with pytest.raises(Unavailable, match="its scores need about 10240 GiB"):
            predecessors.Standard().attend(case)

    def test_the_first_schedule_in_the_interpreter(self):
        """Several blocks of keys and of queries, with ragged ends; the second block of keys begins within a block of rows."""
        code = """
import torch
from longctx import bench, predecessors
from longctx.peers import Case, Ours
for mask, seq_len in (("causal", 150), ("full", 150), ("causal", 7)):
    case = Case(batch=2, seq_len=seq_len, heads=2, kv_heads=2, head_dim=16, mask=mask)
    entrants = [Ours("reference"), predecessors.FlashAttention1()]
    found = bench.measure_errors(case, entrants, torch.device("cpu"), torch.float32)
    assert found.refused == {}, found.refused
    assert len(found.errors["fa1"]) == 5
    for tensor, error in found.errors["fa1"].items():
        assert error <= 2 * found.errors["reference"][tensor] + 1e-7, (mask, seq_len, found.errors)
"""
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=300)

    def test_what_the_first_schedule_does_not_do(self, monkeypatch):
        case = Case(batch=1, seq_len=8, heads=2, kv_heads=1, head_dim=16)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(Unavailable, match="as many key heads"):
            predecessors.FlashAttention1().attend(case)

    def test_the_order_is_that_of_their_years(self):
        assert [c.name for c in predecessors.sweep_contenders(("triton",))] == [
            "standard", "fa1", "fa2", "cudnn-torch", "fa4", "triton",
        ]  # fmt: skip


class TestCommand:
    def test_smoke(self, tmp_path, capsys):
        """Every contender, the table, the CSV and the figure."""
        csv, png = tmp_path / "x.csv", tmp_path / "x.png"
        assert bench.main(["attention", "--smoke", "--csv", str(csv), "--plot", str(png)]) == 0
        out = capsys.readouterr().out
        for case in bench.SMOKE_CASES:
            assert case.label in out
        assert "ours / best peer" in out
        assert "FA4: flash-attn-4 is not installed" in out
        rows = read(csv)
        for name in ("attention/matmul", "attention/reference"):
            assert {r.config for r in rows if r.name == name} == {c.label for c in bench.SMOKE_CASES}
        assert all(r.unit == "TFLOP/s" and r.value > 0 for r in rows)
        assert png.read_bytes()[:4] == b"\x89PNG"

    def test_several_calls_fill_one_file(self, tmp_path, capsys, monkeypatch):
        """A call without time measures nothing, the next ones what is missing, and the last nothing more."""
        csv, png = tmp_path / "sweep.csv", tmp_path / "first.png"
        words = ["attention", "--smoke", "--sweep", "--resume", "--commit", "abc", "--csv", str(csv)]
        assert bench.main([*words, "--only", "reference", "--time", "0"]) == 0
        assert "left for another call: the 0 s of --time are over" in capsys.readouterr().out
        assert read(csv) == []
        assert bench.main([*words, "--only", "reference", "--rows", "32,"]) == 0
        half = read(csv)
        assert {r.config for r in half if r.name == "sweep/reference"} == {
            c.label for c in bench.smoke_sweep() if c.seq_len == 32
        }
        assert bench.main([*words, "--only", "standard", "reference"]) == 0
        whole = read(csv)
        assert whole[: len(half)] == half
        products = [r.config for r in whole if r.name == "sweep/matmul"]
        assert set(products) == {c.label for c in bench.smoke_sweep()}
        assert len(products) == 2 + 4, "a product takes turns with what is measured"
        assert len(whole) == len(products) + 2 * 4 * 3, "every contender, case and metric once"
        capsys.readouterr()
        assert bench.main([*words, "--only", "standard", "reference", "--plot", str(png)]) == 0
        out = capsys.readouterr().out
        assert read(csv) == whole
        for case in bench.smoke_sweep():
            assert case.label in out
        # Nothing of it goes into the README's table.
        assert tables.attention_table(whole) == "Not measured yet."
        # Other code: everything is measured again.
        words[words.index("abc")] = "def"
        assert bench.main([*words, "--only", "reference", "--rows", "32,"]) == 0
        assert len(read(csv)) == len(whole) + 2 + 2 * 3
        drawn = figures.digest_in(png)
        assert (
            drawn == figures.sweep_lines(whole, {"standard": "standard (torch)", "reference": "ours: reference"}).digest
        )

    def test_rows_are_taken_by_a_part_of_their_name(self, capsys):
        rows = bench._cases(bench.parser().parse_args(["attention", "--rows", "docs", "window"]))
        assert rows == list(bench.DEFAULT_CASES[-2:])
        rows = bench._cases(bench.parser().parse_args(["attention", "--errors", "--rows", "1 x 128k"]))
        assert [c.logits for c in rows] == [None, 50.0]
        assert bench.main(["attention", "--smoke", "--rows", "2 x 48", "64k"]) == 2
        assert "ConfigError: --rows '64k' is in none of:\n  1 x 64, 2/1 heads of 16, causal" in capsys.readouterr().err

    def test_options_make_cases(self):
        words = ["attention", "--shapes", "4x8k", "64", "--dim", "64", "128", "--heads", "8", "--kv-heads", "2"]
        cases = bench.cases_of(bench.parser().parse_args([*words, "--mask", "docs"]), ())
        assert [(c.batch, c.seq_len, c.head_dim) for c in cases] == [
            (4, 8192, 64),
            (4, 8192, 128),
            (1, 64, 64),
            (1, 64, 128),
        ]
        assert {(c.heads, c.kv_heads, c.mask) for c in cases} == {(8, 2, "docs")}
        assert bench.cases_of(bench.parser().parse_args(["attention", "--causal"]), ())[0].mask == "causal"
        assert bench.cases_of(bench.parser().parse_args(["attention"]), bench.DEFAULT_CASES) is bench.DEFAULT_CASES

    def test_only_names_contenders(self):
        got = bench._entrants(bench.parser().parse_args(["attention", "--only", "triton", "fa2"]))
        assert [c.name for c in got] == ["fa2", "triton"]
        assert {c.name for c in bench._entrants(bench.parser().parse_args(["attention"]))} >= set(kernel_names()) - {
            "reference"
        }

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--smoke", "--only", "tritn"], "ConfigError: --only tritn: did you mean 'triton'?"),
            (
                ["--smoke", "--heads", "4", "--kv-heads", "3"],
                "ConfigError: --heads 4 is not a multiple of --kv-heads 3",
            ),
            (["--smoke", "--sweep", "--dim", "64"], "ConfigError: --sweep has shapes of its own"),
            (["--smoke", "--errors", "--plot", "x.png"], "ConfigError: --errors knows no --plot"),
            (["--smoke", "--errors", "--resume"], "ConfigError: --errors knows no --resume"),
            (["--smoke", "--resume"], "ConfigError: --resume needs --csv"),
        ],
        ids=["only", "heads", "sweep", "errors", "errors_resume", "resume"],
    )
    def test_bad_options_are_refused(self, capsys, words, message):
        assert bench.main(["attention", *words]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
    def test_without_a_gpu_it_refuses(self, capsys):
        assert bench.main(["attention"]) == 2
        assert "KernelError: there is no CUDA device" in capsys.readouterr().err

    def test_a_wrong_result_of_ours_is_exit_code_1(self, monkeypatch, capsys):
        class Wrong(Broken):
            is_ours = True

        wrong = Wrong(lambda out, *grads: (out + 1, *grads))
        monkeypatch.setattr(bench, "contenders", lambda ours: [wrong])
        assert bench.main(["attention", "--smoke", "--only", "broken"]) == 1
        assert "WRONG RESULT" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["causal", "docs"])
def test_on_a_gpu_peers_and_ours_agree(mask):
    case = Case(batch=1, seq_len=1000, heads=4, kv_heads=2, head_dim=64, mask=mask)
    result = bench.measure(case, peers.contenders(("triton",)), torch.device("cuda"), torch.bfloat16)
    assert "triton" in result.tflops, result.refused
    assert "flex" in result.tflops, result.refused
    assert result.wrong == []


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_on_a_gpu_predecessors_agree(mask, head_dim):
    case = Case(batch=2, seq_len=1000, heads=2, kv_heads=2, head_dim=head_dim, mask=mask)
    result = bench.measure(case, predecessors.sweep_contenders(("triton",)), torch.device("cuda"), torch.bfloat16)
    assert {"standard", "fa1", "fa2", "triton"} <= set(result.tflops), result.refused
    assert result.wrong == []
