"""compressed-tensors: a checkpoint that transformers, vLLM and SGLang load."""

from __future__ import annotations

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.exports.check import Checked, compared, in_float32, loading, unchecked, version
from fxquant.exports.compressed_rules import cause, take_buffers, under_engine_rules
from fxquant.exports.folder import Exported, output_folder, write_export
from fxquant.exports.modules import Modules, check_modules, repair_refusal, write_modules
from fxquant.exports.sites import CodedSite, coded_sites, groups
from fxquant.exports.source import Source, converted, generation_of
from fxquant.exports.target import Refusal, Target, nearest_group
from fxquant.files.doors import Location
from fxquant.formats.integer import IntegerGrid, integer
from fxquant.frontends.hub import without_notices
from fxquant.frontends.patching import exclusive
from fxquant.frontends.pretrained import read_written
from fxquant.ir.graph import Level, Site
from fxquant.ir.leaves import Conv1D
from fxquant.pipeline.arguments import checked_call
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike
from fxquant.schemes.specs import ActivationSpec, SiteSpec, TensorSpec
from fxquant.schemes.spelling import spell_site

NAME: Final = "compressed-tensors"
_NEEDED: Final = ("compressed_tensors", "accelerate")
_BITS_OF_A_WORD: Final = 32


def refusal(gm: GraphModule, site: Site, spec: SiteSpec) -> Refusal | None:
    """Why the format cannot hold ``spec`` at ``site``."""
    weight, activation = spec.weight, spec.activation
    assert weight is not None
    if site.role != "linear" and site.role != "head":
        return Refusal(f"it codes linears only, not {site.role}", "fp there")
    if isinstance(gm.get_submodule(site.path), Conv1D):
        return Refusal("it codes nn.Linear only, and this is a Conv1D", "ONNX (--to onnx)")
    if not isinstance(weight.grid, IntegerGrid):
        return Refusal(f"codes of {weight.grid.name} are not written here", "w8")
    ragged = nearest_group(weight, site.shape[1])
    if ragged is not None:
        return ragged
    if activation is not None and activation.tensor.granularity == "group":
        return Refusal("groups of an input have no form there", "w8a8-dynamic-token")
    if activation is None:
        return None
    if not isinstance(activation.tensor.grid, IntegerGrid) or activation.tensor.grid.bits != 8:
        name = activation.tensor.grid.name
        reason = f"engines run inputs of 8 bits, not of {name}"
        eight = ActivationSpec(TensorSpec(integer(8), "token"))
        return Refusal(reason, spell_site(SiteSpec(weight, eight)))
    return None


TARGET: Final = Target(
    NAME,
    Level.QDQ,
    needs_codes=True,
    check_site=refusal,
    check_graph=partial(check_modules, NAME),
    never={
        "attn8": "it codes weights and inputs of linears, and attention's products have none",
        "kv8": "transformers does not simulate the storage of a cache",
        "kv4": "transformers does not simulate the storage of a cache",
        "split_outliers": "a linear has codes or floats there, not some columns of each",
    },
    check_repairs=repair_refusal,
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
        directory: a folder that is not there, is empty or holds an earlier export.
        check: load it with transformers and compare logits, before it is put in place.

    Codes and scales are the graph's own: weight-only schemes give its logits at level qdq to the
    rounding of sums. Codes of 2 to 8 bits stand in 4 or 8. Inputs follow the engine's own rule,
    whose largest difference is in the result.

    Raises ExportError: something that the format cannot hold, with the site (before any work where
    the scheme shows it); a folder that cannot be written; a check that fails. Nothing is written.
    """
    target = output_folder(directory)
    gm = converted(source, TARGET, scheme, calibration)
    modules = Modules.of(gm)
    return write_export(
        gm,
        target,
        NAME,
        write=lambda folder: _write(modules, folder),
        check=lambda folder: _check(gm, folder, check),
        extras=(tokenizer, generation_of(source, generation_config)),
    )


def _write(modules: Modules, folder: Path) -> None:
    write_modules(modules, folder, quantization_config(modules), site_tensors)


def site_tensors(site: CodedSite) -> dict[str, Tensor]:
    """What the checkpoint holds for the codes of a site, by the end of its name."""
    held = site.codes()
    rows, length = held.codes.shape
    scale = _by_rows(held.scales, rows)
    zero = None if held.zero_points is None else _by_rows(held.zero_points, rows).to(torch.int8)
    found = {"weight_scale": scale}
    if site.spec.activation is None:
        bits = container(site.weight_spec)
        found["weight_packed"] = pack(held.codes, bits)
        found["weight_shape"] = torch.tensor([rows, length])
        if zero is not None:
            found["weight_zero_point"] = pack(zero.t(), bits).t()
    else:
        found["weight"] = held.codes
        if zero is not None:
            found["weight_zero_point"] = zero
    static = site.static_input()
    if static is not None:
        found["input_scale"] = static[0].reshape(1).clone()  # shared with other sites
        if static[1] is not None:
            found["input_zero_point"] = static[1].to(torch.int8).reshape(1).clone()
    return found


def _by_rows(values: Tensor, rows: int) -> Tensor:
    """One value a row where there is one for the tensor: engines want channels or groups."""
    return values.expand(rows, 1) if values.dim() == 0 else values


def container(spec: TensorSpec) -> int:
    """Bits that a code has there: 4 or 8."""
    return 4 if spec.grid.bits <= 4 else 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [N, K] as words, int32 [N, ceil(K bits / 32)]: code + 2^(bits - 1), the first in
    the lowest bits.

    >>> [hex(word) for word in pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4)[0]]
    ['0x8f0']
    """
    share = _BITS_OF_A_WORD // bits
    lifted = codes.to(torch.int64) + 2 ** (bits - 1)
    padded = nn.functional.pad(lifted, (0, -codes.shape[1] % share))
    places = torch.arange(share) * bits
    words = (padded.unflatten(1, (-1, share)) << places).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


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
    weight, activation = site.weight_spec, site.spec.activation
    size = groups(weight, site.site.shape[1])
    weights = _arguments(container(weight), weight.grid.has_zero_point, "channel", False)
    if size:
        weights |= {"strategy": "group", "group_size": size}
    inputs = None
    if activation is not None:
        spec = activation.tensor
        inputs = _arguments(8, spec.grid.has_zero_point, spec.granularity, activation.dynamic)
    return {
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": "pack-quantized" if activation is None else "int-quantized",
    }


def _arguments(bits: int, has_zero_point: bool, strategy: str, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": not has_zero_point,
        "strategy": strategy,
        "group_size": None,
        "dynamic": dynamic,
    }


@exclusive  # it replaces the process's stderr
def _check(gm: GraphModule, folder: Path, wanted: bool) -> Checked:
    said = unchecked(gm, wanted, _NEEDED)
    if said is not None:
        return said
    with without_notices(), contextlib.redirect_stderr(io.StringIO()):  # its bars
        name = f"{version('transformers')} with {version(NAME)}"
        with loading(NAME, name):
            engine = read_written(folder).eval()
        ruled = under_engine_rules(gm)
        own = take_buffers(ruled, gm, engine)
        return compared(
            in_float32(gm),
            f"{name}, float32",
            lambda ids: engine(input_ids=ids, use_cache=False).logits,
            ruled,
            lambda: cause(ruled, own),
        )
