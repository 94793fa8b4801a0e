"""Figures of measurements: what is drawn is what the CSV files say, and the PNGs in the repository are not older."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longctx import bench, figures, results
from longctx.errors import ConfigError
from longctx.results import RESULTS, Measurement, append, read

ROW = Measurement(
    name="attention/triton", commit="abc", date="2026-01-02T03:04:05Z", gpu="GPU X", gpus=1, torch="2", triton="3",
    config="1 x 32k, 16/16 heads of 128, causal", metric="forward", value=400.0, unit="TFLOP/s",
)  # fmt: skip


def rows(*changes: dict) -> list[Measurement]:
    return [replace(ROW, **c) for c in changes]


# Those whose file is there: of a command that has not been run on GPUs there is none.
MEASURED = [name for name in figures.FIGURES if (RESULTS / f"{name}.csv").exists()]


def test_the_figures_in_the_repository_show_their_files():
    assert {"attention", "sweep", "ring"} <= set(MEASURED)
    assert figures.outdated(RESULTS) == [], "run longctx bench redraw"
    shown = (results.ROOT / "README.md").read_text()
    for name in MEASURED:
        assert f"(benchmarks/results/{name}.png)" in shown, f"{name}.png is drawn and shown nowhere"
        assert (RESULTS / f"{name}.png").exists()


def test_bars_are_the_newest_values_of_the_newest_gpu():
    short = {"config": "1 x 16k, 16/16 heads of 128, causal"}
    picture = figures.attention_bars(
        rows(
            {"value": 1.0, "date": "2025-01-01"},
            {},
            {"metric": "backward", "value": 300.0},
            {**short, "value": 350.0},
            {"name": "attention/fa2", "value": 200.0},
            {"name": "attention/matmul", "config": "8192 cubed", "value": 800.0},
            {"name": "attention/unheard", "value": 5.0},
            {"gpu": "GPU Y", "value": 9.0, "date": "2025-01-01"},
            {"name": "attention/fa4", "value": 640.0, "source": "measured elsewhere"},
        )
    )
    forward, backward = (row[0] for row in picture.panels)
    assert [(x.label, x.is_ours, x.points) for x in forward.lines] == [
        ("FA2 (torch)", False, ((0, 200.0),)),
        ("ours: triton", True, ((0, 400.0), (1, 350.0))),
    ]
    assert [x.points for x in backward.lines] == [(), ((0, 300.0),)], "in the same order, so of the same colours"
    assert picture.ticks == ((0, "1 x 32k\n16/16 heads of 128\ncausal"), (1, "1 x 16k\n16/16 heads of 128\ncausal"))
    assert picture.bound == 800.0
    assert "GPU X" in picture.title
    beside = [
        {"name": "attention/matmul", "config": f"{n}k, 1/1 heads of 64, full", "value": v}
        for n, v in ((1, 700.0), (2, 760.0), (4, 720.0))
    ]
    whole = {"name": "attention/matmul", "config": "8192 cubed", "value": 800.0}
    picture = figures.attention_bars(rows({}, whole, *beside))
    assert picture.bound == 720.0
    assert len(picture.ticks) == 1, "a product has no place of its own"


def test_a_sweep_has_a_column_for_each_head_dim_and_mask():
    sweep = {"name": "sweep/triton"}
    long = "1 x 1024k, 1/1 heads of 64, full"
    picture = figures.sweep_lines(
        rows(
            sweep,
            {**sweep, "config": "1 x 64k, 16/16 heads of 128, causal", "value": 450.0},
            {**sweep, "config": long},
            {**sweep, "metric": "forward+backward", "value": 380.0},
        )
    )
    assert [panel.title for panel in picture.panels[0]] == ["head dim 64, full", "head dim 128, causal"]
    assert picture.panels[0][1].lines[0].points == ((32768, 400.0), (65536, 450.0))
    assert picture.panels[2][1].lines[0].points == ((32768, 380.0),)
    assert picture.ticks == ((32768, "32k"), (65536, "64k"), (1 << 20, "1024k"))


def test_a_ring_is_held_against_the_best_kernel_on_one_gpu():
    ring = {"config": "1 x 64k, 32/8 heads of 128, causal, 2 ranks", "gpus": 2}
    picture = figures.ring_bars(
        rows(
            {**ring, "name": "ring/one GPU: ours", "value": 660.0},
            {**ring, "name": "ring/one GPU: cuDNN (torch)", "value": 600.0},
            {**ring, "name": "ring/torch-cp-allgather", "value": 550.0},
            {**ring, "name": "ring/direct-nccl", "value": 650.0},
            {**ring, "name": "ring/direct-nccl", "metric": "forward exposed", "value": 0.1, "unit": "ms"},
        )
    )
    assert picture.marks == (((0, 660.0),), ())
    assert [(x.label, x.is_ours, x.points) for x in picture.panels[0][0].lines] == [
        ("torch-cp-allgather", False, ((0, 550.0),)),
        ("direct-nccl", True, ((0, 650.0),)),
    ]


def test_redraw_draws_what_there_is_and_a_changed_file_is_found(tmp_path, capsys):
    assert bench.main(["redraw", "--results", str(tmp_path)]) == 2
    assert "holds none of attention.csv" in capsys.readouterr().err
    append(tmp_path / "attention.csv", rows({}))
    append(tmp_path / "sweep.csv", rows({"name": "sweep/triton"}))
    append(tmp_path / "other.csv", rows({}))
    assert len(figures.outdated(tmp_path)) == 2
    assert bench.main(["redraw", "--results", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["attention.png", "sweep.png"]
    assert figures.outdated(tmp_path) == []
    append(tmp_path / "attention.csv", rows({"value": 410.0, "date": "2026-02-01"}))
    assert [p.name for p in figures.outdated(tmp_path)] == ["attention.png"]
    (tmp_path / "sweep.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in figures.outdated(tmp_path)] == ["attention.png", "sweep.png"]


@pytest.mark.parametrize("of", figures.FIGURES.values(), ids=list(figures.FIGURES))
def test_nothing_to_draw_is_an_error(of):
    with pytest.raises(ConfigError, match="there is nothing of"):
        of(rows({"name": "train/longctx"}))


def test_the_files_of_the_repository_have_what_their_figures_show():
    for name in MEASURED:
        picture = figures.FIGURES[name](read(RESULTS / f"{name}.csv"))
        assert all(panel.lines for row in picture.panels for panel in row), name
