"""Which stored tensor is which weight of a model, by transformers' rules: its warnings are errors.

A weight that is missing would stay random, one that is left over would be dropped, one of another
kind would be cast: each makes another model than the files hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxquant.errors import ModelError
from fxquant.files.tensor_file import dtype_name
from fxquant.frontends.weight_files import Stored, listed
from fxquant.frontends.weight_renaming import renamed

# Once stored for each layer, now computed; transformers ignores them where there is such a buffer.
_COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
Stacks: TypeAlias = dict[str, tuple[tuple[Stored, ...], ...]]
_NO_WEIGHT = r"(^|\.)attn\.masked_bias$"  # once GPT-2's lowest score, -1e4


def match(
    model: PreTrainedModel, stored: Mapping[str, Stored], directory: Path
) -> tuple[dict[str, Stored], Stacks]:
    """The stored tensor of each parameter and persistent buffer of ``model`` (on meta), by name;
    and of each weight that is a stack of experts, what is stored for each of them.

    Names are renamed as transformers does (a base model's prefix, gamma and beta); tied parameters
    share what is stored for one of them; leftovers that the architecture says to ignore, such as
    ``inv_freq``, are ignored; a weight that transformers makes of several stored ones is left out.
    Raises ModelError naming what is missing, left over, misshapen or of another kind, and tied
    weights that differ, more or fewer experts than the model has, or misshapen ones.
    """
    names = renamed(model, stored, directory)
    state = model.state_dict(keep_vars=True)
    _check_complete(model, names.names, names.made, directory)
    found: dict[str, Stored] = {}
    for key, name in names.names.items():
        if name in found:
            raise ModelError(f"{stored[key].path}: {found[name].name} and {key} are both {name}")
        if name in state:
            _check_kind(name, stored[key], state[name])
            found[name] = stored[key]
    stacks = _stacked(state, names.experts, stored, directory)
    return _with_ties(model, found), stacks


def _stacked(
    state: Mapping[str, Tensor],
    stacks: Mapping[str, tuple[tuple[str, ...], ...]],
    stored: Mapping[str, Stored],
    directory: Path,
) -> Stacks:
    found = {}
    for name, rows in stacks.items():
        if name not in state:  # of a layer that the architecture says to ignore: see match
            continue
        wanted = tuple(state[name].shape)
        for keys in rows:
            if "" in keys:
                raise ModelError(
                    f"{directory} holds {listed(list(filter(None, keys)))} alone, of {len(keys)} "
                    f"tensors that an expert of {name} is made of"
                )
        found[name] = tuple(tuple(stored[key] for key in row) for row in rows)
        for row in found[name]:
            lengths = sum(length for each in row for length in each.shape[:1])
            shape = (len(rows), lengths, *row[0].shape[1:])
            if shape != wanted or len({each.shape[1:] for each in row}) != 1:
                raise ModelError(
                    f"{name} has shape {list(wanted)} by the config; {row[0].path} holds "
                    f"{listed([each.name for each in row])} and others for {len(rows)} experts, "
                    f"which make {list(shape)}"
                )
            for each in row:
                _check_floating(name, each, state[name])
    return found


def _check_complete(
    model: PreTrainedModel,
    names: Mapping[str, str],
    made: Mapping[str, tuple[str, ...]],
    directory: Path,
) -> None:
    """Raise ModelError where stored tensors and weights of the model are not the same ones."""
    state = model.state_dict(keep_vars=True)
    held = {*names.values(), *(name for targets in made.values() for name in targets)}
    tied = {id(state[name]) for name in held & state.keys()}
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    optional = _patterns(model._keys_to_ignore_on_load_missing)
    # Only a buffer may be missing where the architecture says so: it is computed, not learned.
    missing = [
        name
        for name, value in state.items()
        if name not in held
        and id(value) not in tied
        and (name in learned or not _any(optional, name))
    ]
    buffers = {name for name, _ in model.named_buffers()}
    ignored = _patterns(model._keys_to_ignore_on_load_unexpected)
    ignored += [each for each in _COMPUTED if any(re.search(each, name) for name in buffers)]
    targets = {**{key: (name,) for key, name in names.items()}, **made}
    unexpected = [
        key
        for key, each in targets.items()
        if not any(name in state or name in buffers or _any(ignored, name) for name in each)
    ]
    check_names(str(directory), missing, unexpected)


def _patterns(found: Iterable[str] | None) -> list[str]:
    return list(found or ())


def _any(patterns: list[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def check_names(where: str, missing: list[str], unexpected: list[str]) -> None:
    """Raise ModelError for weights that a checkpoint lacks, or holds beyond the model's."""
    unexpected = [name for name in unexpected if not re.search(_NO_WEIGHT, name)]
    if missing:
        raise ModelError(
            f"{where} lacks weights of its model, which would stay random: {listed(missing)}"
        )
    if unexpected:
        raise ModelError(
            f"{where} holds weights that the model of its config.json does not have: "
            f"{listed(unexpected)}; is config.json another model's (fewer layers)?"
        )


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
    _check_floating(name, stored, wanted)


def _check_floating(name: str, stored: Stored, wanted: Tensor) -> None:
    if _kind(stored.dtype) != _kind(wanted.dtype):
        raise ModelError(
            f"{name} is {_kind(stored.dtype)} ({dtype_name(stored.dtype)}) in "
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
