"""Measurements in CSV files, and the README's tables: what is shown is what the files say."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx import results, tables
from longctx.errors import ConfigError
from longctx.model import ModelConfig
from longctx.results import COLUMNS, OWN_COLUMNS, Measurement, append, main, read
from longctx.table_parts import latest
from longctx.tables import render

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), max_size=20)


def row(**changes) -> Measurement:
    base = {
        "name": "attention/triton", "commit": "abc123", "date": "2026-01-02T03:04:05Z", "gpu": "GPU X", "gpus": 1,
        "torch": "2.11.0", "triton": "3.6.0", "config": "1 x 32k, 16/16 heads of 128, causal", "metric": "forward",
        "value": 402.4, "unit": "TFLOP/s",
    }  # fmt: skip
    return Measurement(**(base | changes))


class TestFiles:
    @given(
        cells=st.lists(
            st.tuples(TEXT, TEXT, st.integers(0, 64), st.floats(1e-6, 1e9, allow_nan=False)), min_size=1, max_size=4
        )
    )
    def test_what_is_written_is_read(self, tmp_path_factory, cells):
        path = tmp_path_factory.mktemp("results") / "new" / "x.csv"
        rows = [row(name=n, config=c, gpus=g, value=float(f"{v:.6g}")) for n, c, g, v in cells]
        append(path, rows[:1])
        append(path, rows[1:])
        assert read(path) == rows
        assert path.read_text().splitlines()[0] == ",".join(OWN_COLUMNS)

    def test_the_columns_are_those_of_a_measurement(self):
        fields = tuple(f.name for f in dataclasses.fields(Measurement))
        assert fields == COLUMNS
        assert OWN_COLUMNS == (
            "name", "commit", "date", "gpu", "gpus", "torch", "triton", "config", "metric", "value", "unit",
        )  # fmt: skip

    def test_a_source_has_a_column_of_its_own(self, tmp_path):
        append(tmp_path / "anchors.csv", [row(source="a paper")])
        append(tmp_path / "anchors.csv", [row(value=1)])
        assert [r.source for r in read(tmp_path / "anchors.csv")] == ["a paper", ""]
        append(tmp_path / "own.csv", [row()])
        with pytest.raises(ConfigError, match=r"these rows need .*source"):
            append(tmp_path / "own.csv", [row(source="a paper")])
        assert len(read(tmp_path)) == 3

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "columns missing; expected name, commit"),
            ("a,b\n1,2\n", "columns a, b; expected name"),
            (",".join(OWN_COLUMNS) + "\n1,2\n", "line 2: 2 cells, expected 11"),
            (",".join(OWN_COLUMNS) + "\nn,c,d,g,one,t,t,c,m,1,u\n", "line 2: gpus = 'one' is not a number"),
            (",".join(OWN_COLUMNS) + "\nn,c,d,g,1,t,t,c,m,fast,u\n", "line 2: value = 'fast' is not a number"),
        ],
        ids=["empty", "columns", "cells", "gpus", "value"],
    )
    def test_bad_files_are_refused_with_the_line(self, tmp_path, text, message):
        path = tmp_path / "x.csv"
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            read(path)
        assert str(path) in str(error.value)
        assert message in str(error.value)

    def test_other_columns_are_not_appended_to(self, tmp_path):
        (tmp_path / "x.csv").write_text("a,b\n")
        with pytest.raises(ConfigError, match="its columns are a, b"):
            append(tmp_path / "x.csv", [row()])
        assert (tmp_path / "x.csv").read_text() == "a,b\n"

    def test_a_missing_file_is_an_error(self, tmp_path):
        with pytest.raises(ConfigError, match="no such results file"):
            read(tmp_path / "x.csv")


class TestLatest:
    def test_the_newest_of_each_holds_in_first_order(self):
        old, new = row(value=1), row(value=2, date="2026-02-01T00:00:00Z")
        other = row(metric="backward", value=3)
        assert latest([old, other, new]) == [new, other]
        assert latest([new, other, old]) == [new, other]

    def test_of_one_date_the_later_line_holds(self):
        assert latest([row(value=1), row(value=2)]) == [row(value=2)]

    @pytest.mark.parametrize("column", ["name", "gpu", "gpus", "config", "metric"])
    def test_what_differs_stays(self, column):
        changed = row(**{column: 2 if column == "gpus" else "other"})
        assert latest([row(), changed]) == [row(), changed]


README = "before\n<!-- table: {} -->\nold\n<!-- end -->\nafter\n"


class TestTables:
    def test_attention_shows_both_directions_and_marks_anchors(self):
        rows = [
            row(value=402.4),
            row(metric="backward", value=331.2),
            row(metric="block backward", value=350.0),
            row(name="attention/matmul", config="8192 cubed", value=799.6),
            row(name="attention/fa4", value=642.0, source="measured earlier"),
            row(name="attention/fa4", metric="backward", value=617.0, source="measured earlier"),
        ]
        text = tables.attention_table(rows)
        assert "| 1 x 32k, 16/16 heads of 128, causal | 800 | 642* / 617* | 402 / 331 | - |" in text
        assert "GPU X, torch 2.11.0, triton 3.6.0, commit abc123, 2026-01-02" in text

    def test_a_bound_is_of_its_own_row(self):
        other = "4 x 8k, 16/16 heads of 128, full"
        beside = row(name="attention/matmul", value=750.0)
        rows = [row(value=402.4), row(config=other, value=500.0), beside]
        assert f"| {other} | - | 500 / - |" in tables.attention_table(rows)
        whole = row(name="attention/matmul", config="8192 cubed", value=800.0)
        text = tables.attention_table([*rows, whole])
        assert f"| {other} | 800 | 500 / - |" in text
        assert f"| {beside.config} | 750 | 402 / - |" in text

    def test_a_measured_peer_replaces_its_anchor(self):
        anchor = row(name="attention/fa2", value=300.0, source="measured earlier", date="")
        measured = row(name="attention/fa2", value=310.0)
        for rows in ([anchor, measured], [measured, anchor]):
            text = tables.attention_table(rows)
            assert "310 / -" in text
            assert "300" not in text

    def test_figures_of_an_earlier_commit_are_marked(self):
        rows = [
            row(name="attention/flex", value=390.4, commit="old", date="2025-01-01T00:00:00Z"),
            row(name="attention/fa4", value=642.0, source="measured earlier", commit="", date=""),
            row(value=402.4),
        ]
        text = tables.attention_table(rows)
        assert "| 390† / - | 642* / - | 402 / - |" in text
        assert "`†` measured with an earlier commit, in another run." in text
        assert "†" not in tables.attention_table(rows[1:])

    def test_training_shows_peers_and_ours(self):
        here = {"name": "train/longctx", "config": "1.24B parameters, 64k tokens"}
        rows = [
            row(**here, metric="tokens/s", value=17000.4, unit="tokens/s"),
            row(**here, metric="mfu", value=35.04, unit="%"),
            row(**here, metric="memory", value=16.94, unit="GiB"),
            row(**(here | {"name": "train/other"}), metric="mfu", value=34.6, unit="%", source="measured"),
        ]
        text = tables.training_table(rows)
        assert "| 1.24B parameters, 64k tokens | 1 x GPU X | longctx | 17 000 | 35.0 % | - | 16.9 GiB |" in text
        assert "| other* | - | 34.6 % | - | - |" in text

    def test_a_ring_is_compared_with_one_gpu(self):
        here = {"name": "train/longctx", "config": "1B", "metric": "tokens/s", "unit": "tokens/s"}
        losses = {"config": "1B", "unit": "nats/token"}
        rows = [
            row(**here, value=10000.0),
            row(**here, value=19000.0, gpus=2),
            row(**here, value=99000.0, gpus=4, gpu="GPU Y"),
            row(**losses, name="losses/ring 1", metric="loss of step 0", value=2.0),
            row(**losses, name="losses/ring 1", metric="loss of step 1", value=4.0),
            row(**losses, name="losses/ring 2", metric="loss of step 0", value=2.002, gpus=2),
            row(**losses, name="losses/ring 2", metric="loss of step 1", value=3.98, gpus=2),
        ]
        lines = tables.ring_table(rows).splitlines()
        assert len(lines) == 3, "a GPU that was not measured alone has no line"
        assert lines[2] == "| 1B | 2 x GPU X | 9 500 | 95.0 % | 5e-03 over 2 steps |"
        assert tables.ring_table(rows[:2]).splitlines()[2].endswith("| 95.0 % | - |")

    def test_a_rings_errors_stand_beside_those_of_one_rank(self):
        def of(ring, metric, value):
            config = f"ring {ring}, bf16 inputs, dk and dv sent in bf16, 1024 tokens"
            return row(name="numerics/ring", config=config, metric=metric, value=value, unit="relative RMS")

        rows = [of(1, "out", 2e-3), of(1, "dk", 1e-3), of(16, "out", 2e-3), of(16, "dk", 2.5e-3)]
        lines = tables.numerics_table(rows[2:] + rows[:2]).splitlines()
        assert lines[0].endswith("| one rank | ring 16 |")
        assert lines[2:] == [
            "| bf16 inputs, dk and dv sent in bf16, 1024 tokens | 1.0e-03 to 2.0e-03 | 2.50 x |",
        ]
        assert tables.numerics_table(rows[2:]) == "Not measured yet."

    @pytest.mark.parametrize("name", tables.TABLES)
    def test_without_measurements_a_table_says_so(self, name):
        text = render(README.format(name), [])
        assert "not measured yet" in text.lower()

    @given(value=st.floats(1, 999))
    def test_render_is_stable_and_touches_only_the_tables(self, value):
        rows = [row(value=value)]
        once = render(README.format("attention"), rows)
        assert render(once, rows) == once
        assert once.startswith("before\n<!-- table: attention -->\n")
        assert once.endswith("<!-- end -->\nafter\n")
        assert f"{value:.0f} / -" in once
        assert "old" not in once

    def test_unknown_tables_are_refused(self):
        with pytest.raises(ConfigError, match="is not a table: did you mean 'attention'"):
            render(README.format("atention"), [])

    def test_a_table_without_end_is_refused(self):
        with pytest.raises(ConfigError, match="1 table markers but 0 tables"):
            render("<!-- table: attention -->\nx\n", [])


class TestCommand:
    def prepare(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(README.format("attention"))
        append(tmp_path / "results" / "x.csv", [row()])
        return readme, ["--results", str(tmp_path / "results"), "--readme", str(readme)]

    def test_check_fails_until_written(self, tmp_path, capsys):
        readme, where = self.prepare(tmp_path)
        before = readme.read_text()
        assert main(["--check", *where]) == 1
        assert "disagree: run python -m longctx.results --write" in capsys.readouterr().err
        assert readme.read_text() == before
        assert main(["--write", *where]) == 0
        assert main(["--check", *where]) == 0
        assert "402 / -" in readme.read_text()

    def test_a_number_changed_by_hand_is_found(self, tmp_path):
        readme, where = self.prepare(tmp_path)
        main(["--write", *where])
        readme.write_text(readme.read_text().replace("402", "502"))
        assert main(["--check", *where]) == 1

    def test_errors_have_code_2_and_no_traceback(self, tmp_path, capsys):
        assert main(["--check", "--readme", str(tmp_path / "none.md")]) == 2
        assert capsys.readouterr().err.startswith("ConfigError: no such file")


MODEL = {
        "vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        "intermediate_size": 64, "rope_scaling": None,
    }  # fmt: skip


class TestFromRun:
    def write(self, run_dir, steps, *, first_step=0, **run):
        where = {
            "commit": "abc",
            "date": "2026-01-02T03:04:05Z",
            "gpu": "GPU X",
            "gpus": 2,
            "torch": "2",
            "triton": "3",
        }
        config = {"model": MODEL, "data": {"seq_len": 2048, "mask_documents": True}}
        lines = [{"kind": "run", "first_step": first_step, "config": config, "plan": {"ring": 2}, **where, **run}]
        for step, speed in steps:
            lines.append(
                {
                    "kind": "step",
                    "step": step,
                    "loss": 1.0 / (1 + step),
                    "tokens_per_second": speed,
                    "mfu": speed / 1000,
                    "mfu_dense": None,
                    "peak_memory_bytes": 2**30,
                }
            )
        lines.append({"kind": "summary", "peak_memory_bytes": 3 * 2**30})
        run_dir.mkdir(exist_ok=True)
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def test_medians_without_the_warm_up(self, tmp_path, capsys):
        self.write(tmp_path / "run", [(0, 1.0), (1, 2.0), (2, 300.0), (3, 100.0), (4, 200.0)])
        code = main(["--from-run", str(tmp_path / "run"), "--name", "here", "--results", str(tmp_path / "results")])
        assert code == 0
        rows = read(tmp_path / "results" / "training.csv")
        assert {r.metric: (r.value, r.unit) for r in rows} == {
            "tokens/s": (200.0, "tokens/s"),
            "mfu": (20.0, "%"),
            "memory": (3.0, "GiB"),
            "loss of step 4": (0.2, "nats/token"),
        }
        count = ModelConfig(**MODEL).shape.num_params
        assert {r.config for r in rows} == {f"{count / 1e6:.2f}M parameters, 2k tokens, packed documents"}
        assert {(r.name, r.gpus, r.gpu, r.commit) for r in rows} == {("train/here", 2, "GPU X", "abc")}
        assert "train/here" in capsys.readouterr().out

    def test_first_losses_and_the_commit_of_a_copy_without_history(self, tmp_path):
        self.write(tmp_path / "run", [(0, 1.0), (1, 2.0), (2, 300.0)])
        words = ["--from-run", str(tmp_path / "run"), "--results", str(tmp_path), "--commit", "feed"]
        assert main([*words, "--losses", "2"]) == 0
        rows = read(tmp_path / "losses.csv")
        assert [(r.name, r.metric, r.unit) for r in rows] == [
            ("losses/ring 2", f"loss of step {step}", "nats/token") for step in (0, 1)
        ]
        assert {r.commit for r in (*rows, *read(tmp_path / "training.csv"))} == {"feed"}
        assert main([*words, "--losses", "9"]) == 2, "the run has fewer steps"

    def test_of_a_resumed_run_the_last_start_counts(self, tmp_path):
        self.write(tmp_path, [(0, 1.0), (1, 1.0), (2, 1.0)])
        self.write(tmp_path, [(3, 5.0), (4, 6.0), (5, 7.0), (6, 9.0)], first_step=3, gpus=4)
        rows = results.rows_of_run(tmp_path, "x")
        assert rows[0].value == 8.0
        assert rows[0].gpus == 4

    def test_too_few_steps_are_refused(self, tmp_path):
        self.write(tmp_path, [(0, 1.0), (1, 1.0)])
        with pytest.raises(ConfigError, match="no step after the first 2"):
            results.rows_of_run(tmp_path, "x")

    def test_a_folder_without_metrics_is_refused(self, tmp_path, capsys):
        assert main(["--from-run", str(tmp_path)]) == 2
        assert "metrics.jsonl" in capsys.readouterr().err


def test_the_environment_names_versions_and_the_commit():
    got = results.environment("GPU X", 2)
    assert (got["gpu"], got["gpus"]) == ("GPU X", 2)
    assert got["torch"] == results.version("torch") != "none"
    assert results.version("no-such-package") == "none"
    assert results.environment("GPU X", commit="given")["commit"] == "given"
    Measurement(**got, name="a", config="b", metric="c", value=1.0, unit="d")


def test_the_readme_and_the_files_agree():
    """The command that CI runs: numbers in the README come from benchmarks/results."""
    assert main(["--check"]) == 0, "run python -m longctx.results --write"


def test_every_results_file_can_be_read():
    rows = read(results.RESULTS)
    assert rows
    for r in rows:
        assert r.name.split("/")[0] in {
            "attention",
            "train",
            "recall",
            "losses",
            "faults",
            "numerics",
            "sweep",
            "errors",
            "forms",
            "ring",
            "scaling",
        }, f"{r.name} is shown in no table or figure"
        # What messages add is a difference of two times.
        assert r.value > 0 or (r.value == 0 and r.metric.endswith("waiting")) or r.metric.endswith(" exposed")
        assert r.source or (r.commit and r.date), f"{r}: our own figures name commit and date"
