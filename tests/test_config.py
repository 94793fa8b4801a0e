"""Reading settings from TOML and the command line, what is refused and how, and the configurations that come with it."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import Config, load_config
from longctx.config_loader import key_names
from longctx.errors import ConfigError
from longctx.rope import RopeScaling
from longctx.settings import checked, field_types, from_text, parse_size

CONFIGS = Path(__file__).parent.parent / "configs"
SECTIONS = [field.name for field in dataclasses.fields(Config)]

# Each configuration that comes with the library, with the number of processes that it is for.
WORLDS = {
    "debug_cpu": 2,
    "llama_1b_64k": 1,
    "llama_1b_128k_ring2": 2,
    "llama3_8b_128k_ring8": 8,
    "qwen3_8b_1m_ring8": 8,
    "qwen3_600m_128k_ring4": 8,
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def message_of(tmp_path: Path, text: str = "", overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text), overrides or [])
    return str(caught.value)


def values_of(hint) -> st.SearchStrategy:
    """Any value of a setting's type."""
    if get_origin(hint) in (Union, types.UnionType):
        optional = type(None) in get_args(hint)
        kinds = [values_of(kind) for kind in get_args(hint)]
        # An optional text cannot be "none": that is how no value is written.
        return st.one_of(kinds).filter(lambda v: not (optional and isinstance(v, str) and v.lower() == "none"))
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.tuples(*map(values_of, get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return st.builds(hint, **{name: values_of(kind) for name, kind in field_types(hint).items()})
    return {
        int: st.integers(-(2**62), 2**62),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text(st.characters(exclude_categories=["Cs"])),
        type(None): st.none(),
    }[hint]


CONFIGURATIONS = st.builds(Config, **{name: values_of(type(getattr(load_config(None), name))) for name in SECTIONS})


@settings(max_examples=60, deadline=None)
@given(config=CONFIGURATIONS)
def test_dump_is_read_back_equal(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(config.dump(), encoding="utf-8", newline="")
    assert load_config(path) == config


def overrides_of(config: Config) -> list[str]:
    """Every setting of `config` as a word of the command line."""

    def text(value) -> str:
        if value is None:
            return "none"
        if isinstance(value, tuple):
            return ",".join(map(text, value))
        return str(value).lower() if isinstance(value, bool) else str(value)

    def words(section, key: str):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                yield from words(value, f"{key}.{field.name}")
            else:
                yield f"--{key}.{field.name}={text(value)}"

    return [word for name in SECTIONS for word in words(getattr(config, name), name)]


@settings(max_examples=60, deadline=None)
@given(config=CONFIGURATIONS)
def test_overrides_say_everything(config):
    assert load_config(None, overrides_of(config)) == config


def test_defaults():
    config = load_config(None)
    assert config == Config()
    for name in SECTIONS:
        section = getattr(config, name)
        assert section == type(section)()
        assert type(section).__name__.lower().startswith(("parallelplan", name))


def test_file_then_overrides(tmp_path):
    path = written(
        tmp_path,
        """
        [model]
        sliding_window = "4k"
        num_kv_heads = 2
        rope_scaling = {kind = "linear", factor = 2, original_max_position = "8k"}
        [data]
        path = "corpus.txt"
        seq_len = "128k"
        [optim]
        lr = 1e-3
        betas = [0.9, 0.99]
        """,
    )
    config = load_config(path)
    assert config.model.sliding_window == 4096
    assert config.model.rope_scaling == RopeScaling(kind="linear", factor=2.0, original_max_position=8192)
    assert (config.data.path, config.data.seq_len) == ("corpus.txt", 131_072)
    assert config.optim.betas == (0.9, 0.99)
    words = "--data.seq_len 64k --data.path=none --model.rope_scaling.factor=4 --optim.lr 2e-3 --data.shuffle=false"
    words += " --optim.betas=0.8,0.95 --engine.activation_checkpointing --train.steps 7 --data.seq-len=32k"
    changed = load_config(path, words.split())
    assert changed.data.seq_len == 32_768  # the last one holds; a dash is an underscore
    assert changed.data.path is None
    assert changed.data.shuffle is False
    assert changed.model.rope_scaling == RopeScaling(kind="linear", factor=4.0, original_max_position=8192)
    assert (changed.optim.lr, changed.optim.betas) == (2e-3, (0.8, 0.95))
    assert changed.engine.activation_checkpointing is True
    assert changed.train.steps == 7
    assert changed.model.num_kv_heads == 2
    assert load_config(path, ["--model.rope_scaling=none"]).model.rope_scaling is None
    # Taken away and given anew: nothing of the old one stays.
    anew = "--model.rope_scaling=none --model.rope_scaling.kind=ntk --model.rope_scaling.factor=8"
    anew += " --model.rope_scaling.original_max_position=4k"
    assert load_config(path, anew.split()).model.rope_scaling == RopeScaling(
        kind="ntk", factor=8.0, original_max_position=4096
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("4096", 4096), ("4_096", 4096), ("-3", -3), ("128k", 131_072), ("128K", 131_072), ("1M", 1 << 20)),
        *(("2g", 2 << 30), ("1.5M", 3 << 19), ("0.5k", 512), (" 8k ", 8192)),
        *(("abc", None), ("1.5", None), ("0.3k", None), ("128kb", None), ("k", None), ("", None), ("1e3", None)),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_a_word_is_read_by_the_settings_type():
    assert from_text("none", str | None) is None
    assert from_text("none", str) == "none"
    assert from_text("none", Literal["none", "all"] | None) == "none"
    assert from_text("128k", str) == "128k"
    assert from_text("true", str) == "true"
    assert from_text("3", Literal[0, 3]) == 3
    assert from_text("[a, 'b']", tuple[str, ...]) == ["a", "b"]
    assert from_text("1e-3", float) == 1e-3
    assert math.isinf(from_text("inf", float))


@pytest.mark.parametrize(
    ("text", "overrides", "what", "do"),
    [
        ("[data]\nseq_length = 3", [], "run.toml: data.seq_length: there is no such setting", "did you mean 'data.seq_len'"),
        ("[modle]\nx = 3", [], "run.toml: modle: there is no such setting", "did you mean 'model'?"),
        ("[engine]\nlr = 3", [], "run.toml: engine.lr: there is no", "did you mean 'optim.lr'?"),
        ("[data]\nzzzzzz = 3", [], "run.toml: data.zzzzzz: there is no", "known: cache_dir, eval_path, mask_documents, path"),
        ("", ["--parallel.rnig=4"], "--parallel.rnig: there is no such setting", "did you mean 'parallel.ring'?"),
        ("", ["--ring", "4"], "--ring: there is no such setting", "did you mean 'parallel.ring'?"),
        ("", ["--seed=4"], "--seed: there is no such setting", "did you mean 'data.seed' or 'train.seed'?"),
        ("", ["--qwertz=4"], "--qwertz: there is no such setting", "known: data, engine, log, model"),
        ("", ["data.seq_len=4"], "'data.seq_len=4' is not an override", "write --data.seq_len=4"),
        ("", ["--data.path"], "--data.path has no value", "write --data.path=value"),
        ("", ["--train.steps", "--data.path=x"], "--train.steps has no value", "write --train.steps=value"),
        ("", ["--data=x"], "--data is a section, not a setting", "write --data.key=value"),
        ("data = 3", [], "run.toml: data = 3 is a section, not a value", "write [data] and its keys below"),
        ("[data]\nseq_len = 'abc'", [], "run.toml: data.seq_len = 'abc' is text", "expected a whole number (128k"),
        ("[data]\nseq_len = 4.5", [], "data.seq_len = 4.5 is a number with a fraction", "expected a whole number"),
        ("[data]\nseq_len = true", [], "data.seq_len = True is true or false", "expected a whole number"),
        ("[data]\nshuffle = 1", [], "data.shuffle = 1 is a whole number", "expected true or false"),
        ("[data]\npath = 3", [], "data.path = 3 is a whole number", 'expected text or "none"'),
        ("[data]\nseq_len = 'none'", [], "data.seq_len = 'none' is text", "expected a whole number"),
        ("[data]\npath = {a = 1}", [], "data.path = {'a': 1} is a table", "expected text"),
        ("[data]\nseed = 1979-05-27", [], "data.seed = datetime.date(1979, 5, 27) is date", "expected a whole number"),
        ("[optim]\nlr = 'fast'", [], "optim.lr = 'fast' is text", "expected a number"),
        ("[optim]\nbetas = [0.9]", [], "optim.betas = [0.9] is a list of length 1", "expected a list of length 2, each a n"),
        ("", ["--optim.betas=0.9"], "--optim.betas=[0.9] is a list of length 1", "expected a list of length 2"),
        ("", ["--optim.betas=0.9,x"], "--optim.betas=[0.9, 'x'] is a list", "expected a list of length 2"),
        ("", ["--data.seq_len=abc"], "--data.seq_len=abc is text", "expected a whole number"),
        ("", ["--data.shuffle=maybe"], "--data.shuffle=maybe is text", "expected true or false"),
        ("", ["--engine.dtype=fp16"], "--engine.dtype=fp16 is text", "expected one of 'auto', 'fp32', 'bf16'"),
        ("", ["--model.rope_scaling=yarn"], "--model.rope_scaling=yarn is a group", "rope_scaling.key=value; keys: kind"),
        ("", ["--model.rope_scaling.kind=yarn", "--model.rope_scaling.factor=4"], "original_max_position is missing", "it is"),
        ("[model.rope_scaling]\nkynd = 'yarn'", [], "model.rope_scaling.kynd: there is", "'model.rope_scaling.kind'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text, overrides, what, do, tmp_path):
    message = message_of(tmp_path, text, overrides)
    assert what in message
    assert do in message.partition(what)[2]
    assert message.count("there is no such setting") <= 1


def test_all_problems_are_in_one_message(tmp_path):
    message = message_of(
        tmp_path,
        "[data]\nseq_length = 3\nshuffle = 'x'\n[optim]\nlr = 'x'",
        ["--parallel.ring=two", "--nothing.at=all", "--train.steps=1.5"],
    )
    assert message.startswith(f"6 problems with the configuration {tmp_path / 'run.toml'}\n")
    assert re.findall(r"^  (\d)\. ", message, re.M) == list("123456")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no configuration .*rum\.toml\n +look in .*: did you mean 'run\.toml'\?"),
        (b"[data\n", r"run\.toml is not TOML: .*line 1.*\n.*text stands in quotes"),
        (b"[data]\nseq_len = 128k\n", r"run\.toml is not TOML: .*line 2.*\n.*seq_len = \"128k\""),
        (b"[data]\npath = '\xff'\n", r"run\.toml is not TOML: .*utf-8"),
    ],
    ids=["missing", "syntax", "bare_size", "not_utf8"],
)
def test_bad_file(content, message, tmp_path):
    (tmp_path / "run.toml").write_bytes(content or b"")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / ("run.toml" if content else "rum.toml"))


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        load_config(tmp_path)


GOOD = ["--model.vocab_size=264", "--train.device=cpu"]


@pytest.mark.parametrize(
    ("overrides", "world", "whats"),
    [
        ([], 1, []),
        (["--parallel.ring=2"], 6, []),
        (["--parallel.ring=4"], 6, ["world size 6 is not a multiple of pp * ring * ulysses * tp = 4"]),
        (["--parallel.ring=2", "--parallel.dp=2"], 2, ["= 4, but the world has 2 processes"]),
        (["--parallel.ring=3", "--data.seq_len=4099"], 3, []),
        (["--parallel.ring=3", "--data.seq_len=2"], 3, ["seq_len = 2 is less than a token for each of the 3 ranks"]),
        (["--parallel.layout=auto", "--parallel.ring=2", "--parallel.grad_dtype=bf16"], 2, []),
        (["--parallel.grad_dtype=bf16"], 1, ["grad_dtype = bf16 with ring 1"]),
        (["--parallel.layout=zigzack"], 1, ["unknown layout 'zigzack': did you mean 'zigzag'?"]),
        (["--parallel.tp=2", "--parallel.pp=2"], 4, []),
        (["--parallel.tp=8"], 8, ["num_heads 4 and num_kv_heads 4 are no multiples of tp 8"]),
        (["--parallel.pp=2", "--engine.zero_stage=2"], 2, ["engine.zero_stage 2 with pp 2"]),
        (["--model.num_heads=6", "--model.num_kv_heads=4", "--model.hidden_size=192"], 1, ["6 is not a multiple of"]),
        (["--parallel.ulysses=2", "--parallel.ring=2"], 4, []),
        (["--parallel.ulysses=3", "--data.seq_len=96"], 3, ["num_heads 4 is not a multiple of ulysses 3"]),
        (["--parallel.ulysses=4", "--data.seq_len=98"], 4, []),
        (["--engine.dtype=bf16", "--engine.zero_stage=0"], 1, ["bf16 with engine.zero_stage 0"]),
        (["--model.vocab_size=256"], 1, ["model.vocab_size = 256, but data.tokenizer = 'bytes' ends every document"]),
        (["--data.tokenizer=nowhere.json"], 1, ["data.tokenizer = 'nowhere.json' does not exist"]),
        (["--data.path=nowhere.txt", "--data.seq_len=1"], 1, ["seq_len = 1:", "'nowhere.txt' does not exist"]),
        (
            ["--data.seq_len=5", "--parallel.ring=8", "--optim.lr=-1", "--train.steps=0", "--log.every=0"],
            4,
            ["optim.lr = -1", "train.steps = 0", "log.every = 0", "seq_len = 5 is less than", "world size 4 is not"],
        ),
    ],
)  # fmt: skip
def test_check_finds_every_problem_once(overrides, world, whats):
    problems = load_config(None, [*GOOD, *overrides]).check(world)
    assert len(problems) == len(whats), problems
    for problem, what in zip(problems, whats, strict=True):
        assert what in problem.what
        assert "\n" not in problem.what


def test_check_gives_the_hint_of_the_plan():
    (problem,) = load_config(None, [*GOOD, "--parallel.ring=4"]).check(6)
    assert "start 4 or 8 processes" in problem.hint


def test_a_tokenizer_that_the_model_has_no_row_for(tmp_path):
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(500)}, unk_token="w0"))
    made.save(str(tmp_path / "t.json"))
    words = [*GOOD, f"--data.tokenizer={tmp_path / 't.json'}"]
    (problem,) = load_config(None, words).check(1)
    assert "ends every document with id 500" in problem.what
    assert "501 or more (504 is a multiple of 8)" in problem.hint
    assert load_config(None, [*words, "--model.vocab_size=501"]).check(1) == []


def test_key_names_are_all_settable():
    names = key_names()
    assert {"data.seq_len", "parallel.ring", "model.rope_scaling.kind", "optim.betas"} <= set(names)
    assert len(names) == len(set(names))
    config = load_config(None)
    for name in names:
        section, *rest = name.split(".")
        assert hasattr(getattr(config, section), rest[0])


def test_every_configuration_has_a_world():
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(WORLDS)


@pytest.mark.parametrize("name", WORLDS)
def test_configurations_are_good(name, tmp_path):
    path = CONFIGS / f"{name}.toml"
    config = load_config(path)
    assert config.check(WORLDS[name]) == []
    assert written(tmp_path, config.dump()).exists()
    assert load_config(tmp_path / "run.toml") == config
    assert config.train.run_dir == f"runs/{name}"
    # Its comments say how to start it, with a command that names this file and that many processes.
    head = path.read_text().split("[model]")[0]
    assert f"--config configs/{name}.toml" in head
    started = re.search(r"--nproc-per-node (\d+)", head)
    assert int(started[1] if started else 1) == WORLDS[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama_1b_64k", 1.2358),
        ("llama3_8b_128k_ring8", 8.0303),
        ("qwen3_600m_128k_ring4", 0.5960),
        ("qwen3_8b_1m_ring8", 8.1907),
    ],
)
def test_shapes_are_those_of_the_published_models(name, billions):
    """Parameter counts of Llama 3.2 1B, Llama 3.1 8B and Qwen3 0.6B."""
    assert load_config(CONFIGS / f"{name}.toml").model.shape.num_params / 1e9 == pytest.approx(billions, abs=1e-4)


def test_the_ring_of_two_is_the_single_gpu_model_at_twice_the_length():
    one, two = (load_config(CONFIGS / f"llama_1b_{name}.toml") for name in ("64k", "128k_ring2"))
    assert one.model == two.model
    assert (one.data.seq_len, two.data.seq_len) == (65_536, 131_072)


@pytest.mark.parametrize(
    ("value", "hint", "is_good"),
    [
        *(
            (True, Literal[0, 1], False),
            (1, Literal[0, 1], True),
            (True, bool | None, True),
            (True, Literal[True], True),
        ),
        *((1, float, True), (1.0, int, False), ("1", int, False), (1, str, False), (None, int | None, True)),
        *(([1, 2], tuple[int, ...], True), ([1, "2"], tuple[int, ...], False), (None, int, False)),
    ],
)
def test_types_are_strict(value, hint, is_good):
    if is_good:
        checked(value, hint)
    else:
        with pytest.raises(TypeError):
            checked(value, hint)
