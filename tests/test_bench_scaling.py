"""`longctx bench scaling`: runs on one and two processes, read again from their folders, in a table and a figure."""

from __future__ import annotations

import json

import pytest

from longctx import bench, bench_scaling, figures, results, tables
from longctx.bench_scaling import Point
from longctx.errors import ConfigError
from longctx.results import Measurement, read

TINY = [
    "--train.device=cpu", "--model.vocab_size=264", "--model.hidden_size=32", "--model.num_layers=1", "--model.num_heads=2",
    "--model.num_kv_heads=2", "--engine.dtype=fp32",
]  # fmt: skip


def test_the_points():
    found = bench_scaling.points([1, 2, 4], [1024], [512])
    assert {(p.kind, p.gpus, p.seq_len) for p in found} == {
        *(("strong", n, 1024) for n in (1, 2, 4)),
        *(("weak", n, 512 * n) for n in (1, 2, 4)),
    }
    work = [p.seq_len**2 / p.gpus for p in found]
    assert work == sorted(work), "the shortest come first"
    assert len({p.folder(bench_scaling.Path("x")) for p in found}) == len(found)
    assert [p.label for p in (Point("strong", 2, 1 << 17), Point("weak", 2, 1 << 15))] == [
        "128k tokens",
        "32k tokens a GPU",
    ]


def test_the_commands(tmp_path):
    words = bench_scaling.command(Point("weak", 4, 1024), "x.toml", tmp_path, 5, ["--engine.zero_stage=3"])
    said = " ".join(words)
    for part in (
        "--nproc-per-node 4 -m longctx train --config x.toml",
        "--data.seq_len=4096 --train.steps=5",
        f"--train.run_dir={tmp_path}/weak-1k-4gpus",
        "--log.wandb=offline",
        "--engine.zero_stage=3 --parallel.ring=4",
    ):
        assert part in said
    words = bench_scaling.command(Point("strong", 4, 1024), None, tmp_path, 5, ["--parallel.ulysses={gpus}"])
    assert words[-1] == "--parallel.ulysses=4"
    assert not any(word.startswith(("--config", "--parallel.ring")) for word in words)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ([], "ring"),
        (["--engine.zero_stage=3"], "ring, zero_stage=3"),
        (["--parallel.ulysses={gpus}"], "ulysses"),
        (["--parallel.tp=2", "--parallel.context={gpus}"], "tp=2, context"),
    ],
)
def test_plans_are_named_by_what_is_set(settings, name):
    assert bench_scaling.plan_name(settings) == name


def test_one_and_two_processes(tmp_path, capsys):
    """As a user calls it, twice: the second time everything is read."""
    csv, png = tmp_path / "scaling.csv", tmp_path / "scaling.png"
    words = ["scaling", "--gpus", "1", "2", "--strong", "256", "--steps", "4", "--runs", str(tmp_path / "runs")]
    words += ["--csv", str(csv), "--plot", str(png), *TINY]
    assert bench.main(words) == 0, capsys.readouterr().err
    first, rows = capsys.readouterr().out, read(csv)
    assert "[2/2] strong, 256 tokens, 1 GPU: runs; " in first
    assert {r.gpus for r in rows} == {1, 2}
    (config,) = {r.config for r in rows}
    assert config.endswith("M parameters, 256 tokens, packed documents, ring, dtype=fp32")
    by = {(r.gpus, r.metric): r.value for r in rows}
    for n in (1, 2):
        assert by[n, "tokens/s a GPU"] == pytest.approx(by[n, "tokens/s"] / n, rel=1e-4)
        assert by[n, "tflops"] > 0
        assert list((tmp_path / "runs" / f"strong-256-{n}gpus" / "wandb").glob("offline-run-*"))
    assert "| 2 x cpu | " in first
    assert png.read_bytes()[:4] == b"\x89PNG"

    assert bench.main(words) == 0
    assert "[1/2] strong, 256 tokens, 2 GPUs: complete, read from " in capsys.readouterr().out
    assert read(csv) == rows, "nothing is written twice"

    # Wherever the folders are, they are read.
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    moved = [str(tmp_path / "elsewhere") if word == str(tmp_path / "runs") else word for word in words]
    # And under another commit they are what they were.
    assert bench.main([*moved, "--commit", "later"]) == 0
    assert capsys.readouterr().out.count("complete, read from ") == 2
    assert read(csv) == rows
    (tmp_path / "elsewhere").rename(tmp_path / "runs")

    # The same folder is not taken for what other settings would have given.
    assert bench.main([*words, "--engine.zero_stage=0"]) == 1
    assert "holds a run of other settings: remove it, or name another folder with --runs" in capsys.readouterr().err


def test_a_run_that_fails_leaves_its_last_words_and_the_others_their_rows(tmp_path, capsys, monkeypatch):
    def start(words, folder, commit):
        if "2gpus" in folder.name:
            raise ConfigError("exit code 1; out of memory")

    monkeypatch.setattr(bench_scaling, "start", start)
    monkeypatch.setattr(bench_scaling, "rows_of", lambda point, *rest: [measured(point.gpus, 1.0)])
    rows, failed = bench_scaling.measure(
        bench_scaling.points([1, 2], [256], []), tmp_path, lambda point: ["python"], "ring", None
    )
    assert [r.gpus for r in rows] == [1]
    assert list(failed.values()) == ["exit code 1; out of memory"]
    assert "256 tokens, 2 GPUs: exit code 1; out of memory" in capsys.readouterr().err


def test_what_a_failing_command_said(tmp_path):
    words = ["python3", "-c", "import sys; print('a reason'); sys.exit(3)"]
    with pytest.raises(ConfigError, match=r"(?s)exit code 3; all that it said is in .*output.txt, and last:\na reason"):
        bench_scaling.start(words, tmp_path / "run", "abc")
    told = json.loads((tmp_path / "run" / "command.json").read_text())
    assert told == {"commit": "abc", "command": words[1:]}
    assert not bench_scaling.is_complete(tmp_path / "run", words)


def test_a_folder_of_another_run_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "summary"}\n')
    with pytest.raises(ConfigError, match="holds a run of other settings"):
        bench_scaling.is_complete(tmp_path, ["python"])
    (tmp_path / "command.json").write_text('{"commit": null, "command": []}')
    assert bench_scaling.is_complete(tmp_path, ["python", f"--train.run_dir={tmp_path}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to measure: name lengths with --strong 128k"),
        (["--strong", "1k", "--steps", "2"], "the first 2 warm up, so 3 are the least"),
        (["--strong", "1k", "--gpus", "0"], "a run has at least one"),
        (["--strong", "1k", "--zero", "3"], "'--zero' is neither an option nor a setting"),
        (["--strong", "1k", "--data.seq_len=64"], "--data.seq_len is what this command sets itself"),
    ],
)
def test_bad_options_are_refused(words, message, capsys):
    assert bench.main(["scaling", *words]) == 2
    assert message in capsys.readouterr().err


def measured(gpus: int, value: float, metric: str = "tflops", kind: str = "strong") -> Measurement:
    where = results.environment("GPU X", gpus, commit="c")
    return Measurement(
        name=f"scaling/{kind}", config="1B, 128k tokens, ring", metric=metric, value=value, unit="TFLOP/s", **where
    )


def test_table_and_figure():
    rows = [measured(4, 360.0), measured(1, 400.0), measured(2, 390.0), measured(2, 41.5, "mfu")]
    lines = tables.scaling_table(rows).splitlines()
    assert [line.split(" | ")[-1] for line in lines[-3:]] == ["100.0 % |", "97.5 % |", "90.0 % |"]
    picture = figures.scaling_lines(rows)
    ((panel,),) = picture.panels
    assert panel.title == "strong"
    ring, level = panel.lines
    assert ring.points == ((1, 400.0), (2, 390.0), (4, 360.0))
    assert level.points == ((1, 400.0), (2, 400.0), (4, 400.0))
    assert picture.ticks == ((1, "1"), (2, "2"), (4, "4"))
