"""Weights in Hugging Face's layout, in and out: safetensors beside a `config.json`, whole or in shards.

    longctx export runs/default/checkpoints/step-00000100 OUT     a folder that transformers' from_pretrained loads
    longctx import FOLDER --config OUT.toml                       settings of a run that starts from such a folder

The names of our parameters are those of transformers' Llama, Mistral, Qwen2 and Qwen3, and no value is changed on the way.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from longctx.checkpoint_weights import CheckpointWeights, parameter_shapes
from longctx.errors import CheckpointError, ConfigError, Problem, format_problems
from longctx.hf_config import CONFIG, from_hf_config, read_hf_config, to_hf_config
from longctx.model import ModelConfig
from longctx.parallel.slices import ParameterSlice, parameter_slices
from longctx.settings import parse_size, toml_tables
from longctx.tokenizer import FileTokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
# Beside tokenizer.json, what transformers' tokenizers read.
_TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_BYTES = {"fp32": 4, "bf16": 2}
# As the header of a safetensors file calls them. Others would have to be rounded or scaled.
_FLOATS = ("F32", "BF16", "F16")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_LIST_AT_MOST = 20


class WeightsFolder:
    """A model's folder in Hugging Face's layout; only headers are read, and a tied output projection if it is stored.

    Attributes:
        config: the model that its `config.json` describes.
        shapes: name -> shape of every tensor that is a parameter.

    Raises:
        CheckpointError: `config.json` or weights are missing, cannot be read or represented; with every tensor that is
            missing, too many, or of another shape or kind of number than the configuration says; a stored output
            projection is not the embedding, to which the configuration ties it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        self.config = from_hf_config(read_hf_config(self.path), where=str(self.path / CONFIG))
        self._file_of = self._files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        problems = []
        for file in sorted(set(self._file_of.values())):
            with self._reading(file) as tensors:
                held = set(tensors.keys())
                for name in sorted(n for n, f in self._file_of.items() if f == file):
                    if name not in held:
                        problems.append(Problem(f"{INDEX} says that {name} is in {file}, but it is not"))
                        continue
                    header = tensors.get_slice(name)
                    self.shapes[name] = tuple(header.get_shape())
                    if header.get_dtype() not in _FLOATS:
                        what = f"{name} holds numbers of type {header.get_dtype()}"
                        problems.append(
                            Problem(what, f"supported: {', '.join(_FLOATS)}; save the model in one of them")
                        )
        problems = problems or self._misfits() or self._untied()
        if problems:
            more = problems[_LIST_AT_MOST:]
            shown = problems[:_LIST_AT_MOST] + ([Problem(f"and {len(more)} more like these")] if more else [])
            raise CheckpointError(format_problems(f"the weights in {self.path}", shown))

    def load_into(self, model: nn.Module, prefix: str = "") -> None:
        """Copy every parameter into `model`, of any float dtype, one after the other; files are mapped, not read whole.

        Args:
            prefix: what its parameters' names begin with in the whole model, such as "model.layers.3."; `model` is that part.

        Of a parameter that is cut over tp ranks, or a model that is one stage of a pipeline, only this rank's part is read.

        Raises:
            CheckpointError: a file changed meanwhile.
        """
        parameters = dict(model.named_parameters())
        wanted = {prefix + part.name: (part, parameters[name]) for name, part in parameter_slices(model).items()}
        for file in sorted(set(self._file_of.values())):
            with self._reading(file) as tensors, torch.no_grad():
                for name in (n for n, f in self._file_of.items() if f == file and n in wanted):
                    part, parameter = wanted[name]
                    parameter.copy_(_read(tensors, name, part))

    def fits(self, config: ModelConfig) -> list[str]:
        """What of `config` is meant to differ: how positions turn and how far attention sees; a line for each.

        Raises:
            CheckpointError: with all other settings of the model that differ.
        """
        theirs, ours = _filled(self.config), _filled(config)
        free = ("rope_theta", "rope_scaling", "sliding_window", "init_std")
        problems = [
            Problem(f"model.{name} = {ours[name]!r}, but these weights are of {theirs[name]!r}")
            for name in ours
            if name not in free and ours[name] != theirs[name]
        ]
        if problems:
            raise CheckpointError(
                f"{format_problems(f'train.init_from = {str(self.path)!r}', problems)}\n"
                f"       `longctx import {self.path}` prints the [model] section of these weights"
            )
        return [
            f"model.{name} is {ours[name]!r}, in the weights' {CONFIG} {theirs[name]!r}"
            for name in free[:3]
            if ours[name] != theirs[name]
        ]

    def _files(self) -> dict[str, str]:
        """Name of each tensor -> its file."""
        index = self.path / INDEX
        # Where both are there, transformers, too, takes the one file.
        if (self.path / SINGLE).is_file():
            with self._reading(SINGLE) as tensors:
                found = dict.fromkeys(tensors.keys(), SINGLE)
        elif index.is_file():
            try:
                found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = set(found.values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} cannot be read ({type(error).__name__}: {error})") from error
            wrong = sorted(str(f) for f in files if not isinstance(f, str) or Path(f).name != f)
            absent = sorted(f for f in files - set(wrong) if not (self.path / f).is_file())
            if wrong or absent:
                what = f"names files that are not in it: {', '.join(wrong)}" if wrong else f"lacks {', '.join(absent)}"
                raise CheckpointError(f"{self.path} {what}\n       {INDEX} lists them; copy the whole folder")
        else:
            pickled = any(self.path.glob("*.bin"))
            hint = (
                "it has PyTorch's pickles, which can run code: convert them with save_pretrained"
                if pickled
                else "give the folder that save_pretrained or `longctx export` wrote"
            )
            raise CheckpointError(f"{self.path} has neither {SINGLE} nor {INDEX}\n       {hint}")
        # Old files store the frequencies of RoPE, which follow from the configuration.
        return {name: file for name, file in found.items() if not name.endswith("rotary_emb.inv_freq")}

    @contextmanager
    def _reading(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.path / file, framework="pt", device="cpu") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {error}") from error

    def _misfits(self) -> list[Problem]:
        expected = parameter_shapes(self.config)
        optional = {"lm_head.weight": expected["model.embed_tokens.weight"]} if self.config.tie_embeddings else {}
        found = [Problem(f"{name} is missing") for name in expected if name not in self.shapes]
        for name, shape in self.shapes.items():
            wanted = (expected | optional).get(name)
            if wanted is None:
                found.append(Problem(f"{name} is not a parameter of the model that {CONFIG} describes"))
            elif shape != wanted:
                found.append(Problem(f"{name} has shape {list(shape)}; {CONFIG} says {list(wanted)}"))
        return found

    def _untied(self) -> list[Problem]:
        if not self.config.tie_embeddings or "lm_head.weight" not in self._file_of:
            return []
        both = []
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            with self._reading(self._file_of[name]) as tensors:
                both.append(tensors.get_tensor(name))
        if torch.equal(*both):
            return []
        what = f"lm_head.weight is not the embedding, but {CONFIG} says tie_word_embeddings"
        return [Problem(what, "set it to false there, or remove lm_head.weight")]


def _read(tensors: Any, name: str, part: ParameterSlice) -> torch.Tensor:
    """A part of the tensor of that name in an open safetensors file."""
    if part.dim is None:
        return tensors.get_tensor(name)
    return tensors.get_slice(name)[(slice(None),) * part.dim + (slice(part.start, part.start + part.length),)]


def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    dtype: str = "auto",
    shard_bytes: int = 5 * 10**9,
    max_position: int | None = None,
    tokenizer: str | None = None,
) -> list[Path]:
    """Write a training checkpoint of any plan as a folder that transformers loads.

    The folder appears when it is complete. Memory holds one shard at a time, twice while it is written.

    Args:
        out: a folder that does not exist, or is empty.
        dtype: "fp32", "bf16", or "auto": the training's. "fp32" of a bf16 training are the optimizer's weights.
        shard_bytes: files hold at most so much, or one tensor.
        max_position: tokens that the model is for; None: what its RoPE is stretched to, else the training's sequences.
        tokenizer: a tokenizer.json or a folder with one: copied, and its end of a document goes into config.json.

    Returns:
        The files.

    Raises:
        CheckpointError: the checkpoint cannot be used or represented, or the folder cannot be written; nothing is left.
        DataError: the tokenizer cannot be used.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already\n       name a folder that does not, or remove it")
    weights = CheckpointWeights(Path(checkpoint).expanduser())
    config = weights.config
    dtype = weights.dtype if dtype == "auto" else dtype
    if max_position is None and config.rope_scaling is None:
        # `ShardedLoader.order` says how long the training's sequences were.
        told = re.search(r"sequences of (\d+)", weights.state.get("data", ""))
        max_position = int(told[1]) if told else None
    end = FileTokenizer(tokenizer).end_of_document if tokenizer is not None else None
    hf = to_hf_config(config, dtype=dtype, max_position=max_position, end_of_document=end)
    temporary = out.absolute().parent / f".tmp-{out.name}"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_shards(temporary, weights, dtype, shard_bytes)
        (temporary / CONFIG).write_text(json.dumps(hf, indent=2) + "\n")
        if tokenizer is not None:
            _copy_tokenizer(Path(tokenizer).expanduser(), temporary)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} could not be written: {error}\n       nothing is left of it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(out.iterdir())


def shards_of(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """The names in order, cut into files of at most `shard_bytes`; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def import_config(folder: Path | str) -> str:
    """TOML of a run that starts from the weights in a folder: its model, its tokenizer if it has one, and `init_from`.

    Raises:
        CheckpointError: as `WeightsFolder`.
    """
    weights = WeightsFolder(folder)
    blocks = toml_tables("model", weights.config)
    place = weights.path.absolute()
    if (place / TOKENIZER).is_file():
        blocks.append(f"[data]\ntokenizer = {_quoted(place / TOKENIZER)}\n")
    blocks.append(f"[train]\ninit_from = {_quoted(place)}\n")
    return "\n".join(blocks)


def export_parser() -> argparse.ArgumentParser:
    """The flags of `longctx export`."""
    parser = _Parser(prog="longctx export", description="Write a checkpoint as a folder that transformers loads.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="such as runs/default/checkpoints/step-00000100")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("--dtype", choices=("auto", *_BYTES), default="auto", help="auto: the training's")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of one file at most (default 5GB)")
    parser.add_argument("--max-position", metavar="N", help="tokens the model is for, such as 128k")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json, or a folder with one, to copy")
    return parser


def main_export(argv: Sequence[str] | None = None) -> int:
    """`longctx export`; returns the exit code."""
    words = export_parser().parse_args(argv)
    longest = parse_size(words.max_position) if words.max_position is not None else None
    if words.max_position is not None and not longest:
        raise ConfigError(
            f"--max-position {words.max_position} is not a number of tokens\n       such as 131072 or 128k"
        )
    files = export(
        words.checkpoint,
        words.out,
        dtype=words.dtype,
        shard_bytes=parse_bytes(words.shard_size),
        max_position=longest,
        tokenizer=words.tokenizer,
    )
    for file in files:
        print(f"{file}  {file.stat().st_size:_} bytes")
    return 0


def import_parser() -> argparse.ArgumentParser:
    """The flags of `longctx import`."""
    parser = _Parser(
        prog="longctx import",
        description="Check a folder of weights in Hugging Face's layout, and write settings that start from it.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="config.json and safetensors, such as `longctx export` writes")
    parser.add_argument("--config", metavar="OUT.toml", help="where to write; without it they are printed")
    return parser


def main_import(argv: Sequence[str] | None = None) -> int:
    """`longctx import`; returns the exit code."""
    words = import_parser().parse_args(argv)
    text = import_config(words.folder)
    if words.config is None:
        print(text, end="")
        return 0
    try:
        with open(Path(words.config).expanduser(), "x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise ConfigError(f"{words.config} could not be written: {error.strerror or error}") from error
    print(f"{words.config}: train with `python train.py --config {words.config} --data.path=...`")
    return 0


def parse_bytes(text: str) -> int:
    """5GB, 500 MB, 2GiB or a number of bytes.

    Raises:
        ConfigError: it is none of these, or nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a size of files\n       write 5GB, 500MB or 2GiB")
    return size


def _write_shards(folder: Path, weights: CheckpointWeights, dtype: str, shard_bytes: int) -> None:
    sizes = {name: _BYTES[dtype] * torch.Size(shape).numel() for name, shape in weights.shapes.items()}
    shards = shards_of(sizes, shard_bytes)
    file_of: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights.tensor(name, dtype) for name in names}, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_tokenizer(given: Path, to: Path) -> None:
    if given.is_file():
        shutil.copyfile(given, to / TOKENIZER)
        return
    for name in _TOKENIZER_FILES:
        if (given / name).is_file():
            shutil.copyfile(given / name, to / name)


def _filled(config: ModelConfig) -> dict[str, Any]:
    """The settings with their defaults filled in, so that equal models compare equal."""
    filled = replace(config, num_kv_heads=config.kv_heads, head_dim=config.head_size, intermediate_size=config.mlp_size)
    return dict(vars(filled))


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n       `{self.prog} --help` lists the flags")
