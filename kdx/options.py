"""Options of a section as an instance of the dataclass that is their schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import lru_cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from kdx.errors import ConfigError, did_you_mean

_MAPPING = "dict[str, Any]"
"""The annotation of an option that is a section of its own."""


def read_options(schema: type[Any], options: Mapping[str, Any], where: str, who: str = "") -> Any:
    """An instance of a dataclass from plain options: unknown keys, missing keys and wrong types are refused."""
    prefix = f"{where}." if where else ""
    known = {item.name: item.type for item in fields(schema)}
    for key in options:
        if key not in known:
            raise ConfigError(f"{prefix}{key}: unknown option{who}; {did_you_mean(str(key), known, what='options')}")
    try:
        merged = _defaults(schema)  # type: ignore[arg-type]  # every class is hashable
        if options:
            try:
                merged = OmegaConf.merge(merged, dict(options))
            except (OmegaConfBaseException, ValueError, TypeError):  # one by one, so that it can be given a place
                for option, value in options.items():
                    merged = _with(merged, option, value, known[option], options, prefix, who)
        return OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(f"{prefix}{key}: it is missing{who}; expected {type_text(known.get(key))}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{where or 'config'}: {_detail(error)}{who}") from error


def plain_options(options: Any) -> dict[str, Any]:
    """A component's options as a mapping, for digests and for showing."""
    return asdict(options) if is_dataclass(options) and not isinstance(options, type) else {}


def type_text(annotation: Any) -> str:
    """The type of an option as its class says it."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).removeprefix("typing.")


@lru_cache(maxsize=512)
def _defaults(schema: type[Any]) -> Any:
    """A dataclass as OmegaConf reads it; whoever merges something into it gets a copy."""
    return OmegaConf.structured(schema)


def _with(
    merged: Any, option: str, value: Any, annotation: Any, options: Mapping[str, Any], prefix: str, who: str
) -> Any:
    """The options so far with one more, or a `ConfigError` that names its place."""
    try:
        return OmegaConf.merge(merged, {option: value})
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None) or option
        if annotation == _MAPPING and not isinstance(value, Mapping):
            raise ConfigError(f"{prefix}{option}: found {value!r}, expected a mapping of options{who}") from error
        expected = f"found {_at(options, key)!r}, expected {type_text(annotation)}"
        raise ConfigError(f"{prefix}{key}: {expected}{who}: {_detail(error)}") from error


def _at(options: Mapping[str, Any], key: str) -> Any:
    """What stands at the key of an OmegaConf error, as in `values.a[2]`; the nearest thing above where it is gone."""
    value: Any = options
    for part in key.replace("[", ".").replace("]", "").split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, (list, tuple)) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
    return value


def _detail(error: BaseException) -> str:
    """The message of an OmegaConf error, without what it says of its own types."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
