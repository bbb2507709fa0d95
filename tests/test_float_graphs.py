"""Graphs of other grids: an independent float64 reference, both levels, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant.checkpoint.manifest import MANIFEST, write_manifest
from fxquant.errors import CheckpointError
from fxquant.formats.table import GRIDS
from fxquant.ir.graph import info, is_op
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.ir.size import bits_per_weight
from fxquant.numerics.clipping import beyond_grid
from tests.architectures import llama, opt, token_ids
from tests.grid_reference import reference

SCHEMES = (
    *("fp8", "fp8-static", "mxfp8", "mxfp6-ceil", "mxfp4-rceil", "nvfp4", "wmxfp4", "wnf4-g16"),
    *("w4-g16/ae4m3-dynamic-token", "wmxfp4/amxfp8", "we4m3/a8-static-asym:absmax"),
    *("w3-g8-asym/ae2m3-dynamic-g4", "w4-g16-e8m0/a8-dynamic-token", "w4-g16/a8-dynamic-g12"),
    *("we4m3-tensor/ae5m2-dynamic", "we3m2-g9-e8m0-even/ae2m1-dynamic-g6-e4m3", "w8-asym/afp8"),
)
BLOCKS = (
    *(s for s in SCHEMES if "static" not in s),
    *("fp8-static", "we4m3/ae2m1-static:absmax"),
)


def bits_of(scheme: str, level: str = "integer") -> Any:
    ids = token_ids(2, 9)
    return fxquant.convert(llama(), scheme, calibration=[ids], level=level)


@torch.no_grad()
@pytest.mark.parametrize("text", BLOCKS)
def test_logits_are_those_of_a_module_swap(text: str) -> None:
    ids = token_ids(2, 9)
    plain = llama().double()(input_ids=ids).logits
    wanted, found = reference(text, ids), bits_of(text)(ids)
    # A value near a middle may flip by a float32 rounding before it, and few codes are coarse.
    assert float((found.double() - wanted).norm() / (wanted - plain).norm()) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("text", SCHEMES)
def test_both_levels_compute_the_same(text: str) -> None:
    ids = token_ids(2, 9)
    plain = llama()(input_ids=ids).logits
    low, high = bits_of(text)(ids), bits_of(text, "qdq")(ids)
    assert float((low - high).norm() / (low - plain).norm()) < 1e-4


def nodes_of(gm: Any, op: Any) -> list[Any]:
    return [operands(node) for node in gm.graph.nodes if is_op(node, op)]


def test_the_steps_stand_apart_and_codes_are_bytes() -> None:
    fp8 = bits_of("fp8")
    (call, *_) = nodes_of(fp8, OPS.code_gemm.default)
    assert is_op(call.x_codes, OPS.quantize_to.default)
    assert is_op(operands(call.x_codes).scale, OPS.choose_scale.default)
    assert len(nodes_of(fp8, OPS.rescale.default)) == len(nodes_of(fp8, OPS.code_gemm.default))
    path = "model.layers.0.self_attn.q_proj"
    site = fp8.get_submodule(path)
    assert site.weight.dtype == torch.float8_e4m3fn
    nvfp4 = bits_of("nvfp4")
    site = nvfp4.get_submodule(path)
    assert site.weight.dtype == torch.uint8
    assert tuple(site.weight.shape) == (32, 16)
    assert site.weight_scale.dtype == torch.float8_e4m3fn
    assert tuple(site.weight_scale.shape) == (32, 2)
    assert tuple(site.weight_global_scale.shape) == ()
    assert bits_of("mxfp4").get_submodule(path).weight_scale.dtype == torch.uint8
    biased = fxquant.convert(opt(), "fp8")
    assert nodes_of(biased, OPS.add_bias.default)
    assert nodes_of(biased, OPS.code_gemm.default)


def test_the_numbers_of_a_grid_stand_beside_the_histogram() -> None:
    """E4M3's crowd around 0; in the outer rows there are few."""
    path = "model.layers.0.mlp.down_proj"
    for scheme, name, count in (("fp8-static", "e4m3", 253), ("w8/ae2m1-static", "e2m1", 15)):
        qmodel = bits_of(scheme)
        (record,) = (r for r in info(qmodel).site_records if r.path == path)
        page = str(fxquant.inspect(qmodel).site(path))
        drawing = page[page.index("input in calibration") : page.index("of the weight")]
        rows = [line for line in drawing.splitlines() if line.endswith(tuple("0123456789"))]
        rows = [line.partition("|")[0] for line in rows if "|" in line]
        ticks = [row[11:].strip() for row in rows]
        found = [int(t[:-2]) if " " in t else len(t) for t in ticks]
        values = torch.tensor(GRIDS[name].levels) * (record.scale or 0)
        inside = (values >= (record.seen_low or 0)) & (values <= (record.seen_high or 0))
        assert f"number of {name}, {int(inside.sum())} of {count} there" in " ".join(
            drawing.split()
        )
        assert sum(found) == int(inside.sum())
        start = torch.tensor([float(row[:10]) for row in rows])
        zero = int((start <= 0).sum()) - 1
        assert found[zero] == max(found) > found[0] + found[-1] or name == "e2m1"


def test_bits_count_what_scales_occupy() -> None:
    found = {s: bits_per_weight(bits_of(s)) for s in ("wmxfp4", "wnvfp4", "wmxfp8", "w4-g32")}
    assert found["wmxfp4"] == 4.25
    assert found["wmxfp8"] == 8.25
    assert 4.5 < found["wnvfp4"] < 4.6  # and one scale for each of the small matrices
    assert found["w4-g32"] == 5.0


@torch.no_grad()
@pytest.mark.parametrize(
    "text",
    [
        *("fp8-static", "wnf4-g16", "w3-g8-asym/ae2m3-dynamic-g4", "mxfp4+gptq", "wnvfp4+refine"),
        '{"scheme": "nvfp4", "overrides": {"head": "wmxfp4", "embeddings": "wnvfp4"}}',
        '{"scheme": "fp8", "overrides": {"embeddings": "we4m3", "head": "we3m2/a8-dynamic"}}',
    ],
)
def test_what_is_saved_is_loaded(text: str, tmp_path: Path) -> None:
    ids = token_ids(2, 9)
    for level in ("qdq", "integer"):
        qmodel = bits_of(text, level)
        fxquant.save(qmodel, tmp_path / level)
        again = fxquant.load(tmp_path / level)
        assert torch.equal(again(ids), qmodel(ids))
        assert info(again).scheme == info(qmodel).scheme
        assert str(fxquant.inspect(again).layer(0)) == str(fxquant.inspect(qmodel).layer(0))
    page = fxquant.inspect(qmodel).site("model.layers.0.mlp.down_proj")
    assert "of the weight (bars logarithmic)" in page


@pytest.mark.parametrize(
    ("scheme", "name", "change", "message"),
    [
        ("fp8", "weight", lambda v: v.view(torch.uint8).fill_(0x7F), "finite"),
        ("nvfp4", "weight_scale", lambda v: v.view(torch.uint8).fill_(0x80), "positive scales"),
        ("nvfp4", "weight_global_scale", lambda v: v.fill_(-1.0), "positive scales"),
        ("mxfp4", "weight_scale", lambda v: v.fill_(255), "positive scales"),
        ("mxfp6", "weight", lambda v: v.fill_(64), "those of e2m3"),
    ],
)
def test_a_changed_tensor_is_refused(
    scheme: str, name: str, change: Any, message: str, tmp_path: Path
) -> None:
    qmodel = bits_of(scheme)
    change(qmodel.get_submodule("model.layers.0.self_attn.q_proj").get_buffer(name))
    with pytest.raises(CheckpointError, match=f"q_proj.{name}: expected .*{message}"):
        fxquant.save(qmodel, tmp_path / "bad")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"e8m0"', '"e8m0-ceil"', "dynamic range is by .*e8m0-ceil"),
        ('"e2m1", "e8m0", 32', '"e2m1", "e8m0", 16', "groups do not cover 32 columns"),
        ('"e2m1", "e2m1", 32, 32', '"e2m1", "e2m1", 32, 16', "groups"),
        ('"e2m1", "e2m1", 32, 32', '"e2m1", "e3m2", 32, 32', "e3m2|computed"),
    ],
)
def test_a_changed_node_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    fxquant.save(bits_of("mxfp4"), folder)
    path = folder / "graph.json"
    text = path.read_text()
    compact = old if old in text else old.replace(", ", ",")
    assert compact in text
    path.write_text(text.replace(compact, new, 1))
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=message):
        fxquant.load(folder)


@pytest.mark.parametrize("text", ["mxfp4-even", "nvfp4", "fp8-static"])
def test_explain_takes_them_apart(text: str) -> None:
    why = fxquant.explain(
        llama(), text, data=[token_ids(2, 9)], calibration=[token_ids(2, 12, seed=5)]
    )
    assert why.causes is not None
    assert sum(why.causes.values()) == pytest.approx(why.delta_loss, abs=1e-5)


@pytest.mark.parametrize(("text", "clips"), [("mxfp4", True), ("mxfp4-rceil", False)])
def test_what_a_rule_clips_is_counted_and_a_cause(text: str, clips: bool) -> None:
    """floor saturates what lies beyond the grid's end, rceil has nothing there."""
    counted = fxquant.evaluate(bits_of(text), token_ids(4, 24, seed=9))
    assert counted.share_clipped is not None
    assert (counted.share_clipped > 0) is clips
    why = fxquant.explain(llama(), text, data=[token_ids(2, 9)])
    assert why.causes is not None
    assert (why.causes["clipping"] != 0) is clips


def test_saturation_beyond_half_a_spacing_is_clipping() -> None:
    x = torch.tensor([[6.9, -7.1, 7.1, 0.1], [12.5, 14.1, -15.0, 1.0]])
    scale = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    assert int(beyond_grid(x, scale, GRIDS["e2m1"], 2)) == 4
    assert int(beyond_grid(x, torch.tensor(100.0), GRIDS["e2m1"])) == 0
