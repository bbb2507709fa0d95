"""The model's name of each stored tensor, as the transformers that is installed renames them.

transformers 4.57 adds or drops a base model's prefix and renames gamma and beta. transformers 5
has patterns for each architecture, some of which make one weight of several stored ones: a
mixture's experts lie in one tensor there, in the files each by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fxquant.errors import ModelError

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key
except ImportError:  # transformers 4
    get_model_conversion_mapping = None


@dataclass(frozen=True)
class Names:
    """The model's names by stored ones, and what is made of several stored tensors.

    ``made``: the model's names of the weights that a stored tensor has a part in, by its name.
    ``experts``: of a weight that is a stack, for each expert the stored tensors that lie one behind
    the other in it, "" for one that is missing; other ways to make a weight are not among them.
    """

    names: dict[str, str]
    made: dict[str, tuple[str, ...]]
    experts: dict[str, tuple[tuple[str, ...], ...]]


def renamed(model: PreTrainedModel, keys: Iterable[str], directory: Path) -> Names:
    """Names in ``model`` (on meta) of a checkpoint's tensors; unknown ones keep theirs, or have
    the prefix. Raises ModelError where the files mix a headless model's names with a head's."""
    stored = list(keys)
    if get_model_conversion_mapping is None:
        return Names(_by_prefix(model, stored, directory), {}, {})
    mapping = get_model_conversion_mapping(model)
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if not isinstance(each, WeightConverter)]
    state = model.state_dict()
    names: dict[str, str] = {}
    made: dict[str, tuple[str, ...]] = {}
    parts: dict[str, dict[str, list[str]]] = {}
    for key in stored:
        name, pattern = _by_patterns(model, key, renamings, converters, state)
        if pattern is None:
            names[key] = name
        else:
            made[key] = _made(name, pattern, converters)
            parts.setdefault(name, {}).setdefault(pattern, []).append(key)
    return Names(names, made, dict(_experts(parts, converters)))


def _experts(
    parts: dict[str, dict[str, list[str]]], converters: list[Any]
) -> Iterator[tuple[str, tuple[tuple[str, ...], ...]]]:
    """Weights made by stacking lists of tensors, and of several lists by then joining each row."""
    for name, found in parts.items():
        patterns = _converter(next(iter(found)), converters).source_patterns
        operations = [
            (type(each).__name__, each.dim if hasattr(each, "dim") else None)
            for each in _converter(patterns[0], converters).operations
        ]
        joined = [("Concatenate", 1)] if len(patterns) > 1 else []
        lists = [{_number(key): key for key in found.get(each, ())} for each in patterns]
        if operations == [("MergeModulelist", 0), *joined]:
            numbers = sorted({number for keys in lists for number in keys})
            yield name, tuple(tuple(keys.get(n, "") for keys in lists) for n in numbers)


def _number(key: str) -> tuple[int, ...]:
    return tuple(int(part) for part in key.split(".") if part.isdigit())


def _converter(pattern: str, converters: list[Any]) -> Any:
    return next(each for each in converters if pattern in each.source_patterns)


def _by_patterns(
    model: PreTrainedModel, key: str, renamings: list[Any], converters: list[Any], state: Any
) -> tuple[str, str | None]:
    prefix = model.base_model_prefix
    found: tuple[str, str | None] = rename_source_key(key, renamings, converters, prefix, state)
    if found[0] not in state and key in state:
        found = rename_source_key(key, [], [], prefix, state)
    return found


def _made(name: str, pattern: str, converters: list[Any]) -> tuple[str, ...]:
    """Every weight that the converter with this source pattern makes, ``name`` being the first."""
    converter = _converter(pattern, converters)
    first = converter.target_patterns[0]
    return tuple(name.replace(first, target) for target in converter.target_patterns)


def _by_prefix(model: PreTrainedModel, keys: list[str], directory: Path) -> dict[str, str]:
    prefix = model.base_model_prefix
    has_it = bool(prefix) and any(key.startswith(prefix) for key in keys)
    adds = bool(prefix) and hasattr(model, prefix) and not has_it
    drops = has_it and not hasattr(model, prefix)
    try:
        names: dict[str, str] = model._get_key_renaming_mapping(keys, None, drops, adds)
    except ValueError as error:
        raise ModelError(
            f"{directory} mixes weights of a headless model, whose names lack {prefix!r}, with a "
            "head's: it was not written by save_pretrained"
        ) from error
    return names
