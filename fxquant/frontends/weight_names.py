"""Which stored tensor is which weight of a model, by transformers' rules: its warnings are errors.

A weight that is missing would stay random, one that is left over would be dropped, one of another
kind would be cast: each makes another model than the files hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import _find_missing_and_unexpected_keys

from fxquant.errors import ModelError
from fxquant.frontends.weight_files import Stored, listed


def match(
    model: PreTrainedModel, stored: Mapping[str, Stored], directory: Path
) -> dict[str, Stored]:
    """The stored tensor of each parameter and persistent buffer of ``model`` (on meta), by name.

    Names are renamed as transformers does (a base model's prefix, gamma and beta); tied parameters
    share what is stored for one of them; leftovers that the architecture says to ignore, such as
    ``inv_freq``, are ignored. Raises ModelError naming what is missing, left over, misshapen or of
    another kind, and tied weights that differ.
    """
    adds_prefix, renamed = _renamed(model, list(stored), directory)
    checkpoint_keys = list(renamed.values())
    missing, unexpected = _find_missing_and_unexpected_keys(
        model, list(stored), checkpoint_keys, _drops_prefix(model, list(stored)), None
    )
    # Only a buffer may be missing where the architecture says so: it is computed, not learned.
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    needed = [name for name in missing if name in learned]
    missing, unexpected = model._adjust_missing_and_unexpected_keys(
        [name for name in missing if name not in learned], unexpected, adds_prefix
    )
    check_names(str(directory), [*missing, *needed], unexpected)
    state = model.state_dict(keep_vars=True)
    found: dict[str, Stored] = {}
    for key, name in renamed.items():
        if name in found:
            raise ModelError(f"{stored[key].path}: {found[name].name} and {key} are both {name}")
        if name in state:
            _check_kind(name, stored[key], state[name])
            found[name] = stored[key]
    return _with_ties(model, found)


def check_names(where: str, missing: list[str], unexpected: list[str]) -> None:
    """Raise ModelError for weights that a checkpoint lacks, or holds beyond the model's."""
    if missing:
        raise ModelError(
            f"{where} lacks weights of its model, which would stay random: {listed(missing)}"
        )
    if unexpected:
        raise ModelError(
            f"{where} holds weights that the model of its config.json does not have: "
            f"{listed(unexpected)}; is config.json another model's (fewer layers)?"
        )


def _has_prefix(model: PreTrainedModel, keys: list[str]) -> bool:
    prefix = model.base_model_prefix
    return bool(prefix) and any(key.startswith(prefix) for key in keys)


def _drops_prefix(model: PreTrainedModel, keys: list[str]) -> bool:
    return _has_prefix(model, keys) and not hasattr(model, model.base_model_prefix)


def _renamed(
    model: PreTrainedModel, keys: list[str], directory: Path
) -> tuple[bool, dict[str, str]]:
    """Whether a prefix is added, and the model's names by stored ones."""
    prefix = model.base_model_prefix
    adds = bool(prefix) and hasattr(model, prefix) and not _has_prefix(model, keys)
    try:
        names = model._get_key_renaming_mapping(keys, None, _drops_prefix(model, keys), adds)
    except ValueError as error:
        raise ModelError(
            f"{directory} mixes weights of a headless model, whose names lack {prefix!r}, with a "
            "head's: it was not written by save_pretrained"
        ) from error
    return adds, names


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating-point"
    return "complex" if dtype.is_complex else "integer"


def _check_kind(name: str, stored: Stored, wanted: Tensor) -> None:
    shape = tuple(wanted.shape)
    if stored.shape != shape:
        raise ModelError(
            f"{name} has shape {list(stored.shape)} in {stored.path}, the config says {list(shape)}"
        )
    if _kind(stored.dtype) != _kind(wanted.dtype):
        raise ModelError(
            f"{name} is {_kind(stored.dtype)} ({str(stored.dtype).removeprefix('torch.')}) in "
            f"{stored.path}, the model's is {_kind(wanted.dtype)}: a quantized checkpoint? fxquant "
            "starts from the float one"
        )


def _with_ties(model: PreTrainedModel, found: dict[str, Stored]) -> dict[str, Stored]:
    """Tied parameters, each with the tensor that is stored for one of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    result = dict(found)
    for names in groups.values():
        held = [name for name in names if name in found]
        for other in held[1:]:
            if not torch.equal(found[held[0]].read(), found[other].read()):
                raise ModelError(
                    f"{held[0]} and {other} are one weight by the config (tie_word_embeddings), "
                    f"but {found[other].path} and {found[held[0]].path} hold two different ones"
                )
        if held:
            result.update((name, found[held[0]]) for name in names)
    return result
