"""Hugging Face's `config.json` as a `ModelConfig`, and back: Llama, Mistral, Qwen2 and Qwen3.

Read is what decides what the model computes. A field that would change it and has no counterpart here is refused by its
name; so is a field that is not known and is set to anything but null, false or nothing.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from longctx.errors import CheckpointError, Problem, did_you_mean, format_problems
from longctx.model import ModelConfig
from longctx.rope import RopeScaling
from longctx.settings import checked, field_types

CONFIG = "config.json"

# model_type -> what transformers takes for a field that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Ours -> theirs, where the value is the same.
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_COMMON_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "head_dim": None}
_DEFAULT_THETA = 1e4
# Fields with one value that we can do.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1, None),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
}
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
# Fields that do not change what the model computes from its weights.
# fmt: off
_HARMLESS = frozenset((
    "model_type", "architectures", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype",
    "dtype", "auto_map", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "unk_token_id", "decoder_start_token_id", "tokenizer_class", "prefix", "id2label", "label2id",
    "problem_type", "finetuning_task", "task_specific_params", "pretraining_tp", "gradient_checkpointing",
    "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "max_length",
    "min_length", "do_sample", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "num_return_sequences", "early_stopping", "is_decoder", "torchscript",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "unsloth_version",
))
# fmt: on
# kind -> fields of transformers' rope dictionary -> of RopeScaling.
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "linear": {},
    "llama3": {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {
        name: name for name in ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
    },
}


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model's folder.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"has no {CONFIG}" if folder.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{folder} {what}\n       name a folder as transformers' save_pretrained or `longctx export` writes it; "
            "nothing is downloaded: `hf download NAME --local-dir FOLDER` does that"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def from_hf_config(hf: dict[str, Any], *, where: str) -> ModelConfig:
    """What `config.json` describes, every default filled in.

    Args:
        where: the file, for messages.

    Raises:
        CheckpointError: with every field that is missing, of the wrong type, or not to be had here.
    """
    family = hf.get("model_type")
    if family not in _DEFAULTS:
        raise CheckpointError(
            f"{where}: model_type = {family!r} is not supported\n       {did_you_mean(str(family), _DEFAULTS)}"
        )
    found: list[Problem] = [
        Problem(f"{name} = {hf[name]!r} cannot be represented", f"supported: {', '.join(map(repr, allowed))}")
        for name, allowed in _ONLY.items()
        if name in hf and hf[name] not in allowed
    ]
    known = {*_NAMES.values(), *_ONLY, *_ROPE_FIELDS, *_HARMLESS, *_DEFAULTS[family]}
    known |= {"layer_types"}
    for name in sorted(hf.keys() - known):
        if hf[name] not in (None, False, {}, []):
            found.append(
                Problem(
                    f"{name} = {_shortened(hf[name])} is not known for a {family} model",
                    f"if it does not change what the model computes, remove it from {CONFIG}",
                )
            )
    given = _COMMON_DEFAULTS | _DEFAULTS[family] | hf
    found += [Problem(f"{name} is missing") for name in _REQUIRED if given.get(name) is None]
    values: dict[str, Any] = {ours: given.get(theirs) for ours, theirs in _NAMES.items()}
    values |= {"qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    values["sliding_window"], wrong = _window(family, given)
    found += wrong
    values["rope_theta"], values["rope_scaling"], wrong = _rope(hf)
    found += wrong
    if not found:
        values, found = _checked(ModelConfig, values, _NAMES)
    config = None if found else ModelConfig(**values)
    found += config.problems() if config is not None else []
    if config is None or found:
        raise CheckpointError(format_problems(where, found))
    return replace(config, head_dim=config.head_size, num_kv_heads=config.kv_heads)


def to_hf_config(
    config: ModelConfig, *, dtype: str, max_position: int | None, end_of_document: int | None
) -> dict[str, Any]:
    """The `config.json` from which transformers builds this model.

    The family is the first that can be it: Qwen2 with biases, Qwen3 with qk_norm, Mistral with a window, else Llama. Static
    NTK has no name in transformers: it is written as the base that it comes to.

    Args:
        dtype: "fp32" or "bf16", of the weights beside it.
        max_position: tokens that the model is for; None: what its RoPE is stretched to.
        end_of_document: the tokenizer's id, if it is known.

    Raises:
        CheckpointError: no family is such a model, or there is no `max_position`.
    """
    if config.qkv_bias and config.qk_norm:
        raise CheckpointError(
            "no family of transformers that we export has model.qkv_bias and model.qk_norm together\n"
            "       Qwen2 has qkv_bias, Qwen3 has qk_norm"
        )
    for name, family in (("softcap", "Gemma 2"), ("sinks", "gpt-oss")):
        if getattr(config, name):
            raise CheckpointError(
                f"no family of transformers that we export has model.{name} = {getattr(config, name)}\n"
                f"       {family} has it, beside much that this model has not"
            )
    scaling = config.rope_scaling
    if max_position is None:
        if scaling is None:
            raise CheckpointError(
                "how long the model's sequences may be is not known, and max_position_embeddings has to say it\n"
                "       add --max-position, such as --max-position 128k: the length it was trained on"
            )
        max_position = round(scaling.factor * scaling.original_max_position)
    family = _family(config)
    window: dict[str, Any] = {}
    if family in ("qwen2", "qwen3"):
        has = config.sliding_window is not None
        # Layers from `max_window_layers` on have the window: all of them, or none.
        window = {
            "use_sliding_window": has,
            "sliding_window": config.sliding_window,
            "max_window_layers": 0 if has else config.num_layers,
        }
    elif family == "mistral":
        window = {"sliding_window": config.sliding_window}
    filled = {"num_kv_heads": config.kv_heads, "head_dim": config.head_size, "intermediate_size": config.mlp_size}
    theta, rope = _rope_out(config)
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        **{theirs: filled.get(ours, getattr(config, ours)) for ours, theirs in _NAMES.items()},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **({"attention_bias": False} if family in ("llama", "qwen3") else {}),
        **({"mlp_bias": False} if family == "llama" else {}),
        **window,
        "max_position_embeddings": max_position,
        "rope_theta": theta,
        **({"rope_scaling": rope} if rope else {}),
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        "use_cache": True,
    }


def _family(config: ModelConfig) -> str:
    if config.qkv_bias or config.qk_norm:
        return "qwen2" if config.qkv_bias else "qwen3"
    # transformers' Llama wants a width that its heads divide; Mistral without a window is the same model without that.
    needs_mistral = config.sliding_window is not None or config.hidden_size % config.num_heads
    return "mistral" if needs_mistral else "llama"


def _window(family: str, given: dict[str, Any]) -> tuple[int | None, list[Problem]]:
    """The window that all layers have; None: none has one."""
    is_qwen = "max_window_layers" in _DEFAULTS[family]
    window, layers, first = (given.get(name) for name in ("sliding_window", "num_hidden_layers", "max_window_layers"))
    if is_qwen and not given.get("use_sliding_window"):
        window = None
    types = given.get("layer_types")
    if types is not None:
        kinds = set(map(str, types)) if isinstance(types, list) else {str(types)}
        # What the layers are called decides in Qwen; the others go by the window alone.
        if kinds <= {"full_attention"} and (is_qwen or window is None):
            return None, []
        if kinds == {"sliding_attention"} and window is not None:
            return window, []
        return None, [
            Problem(
                f"layer_types = {_shortened(types)} with sliding_window {window} cannot be represented",
                "either all layers have one window, or none has",
            )
        ]
    if not is_qwen or window is None or not isinstance(first, int) or not isinstance(layers, int):
        return window, []
    if 0 < first < layers:
        return None, [
            Problem(
                f"max_window_layers = {first} of {layers} layers with use_sliding_window cannot be represented",
                "either all layers have one window, or none has",
            )
        ]
    return (None if first >= layers else window), []


def _rope(hf: dict[str, Any]) -> tuple[Any, RopeScaling | None, list[Problem]]:
    """theta and scaling, from the one dictionary of transformers 5 or the two fields before it."""
    name = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    given = hf.get(name) or {}
    if not isinstance(given, dict):
        return _DEFAULT_THETA, None, [Problem(f"{name} = {_shortened(given)} is not a table")]
    nested = [key for key, value in given.items() if isinstance(value, dict)]
    if nested:
        return _DEFAULT_THETA, None, [Problem(f"{name} differs between layers ({', '.join(nested)})", "one for all")]
    rest = {key: value for key, value in given.items() if value is not None}
    theta = rest.pop("rope_theta", hf.get("rope_theta", _DEFAULT_THETA))
    old_name = rest.pop("type", "default")
    kind = rest.pop("rope_type", old_name)
    if rest.pop("partial_rotary_factor", 1) != 1:
        partial = given["partial_rotary_factor"]
        return theta, None, [Problem(f"{name}.partial_rotary_factor = {partial!r} cannot be represented", "1 can")]
    if kind == "default":
        used = sorted(rest.keys() - {"factor", "original_max_position_embeddings"})
        return theta, None, [Problem(f"{name}.{key} = {rest[key]!r} has no effect without a rope_type") for key in used]
    if kind not in _ROPE_KEYS:
        hint = "supported: default, linear, llama3, yarn"
        if kind == "dynamic":
            hint += "\nits frequencies change with the length; rope_scaling.kind = 'ntk' is the same at one length"
        return theta, None, [Problem(f"{name}.rope_type = {kind!r} cannot be represented", hint)]
    longest = hf.get("max_position_embeddings")
    original = rest.pop("original_max_position_embeddings", None)
    factor = rest.pop("factor", None)
    if factor is None and kind == "yarn" and original and longest:
        factor = longest / original
    if original is None and isinstance(longest, int):
        # Linear scaling does not depend on it; of the other kinds transformers takes the longest, too.
        original = round(longest / factor) if kind == "linear" and factor else longest
    if kind == "yarn" and not (rest.get("mscale") and rest.get("mscale_all_dim")):
        # Only the two together have an effect.
        rest.pop("mscale", None)
        rest.pop("mscale_all_dim", None)
    found = [Problem(f"{name}.{key} = {rest[key]!r} is not known") for key in sorted(rest.keys() - _ROPE_KEYS[kind])]
    values = {"kind": kind, "factor": factor, "original_max_position": original}
    values |= {ours: rest[theirs] for theirs, ours in _ROPE_KEYS[kind].items() if theirs in rest}
    found += [
        Problem(f"{name}.{key} is missing") for key in _ROPE_KEYS["llama3"] if kind == "llama3" and key not in rest
    ]
    theirs_of = {"original_max_position": f"{name}.original_max_position_embeddings", "factor": f"{name}.factor"}
    if not found:
        values, found = _checked(RopeScaling, values, theirs_of)
    return theta, None if found else RopeScaling(**values), found


def _rope_out(config: ModelConfig) -> tuple[float, dict[str, Any]]:
    scaling, d = config.rope_scaling, config.head_size
    if scaling is None:
        return config.rope_theta, {}
    if scaling.kind == "ntk":
        return config.rope_theta * (scaling.factor ** (d / (d - 2)) if d > 2 else 1.0), {}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_position
    defaults = {field.name: field.default for field in fields(RopeScaling)}
    for theirs, ours in _ROPE_KEYS[scaling.kind].items():
        value = getattr(scaling, ours)
        # Llama's two factors have no default in transformers.
        if scaling.kind == "llama3" or value != defaults[ours]:
            rope[theirs] = value
    return config.rope_theta, rope


def _checked(cls: type, values: dict[str, Any], names: dict[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """The values in the types of the fields of `cls`, and those that are of another; `names` are theirs."""
    right, found = {}, []
    for name, value in values.items():
        try:
            right[name] = checked(value, field_types(cls)[name])
        except TypeError as error:
            found.append(Problem(f"{names.get(name, name)} = {value!r} {error.args[0]}", error.args[1]))
    return right, found


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
