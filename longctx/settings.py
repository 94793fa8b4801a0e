"""Values of settings: from a word of the command line or a TOML value to a type, a type in words, and back to TOML."""

from __future__ import annotations

import json
import re
import types
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from longctx.errors import ConfigError

_SIZE = re.compile(r"([+-]?\d[\d_]*)(\.\d+)?([kKmMgG])?")
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SIZES = " (128k and 1M are understood)"
_SIZE_FACTOR = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, as types."""
    return get_type_hints(cls)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: those of a union, or itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def dataclass_of(hint: Any) -> Any:
    """The dataclass among a type's alternatives; None if there is none."""
    return next((m for m in alternatives(hint) if isinstance(m, type) and is_dataclass(m)), None)


def literals(hint: Any) -> list[Any]:
    """The values that a type names one by one."""
    return [value for m in alternatives(hint) if get_origin(m) is Literal for value in get_args(m)]


def is_none(text: str, hint: Any) -> bool:
    """Whether `text` says that an optional setting has no value."""
    return text.lower() == "none" and type(None) in alternatives(hint) and "none" not in literals(hint)


def parse_size(text: str) -> int | None:
    """128k, 1M, 1.5M, 4_096 as a number; None if it is not a whole one."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        return None
    whole, fraction, unit = match.groups()
    if fraction is None:
        return int(whole) * _SIZE_FACTOR[(unit or "").lower()]
    value = float(whole.replace("_", "") + fraction) * _SIZE_FACTOR[(unit or "").lower()]
    return int(value) if unit and value.is_integer() else None


def from_toml(value: Any, hint: Any) -> Any:
    """A TOML value with sizes and "none" read, where the setting is not text anyway."""
    if isinstance(value, str):
        if is_none(value, hint):
            return None
        if int in alternatives(hint) and str not in alternatives(hint) and value not in literals(hint):
            size = parse_size(value)
            return value if size is None else size
    return value


def from_text(text: str, hint: Any) -> Any:
    """What a word of the command line says for a setting of that type; the word itself where it says nothing."""
    if is_none(text, hint):
        return None
    for value in literals(hint):
        if str(value) == text:
            return value
    kinds = alternatives(hint)
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in kinds and (size := parse_size(text)) is not None:
        return size
    if float in kinds:
        try:
            return float(text)
        except ValueError:
            pass
    for kind in kinds:
        if get_origin(kind) is tuple:
            words = [w.strip().strip("'\"") for w in text.strip().strip("[]()").split(",") if w.strip()]
            each = list(get_args(kind))
            if Ellipsis in each:
                each = each[:1]
            # Too many or too few words stay so: the check that follows says what was expected.
            each += [each[-1]] * (len(words) - len(each))
            return [from_text(word, inner) for word, inner in zip(words, each, strict=False)]
    return text


def checked(value: Any, hint: Any) -> Any:
    """`value` as that type, strictly: no text as a number, no number as text; a list may be a tuple, 1 may be 1.0.

    Raises:
        TypeError: it is something else; says what, and what was expected.
    """
    from pydantic import TypeAdapter, ValidationError

    if isinstance(value, list):
        value = tuple(value)
    # To Python, True is 1, and so a member of Literal[0, 1].
    is_bool_for_number = isinstance(value, bool) and bool not in alternatives(hint) and value not in _bools(hint)
    try:
        if not is_bool_for_number:
            return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError:
        pass
    raise TypeError(f"is {kind_in_words(value)}", f"expected {in_words(hint)}")


def _bools(hint: Any) -> list[bool]:
    return [value for value in literals(hint) if isinstance(value, bool)]


def in_words(hint: Any) -> str:
    """A type in words, as what was expected."""
    words = []
    for kind in alternatives(hint):
        if get_origin(kind) is Literal:
            words.append("one of " + ", ".join(repr(v) for v in get_args(kind)))
        elif get_origin(kind) is tuple:
            inner = get_args(kind)
            length = "" if Ellipsis in inner else f" of length {len(inner)}"
            words.append(f"a list{length}, each {in_words(inner[0])}")
        elif is_dataclass(kind):
            words.append("a table of settings")
        else:
            words.append({**_PLAIN, int: _PLAIN[int] + _SIZES, type(None): '"none"'}.get(kind, str(kind)))
    return " or ".join(words)


def kind_in_words(value: Any) -> str:
    """The type of a value in words, as what was got."""
    if isinstance(value, tuple | list):
        return f"a list of length {len(value)}"
    if isinstance(value, dict):
        return "a table"
    if value is None:
        return '"none"'
    return "a number with a fraction" if isinstance(value, float) else _PLAIN.get(type(value), type(value).__name__)


def toml_tables(name: str, section: Any) -> list[str]:
    """A dataclass as TOML tables, those of nested dataclasses after it."""
    lines, tables = [f"[{name}]"], []
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            tables += toml_tables(f"{name}.{item.name}", value)
        else:
            lines.append(f"{item.name} = {_toml_value(value)}")
    return ["\n".join([*lines, ""]), *tables]


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    raise ConfigError(f"a setting of type {type(value).__name__} cannot be written as TOML: {value!r}")
