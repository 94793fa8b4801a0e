"""Speed and utilisation, metrics.jsonl across kills and resumes, progress on a terminal and elsewhere, wandb's settings."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch

from longctx import metrics
from longctx.data import DataConfig, ShardedLoader, open_dataset
from longctx.errors import ConfigError
from longctx.layout import Contiguous
from longctx.masks import Causal, Documents, SlidingWindow
from longctx.metrics import LogConfig, Meter, MetricsFile, StepWork, causal_area, peak_flops, read_metrics, step_work
from longctx.parallel.journal import Account
from longctx.progress import Progress, duration, in_bytes, in_thousands, log_to
from longctx.recorder import Recorder, WandbRun
from longctx.shapes import ModelShape
from longctx.telemetry import StepTelemetry, mean_telemetry, tells

SHAPE = ModelShape(
    num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=264, num_params=1000
)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("lengths", [[1], [12], [5, 1, 6], [1] * 12], ids=str)
def test_causal_area_is_what_the_masks_say(lengths, window):
    edges = [0]
    for n in lengths:
        edges.append(edges[-1] + n)
    mask = Documents(tuple(edges)) & Causal()
    if window is not None:
        mask = mask & SlidingWindow(window)
    assert causal_area(lengths, window) == mask.area(sum(lengths))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    text = folder / "text"
    text.mkdir()
    for i, size in enumerate((3, 50, 7, 200, 1, 90)):
        (text / f"{i}.txt").write_text("x" * size)
    return open_dataset(DataConfig(path=str(text), cache_dir=str(folder / "cache"), seq_len=32))


@pytest.mark.parametrize("mask_documents", [True, False], ids=["documents", "stream"])
@pytest.mark.parametrize("window", [None, 5], ids=["all", "window5"])
def test_step_work_is_the_area_of_the_batches_of_all_ranks(dataset, mask_documents, window):
    def loader(dp_rank):
        return ShardedLoader(
            dataset,
            seq_len=32,
            micro_batch_size=2,
            accumulation_steps=2,
            dp_rank=dp_rank,
            dp_world=2,
            layout=Contiguous(),
            mask_documents=mask_documents,
            prefetch=False,
        )

    area = 0
    for dp_rank in range(2):
        for batch in loader(dp_rank).step(8):
            mask = batch.meta.mask if window is None else batch.meta.mask & SlidingWindow(window)
            # A mask that all sequences of the batch share has the area of one.
            area += mask.area(32) * (1 if mask.batch else len(batch.tokens))
    for dp_rank in range(2):
        work = step_work(loader(dp_rank), 8, window=window)
        assert work == StepWork(tokens=8 * 32, area=area, dense_area=8 * 32 * 32 // 2)


def test_meter_counts_windows_and_averages_without_the_first_steps():
    meter = Meter(SHAPE, world_size=4, peak=1e9, warmup=2)
    work = StepWork(tokens=1000, area=3000, dense_area=10_000)
    meter.add(work, seconds=50.0, data_seconds=10.0)
    assert meter.average() is None
    first = meter.window()
    assert (first.seconds, first.data_seconds) == (50.0, 10.0)
    for _ in range(3):
        meter.add(work, seconds=2.0, data_seconds=0.5)
    window, average = meter.window(), meter.average()
    assert window.tokens_per_second == pytest.approx(500)
    assert window.tokens_per_second_per_gpu == pytest.approx(125)
    flops = 6 * 1000 * 1000 + 12 * 2 * 4 * 16 * 3000
    dense = 6 * 1000 * 1000 + 12 * 2 * 4 * 16 * 10_000
    assert window.tflops == pytest.approx(flops / (2.0 * 4) / 1e12)
    assert window.mfu == pytest.approx(flops / (2.0 * 4) / 1e9)
    assert window.mfu_dense == pytest.approx(dense / (2.0 * 4) / 1e9)
    assert average == window, "the slow first steps are not in the average"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Radeon VII", None),
    ],
)
def test_peaks_by_device_name(name, peak, monkeypatch):
    monkeypatch.setattr(metrics.torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), "bf16") == peak
    assert peak_flops(torch.device("cuda", 0), "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_metrics_file_goes_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, first_step=0)
    file.write("run", {"first_step": 0})
    for step in range(5):
        file.write("step", {"step": step, "loss": 0.1 + step})
    assert len(read_metrics(path)) == 5, "each line is on the disk when written"
    file.close()
    # Killed here, in the middle of a line; the last checkpoint is that of step 3.
    with path.open("a") as torn:
        torn.write('{"kind": "step", "ste')
    file = MetricsFile(path, first_step=3)
    file.write("run", {"first_step": 3})
    for step in range(3, 6):
        file.write("step", {"step": step, "loss": 0.1 + step})
    file.close()
    file.write("step", {"step": 6, "loss": 1.0})
    assert [r["step"] for r in read_metrics(path)] == [0, 1, 2, 3, 4, 5]
    assert [r["loss"] for r in read_metrics(path)] == [0.1 + step for step in range(6)], "floats come back exactly"
    assert [r["first_step"] for r in read_metrics(path, "run")] == [0, 3]
    assert not list(path.parent.glob("*.partial"))


def test_read_metrics_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="there is no"):
        read_metrics(tmp_path / "nothing.jsonl")


def make_recorder(tmp_path, *, style, total, every):
    stream = io.StringIO()
    progress = Progress(total, style=style, unit="rank", stream=stream)
    recorder = Recorder(progress, Meter(SHAPE, world_size=1), WandbRun(LogConfig(), tmp_path, {}), every=every)
    recorder.open(MetricsFile(tmp_path / "metrics.jsonl", first_step=0))
    return recorder, stream


def record_steps(recorder, total):
    work = StepWork(tokens=100, area=1000, dense_area=2000)
    for step in range(total):
        recorder.step({"step": step, "loss": 5.0 - step}, work, seconds=0.5, data_seconds=0.1, memory=3 << 30)
    recorder.summary(memory=4 << 30, saved="step-5", folder="runs/x")
    recorder.close("done")


def test_plain_lines_every_so_many_steps_and_at_the_end(tmp_path):
    recorder, stream = make_recorder(tmp_path, style="plain", total=5, every=2)
    record_steps(recorder, 5)
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert [line.split("|")[0].strip() for line in steps] == ["step 1/5", "step 3/5", "step 4/5"]
    assert "loss 2.0000" in steps[1]
    assert "200 tok/s | 200 tok/s/rank" in steps[1]
    assert "mem 3.0 GiB" in steps[1]
    assert "data wait 20%" in steps[1]
    assert steps[1].endswith("ETA 0:00")
    assert "loss 5.0000 -> 3.0000 (mean of the last 5 steps)" in lines[-2]
    assert "peak memory 4.0 GiB" in lines[-2]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3, 4]
    (summary,) = read_metrics(tmp_path / "metrics.jsonl", "summary")
    assert summary["steps"] == 5
    assert summary["tokens_per_second"] == pytest.approx(200)
    (end,) = read_metrics(tmp_path / "metrics.jsonl", "end")
    assert end["reason"] == "done"


def told(exposed, attention, flops, sent):
    return tells(Account(exposed_s=exposed, attention_s=attention, flops=flops, bytes_sent=sent))


def test_telemetry_of_ranks():
    rows = [told(0.1, 1.0, 3e12, 100.0), told(0.3, 3.0, 5e12, 300.0)]
    t = StepTelemetry.of(rows)
    assert (t.exposed_comm_ms, t.exposed_comm_ms_max, t.comm_bytes) == (200.0, 300.0, 200.0)
    assert (t.attention_ms, t.attention_imbalance, t.attention_tflops) == (2000.0, 1.5, 2.0)
    idle = StepTelemetry.of([told(0.0, 0.0, 0.0, 0.0)])
    assert (idle.attention_imbalance, idle.attention_tflops) == (1.0, 0.0)
    slow = StepTelemetry.of([told(0.0, 6.0, 6e12, 0.0)] * 2)
    both = mean_telemetry([t, slow])
    # 8 TFLOP in 4 rank-seconds and 12 in 12: 20 in 16.
    assert both.attention_tflops == pytest.approx(20 / 16)
    assert (both.exposed_comm_ms, both.exposed_comm_ms_max, both.comm_bytes) == (100.0, 300.0, 100.0)
    assert mean_telemetry([idle, idle]) == idle


def test_telemetry_is_kept_and_shown_over_the_steps_of_a_record(tmp_path):
    recorder, stream = make_recorder(tmp_path, style="plain", total=4, every=2)
    work = StepWork(tokens=100, area=1000, dense_area=2000)
    for step, exposed in enumerate((0.01, 0.03, 0.05, 0.07)):
        telemetry = StepTelemetry.of([told(exposed, 0.2, 1e9, 50.0), told(exposed, 0.1, 1e9, 50.0)])
        recorder.step({"step": step, "loss": 1.0}, work, seconds=0.5, data_seconds=0.0, memory=1, telemetry=telemetry)
    recorder.summary(memory=1, saved="step-4", folder="runs/x")
    recorder.close("done")
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["exposed_comm_ms"], second["exposed_comm_ms"]) == (pytest.approx(20), pytest.approx(60))
    assert second["exposed_comm_share"] == pytest.approx(0.12)
    assert "telemetry" not in second, "flat, as wandb shows it"
    (summary,) = read_metrics(tmp_path / "metrics.jsonl", "summary")
    # Without the first two steps.
    assert summary["exposed_comm_ms"] == pytest.approx(60)
    assert "exposed comm 12.0% | imbalance 1.33" in stream.getvalue()


def test_a_bar_is_live_and_lets_lines_through(tmp_path):
    recorder, stream = make_recorder(tmp_path, style="bar", total=3, every=1)
    recorder.progress.say("a line of its own")
    record_steps(recorder, 3)
    recorder.progress.close()
    recorder.progress.say("after the bar")
    text = stream.getvalue()
    assert "loss 3.0000" in text
    assert "3/3" in text
    assert "mem 3.0 GiB" in text
    assert re.search(r"(^|\r|\n)a line of its own\n", text)
    assert text.endswith("after the bar\n")


def test_auto_style_is_plain_where_there_is_no_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert Progress(3, stream=io.StringIO()).style == "plain"
    bar = Progress(3, stream=Terminal())
    assert bar.style == "bar"
    bar.close()


def test_off_is_silent(tmp_path):
    recorder, stream = make_recorder(tmp_path, style="off", total=2, every=1)
    record_steps(recorder, 2)
    assert stream.getvalue() == ""
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2, "the file is always written"


def test_utilisation_is_shown_where_the_peak_is_known():
    from longctx.progress import describe_rates

    meter = Meter(SHAPE, world_size=1, peak=1e9, warmup=0)
    meter.add(StepWork(tokens=100, area=1000, dense_area=2000), seconds=0.01, data_seconds=0.0)
    assert re.search(r"MFU \d+\.\d% \(dense \d+\.\d%\)", " ".join(describe_rates(meter.window(), unit="GPU")))


def test_library_notes_and_warnings_are_shown_once():
    import logging

    said = []
    log_to(said.append)
    try:
        log_to(said.append)
        logging.getLogger("longctx.kernels").info("kernel chosen")
        logging.getLogger("longctx.data").warning("odd bytes")
    finally:
        log_to(None)
    assert [line.split(maxsplit=1) for line in said] == [["note", "kernel chosen"], ["warning", "odd bytes"]]
    assert not logging.getLogger("longctx").handlers


def test_log_config_problems():
    assert LogConfig().problems() == []
    found = LogConfig(every=0, progress="loud", wandb="of", project="").problems()
    assert [p.what.split(" ")[0] for p in found] == ["log.every", "log.progress", "log.wandb", "log.project"]


def test_wandb_off_does_nothing(tmp_path):
    run = WandbRun(LogConfig(wandb="off"), tmp_path / "run", {"a": 1})
    run.log({"step": 0, "loss": 1.0})
    run.finish(0)
    assert run.where is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01"), (90_000, "25:00:00")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_short_numbers():
    assert [in_thousands(x) for x in (0, 999, 1234, 56_780, 999_000, 1.5e6, 2e13)] == [
        *("0", "999", "1.23k", "56.8k", "999k", "1.50M", "20.0T")
    ]
    assert [in_bytes(x) for x in (0, 1023, 1024, 3 << 30)] == ["0 B", "1023 B", "1.0 KiB", "3.0 GiB"]


def test_every_record_is_valid_json(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", first_step=0)
    file.write("step", {"step": 0, "mfu": None, "loss": 1 / 3})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["loss"] == 1 / 3
    file.close()
