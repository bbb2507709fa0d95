"""compressed-tensors: a checkpoint that transformers, vLLM and SGLang load."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.exports.check import (
    Checked,
    by_attention,
    compared,
    in_float32,
    loading,
    unchecked,
    version,
)
from fxquant.exports.compressed_forms import (
    INTEGERS,
    NV4,
    Form,
    container,
    fixes_global_scale,
    form_of,
    format_of,
    input_arguments,
    site_refusal,
    weight_arguments,
)
from fxquant.exports.compressed_inputs import GLOBAL, fixed_scales, read_often, reciprocal
from fxquant.exports.compressed_rules import (
    cause,
    engine_logits,
    follow_routes,
    read_engine,
    take_buffers,
    under_engine_rules,
)
from fxquant.exports.folder import Exported, output_folder, write_export
from fxquant.exports.joined import global_scales_apart
from fxquant.exports.module_refusals import kind_refusal, repair_refusal
from fxquant.exports.modules import Modules, check_modules, write_modules
from fxquant.exports.sites import CodedSite, coded_sites
from fxquant.exports.source import Source, converted, generation_of
from fxquant.exports.target import Refusal, Target
from fxquant.exports.words import WORD, words
from fxquant.files.doors import Location
from fxquant.formats.floating import E4M3
from fxquant.frontends.hub import without_notices
from fxquant.frontends.patching import exclusive
from fxquant.ir.graph import Level, Site
from fxquant.numerics.weight_codes import GLOBAL_SCALE, WeightCodes
from fxquant.pipeline.arguments import checked_call
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike, as_scheme
from fxquant.schemes.specs import SiteSpec

NAME: Final = "compressed-tensors"
_NEEDED: Final = ("compressed_tensors", "accelerate")


def refusal(gm: GraphModule, site: Site, spec: SiteSpec, calibrated: bool) -> Refusal | None:
    """Why the format cannot hold ``spec`` at ``site``; ``calibrated``: whether there are data for
    the scales that it fixes."""
    if site.role != "linear" and site.role != "head":
        return Refusal(f"it codes linears only, not {site.role}", "fp there")
    return site_refusal(spec, site.shape[1], calibrated)


_WITH_DATA: Final = Target(
    NAME,
    Level.QDQ,
    needs_codes=True,
    check_site=partial(refusal, calibrated=True),
    check_graph=partial(check_modules, NAME),
    never={
        "attn8": "it codes weights and inputs of linears, and attention's products have none",
        "kv8": "transformers does not simulate the storage of a cache",
        "kv4": "transformers does not simulate the storage of a cache",
        "split_outliers": "a linear has codes or floats there, not some columns of each",
    },
    check_kinds=kind_refusal,
    check_repairs=repair_refusal,
    fixes=lambda spec: fixes_global_scale(spec.activation),
)
TARGET: Final = replace(
    _WITH_DATA, check_site=partial(refusal, calibrated=False), with_data=_WITH_DATA
)


@checked_call(path="directory", output="directory")
def compressed_tensors(
    source: Source,
    directory: Location,
    *,
    scheme: SchemeLike | None = None,
    calibration: Batches | None = None,
    tokenizer: Tokenizer | None = None,
    generation_config: GenerationConfig | None = None,
    check: bool = True,
) -> Exported:
    """Write a checkpoint whose linears are compressed-tensors, as ``save_pretrained`` lays it out.

    Args:
        source: a graph of level qdq or integer, or a float model (or its graph) with a ``scheme``,
            and ``calibration`` where that needs it.
        calibration: also what fixes the global scale of an input (``nvfp4``), from a graph too.
        directory: a folder that is not there, is empty or holds an earlier export.
        check: load it with transformers and compare logits, before it is put in place.

    Codes and scales are the graph's own: weight-only schemes give its logits at level qdq to the
    rounding of sums. Codes of 2 to 8 bits stand in 4 or 8. Inputs follow the engine's own rule,
    whose largest difference is in the result, as is that of weights that the engine rounds.

    Raises ExportError: something that the format cannot hold, with the site (before any work where
    the scheme shows it); a folder that cannot be written; a check that fails. Nothing is written.
    """
    target = output_folder(directory)
    data = _read_twice(calibration, scheme)
    gm = converted(source, TARGET.given(data), scheme, data)
    gm, fixed = fixed_scales(gm, data)
    modules = Modules.of(gm)
    return write_export(
        gm,
        target,
        NAME,
        write=lambda folder: _write(modules, folder, fixed),
        check=lambda folder: _check(gm, folder, check, fixed),
        extras=(tokenizer, generation_of(source, generation_config)),
        note=global_scales_apart(gm),
    )


def _read_twice(batches: Batches | None, scheme: SchemeLike | None) -> Batches | None:
    """``batches``, kept where the conversion and what the format fixes may both read them."""
    if batches is None or scheme is None or not TARGET.reads_calibration(as_scheme(scheme)):
        return batches
    return read_often(batches)


def _write(modules: Modules, folder: Path, fixed: Mapping[str, Tensor]) -> None:
    def layout(site: CodedSite) -> dict[str, Tensor]:
        shared = {GLOBAL: fixed[site.path].clone()} if site.path in fixed else {}
        return {**site_tensors(site), **shared}

    write_modules(modules, folder, quantization_config(modules), layout, _dtype(modules))


def _dtype(modules: Modules) -> torch.dtype | None:
    """What the engine has to compute in, if not the graph's own: that of the weights it makes."""
    rounded = any(_form(site).in_bfloat16 for site in coded_sites(modules.gm))
    return torch.bfloat16 if rounded else None


def _form(site: CodedSite) -> Form:
    found = form_of(site.weight_spec, site.site.shape[1])
    assert found is not None  # others are refused
    return found


def site_tensors(site: CodedSite) -> dict[str, Tensor]:
    """What the checkpoint holds for the codes of a site, by the end of its name."""
    held, form = site.codes(), _form(site)
    found = _integers(site, held) if form is INTEGERS else _floats(held, form)
    static = site.static_input()
    if static is not None:
        found["input_scale"] = static[0].reshape(1).clone()  # shared with other sites
        if static[1] is not None:
            found["input_zero_point"] = static[1].to(torch.int8).reshape(1).clone()
    return found


def _integers(site: CodedSite, held: WeightCodes) -> dict[str, Tensor]:
    rows, length = held.codes.shape
    zero = None if held.zero_points is None else _by_rows(held.zero_points, rows).to(torch.int8)
    found = {"weight_scale": _by_rows(held.scales, rows)}
    if format_of(site.spec, INTEGERS) == INTEGERS.alone:
        bits = container(site.weight_spec, INTEGERS)
        found["weight_packed"] = pack(held.codes, bits)
        found["weight_shape"] = torch.tensor([rows, length])
        if zero is not None:
            found["weight_zero_point"] = pack(zero.t(), bits).t()
    else:
        found["weight"] = held.codes
        if zero is not None:
            found["weight_zero_point"] = zero
    return found


def _floats(held: WeightCodes, form: Form) -> dict[str, Tensor]:
    stored = held.tensors()
    found = {"weight_scale": stored["weight_scale"]}
    if form.scale_dtype is None:
        found["weight_scale"] = _by_rows(held.scales, len(held.codes))
    if form.bits == 4:
        found["weight_packed"] = stored["weight"]
    else:  # numbers of fewer bits are numbers of E4M3
        found["weight"] = E4M3.encode(held.spec.grid.decode(held.codes))
    if held.global_scale is not None and form is NV4:
        found["weight_global_scale"] = reciprocal(stored[GLOBAL_SCALE])
    return found


def _by_rows(values: Tensor, rows: int) -> Tensor:
    """One value a row where there is one for the tensor: engines want channels or groups."""
    return values.expand(rows, 1) if values.dim() == 0 else values


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [N, K] as words, int32 [N, ceil(K bits / 32)]: code + 2^(bits - 1), the first in
    the lowest bits.

    >>> [hex(word) for word in pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4)[0]]
    ['0x8f0']
    """
    lifted = codes.to(torch.int16) + 2 ** (bits - 1)
    return words(nn.functional.pad(lifted, (0, -codes.shape[1] % (WORD // bits))), bits)


def quantization_config(modules: Modules) -> dict[str, Any]:
    """The part of config.json that says what the codes mean."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    coded = list(coded_sites(modules.gm))
    for site in coded:
        found = _group(site)
        groups.setdefault(json.dumps(found), (found, []))[1].append(site.path)
    formats = {group["format"] for group, _ in groups.values()}
    named = modules.model.named_modules()
    linears = [path for path, module in named if isinstance(module, nn.Linear)]
    paths = {site.path for site in coded}
    return {
        "quant_method": NAME,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": ["Linear"] if len(groups) == 1 else targets, **group}
            for number, (group, targets) in enumerate(groups.values())
        },
        "ignore": [path for path in linears if path not in paths],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(site: CodedSite) -> dict[str, Any]:
    form, activation = _form(site), site.spec.activation
    return {
        "weights": weight_arguments(site.weight_spec, form, site.site.shape[1]),
        "input_activations": None if activation is None else input_arguments(activation),
        "output_activations": None,
        "format": format_of(site.spec, form),
    }


@exclusive  # it replaces the process's stderr
def _check(gm: GraphModule, folder: Path, wanted: bool, fixed: Mapping[str, Tensor]) -> Checked:
    said = unchecked(gm, wanted, _NEEDED)
    if said is not None:
        return said
    with without_notices(), contextlib.redirect_stderr(io.StringIO()):  # its bars
        name = f"{version('transformers')} with {version(NAME)}"
        with loading(NAME, name):
            engine = read_engine(folder)
        ruled = under_engine_rules(gm, fixed)
        own = take_buffers(ruled, gm, engine)
        follow_routes(ruled, engine)
        compare = partial(
            compared,
            in_float32(gm),
            f"{name}, float32",
            lambda ids: engine_logits(engine, ids),
            ruled,
            lambda: cause(ruled, own),
        )
        return by_attention(compare(), engine, compare)
