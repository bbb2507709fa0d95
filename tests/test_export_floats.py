"""compressed-tensors checkpoints of FP8, MX and NVFP4: what transformers makes of them is ours."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import fxquant
from fxquant.cli.main import main
from fxquant.errors import ExportError, SchemeError
from fxquant.exports import compressed_tensors
from fxquant.exports.compressed_forms import site_refusal
from fxquant.exports.folder import RECORD
from fxquant.exports.runtimes import RUNTIMES
from fxquant.exports.sites import coded_sites
from fxquant.formats.scales import POWERS
from fxquant.frontends.hub import without_notices
from fxquant.run.loss import token_nll
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import SiteSpec
from tests.models import SMALL_OPT, small_opt
from tests.test_export_compressed import Untouched, batches, tiny_llama

ENGINE = pytest.mark.needs_program(
    find_spec("compressed_tensors"), "compressed-tensors, of the exports extra"
)
FORMATS = {  # of weights, and the format that says what they are
    "wfp8": "naive-quantized",
    "we4m3-tensor": "naive-quantized",
    "we4m3-g16": "naive-quantized",
    "we4m3-g16-e4m3": "naive-quantized",
    "we4m3-g16-e8m0-ceil": "naive-quantized",
    "we3m2": "naive-quantized",
    "wfp8+gptq": "naive-quantized",
    "we4m3-g32-e8m0": "mxfp8-quantized",
    "we2m3-g32-e8m0-even": "mxfp8-quantized",
    "wmxfp4": "mxfp4-pack-quantized",
    "we2m1-g32-e8m0-rceil+gptq": "mxfp4-pack-quantized",
    "wnvfp4": "nvfp4-pack-quantized",
    "wnvfp4+gptq": "nvfp4-pack-quantized",
}


QUICK = {
    *("wfp8", "we4m3-g16-e4m3", "we2m3-g32-e8m0-even", "we2m1-g32-e8m0-rceil+gptq", "wnvfp4"),
    *("fp8", "fp8-static", "we2m1-g32-e8m0-even/ae2m1-dynamic-g32-e8m0-even", "mxfp8", "nvfp4"),
    *("w4-g32/ae4m3-dynamic-token", "w8a8-dynamic-g16"),
}


def cases(schemes: Iterable[str]) -> list[Any]:
    """All of them; slow, but for a few."""
    return [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in schemes]


def written(source: Any, folder: Path, scheme: Any = None, **options: Any) -> Any:
    return compressed_tensors(source, folder / "out", scheme=scheme, **options)


def dequantized(folder: Path, dtype: Any) -> PreTrainedModel:
    """What transformers reads, and the library makes of the codes before it runs them."""
    with without_notices():
        engine = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        engine.hf_quantizer.compressor.decompress_model(engine)
    return engine.eval()


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def two_level(stored: dict[str, Tensor], path: str) -> Tensor:
    """NVFP4's numbers by the format's definition, from the file alone; bfloat16 at the end, as the
    library has them."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    packed = stored[f"{path}.weight_packed"].int()
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    values = torch.where(codes >= 8, -1.0, 1.0) * numbers[codes & 7]
    scales = stored[f"{path}.weight_scale"].float() / stored[f"{path}.weight_global_scale"]
    found = values.unflatten(-1, (-1, 16)) * scales[..., None]
    rounded: Tensor = found.flatten(-2).to(torch.bfloat16)
    return rounded


@ENGINE
@pytest.mark.parametrize("scheme", cases(FORMATS))
def test_weights_are_read_as_they_are(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    graph = fxquant.convert(model, scheme, calibration=batches(model), level="qdq")
    exported = written(graph, tmp_path)
    assert said(exported.path)["quantization_config"]["format"] == FORMATS[scheme]
    engine = dequantized(exported.path, torch.float32)
    stored = load_file(exported.path / "model.safetensors")
    sites = list(coded_sites(graph))
    assert len(sites) == 14
    for site in sites:
        found, own = engine.get_submodule(site.path).weight, site.codes().dequantize()
        if "nvfp4" in FORMATS[scheme]:
            assert torch.equal(found, two_level(stored, site.path))
            # 1/(1/g) is within two roundings of g.
            assert bool(((found.float() - own).abs() <= (2**-8 + 2**-21) * own.abs()).all())
            shared = site.codes().global_scale
            assert shared is not None
            assert float(stored[f"{site.path}.weight_global_scale"] * shared) == pytest.approx(1)
            held = site.codes().tensors()["weight_scale"].float()
            assert torch.equal(stored[f"{site.path}.weight_scale"].float(), held)
        else:
            assert torch.equal(found.float(), own)
    checked = exported.checked
    assert checked.under_rules <= 1e-6 * checked.largest
    assert ("rounded to bfloat16" in checked.cause) is ("nvfp4" in scheme)
    if "nvfp4" not in scheme:
        assert checked.difference == checked.under_rules


@ENGINE
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("scheme", ["wfp8", "we4m3-g32-e8m0", "wmxfp4"])
def test_what_config_says_runs(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In bfloat16 where the library makes weights that no other linear takes."""
    model = tiny_llama(dtype=dtype)
    graph = fxquant.convert(model, scheme)
    folder = written(graph, tmp_path, check=False).path
    named = "bfloat16" if "mx" in scheme or "e8m0" in scheme else str(dtype).removeprefix("torch.")
    assert said(folder)["dtype"] == named
    with without_notices():
        engine = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert str(engine.dtype) == f"torch.{named}"
    own = model.float()
    for site in coded_sites(graph):
        own.get_submodule(site.path).weight.data = site.codes().dequantize()
    own.save_pretrained(tmp_path / "own")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=engine.dtype).eval()
    ids = torch.randint(3, 96, (2, 21))
    with torch.no_grad():
        found, expected = engine(ids).logits, own(ids).logits
    if dtype == torch.float16 and named == "float16":  # scales of fp8 are rounded to it too
        assert bool(found.isfinite().all())
    else:
        assert torch.equal(found, expected)


EXACT = (
    *("fp8", "fp8-static", "we4m3/ae4m3-dynamic", "we4m3-tensor/ae4m3-static:p99.9"),
    *("w4-g32/ae4m3-dynamic-token", "w8/ae4m3-dynamic-g32", "we4m3/ae2m1-dynamic-token"),
    *("we4m3-g16/ae2m1-dynamic-g16", "we2m1-g32-e8m0-even/ae2m1-dynamic-g32-e8m0-even"),
    *("wmxfp4/ae4m3-dynamic-token", "we2m3-g32-e8m0/ae4m3-dynamic"),
)
POWER = "rounded to one bit of mantissa there, and follows the rule"
RULED = {
    "mxfp8": f"{POWER} floor here, of which rceil is the nearest",
    "mxfp8-ceil": f"{POWER} ceil here",
    "mxfp4": f"{POWER} floor here, of which even is the nearest",
    "wnvfp4/ae2m1-dynamic-g32-e8m0-rceil": f"{POWER} rceil here",
    "wmxfp4/amxfp8": f"{POWER} floor here",
    "nvfp4": "global scale is fixed there, by calibration, and each call's own here",
    "nvfp4+gptq": "weights under two scales are rounded to bfloat16 there",
    "we4m3/a8-dynamic-token": "absmax/127.5 there",
    "w8a8-dynamic-g16": "absmax/127.5 there",
}


@ENGINE
@pytest.mark.parametrize("scheme", cases(EXACT))
def test_inputs_of_the_same_rule_are_exact(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    found = written(model, tmp_path, scheme, calibration=batches(model)).checked
    assert found.difference <= 1e-6 * found.largest


@ENGINE
@pytest.mark.parametrize("scheme", cases(RULED))
def test_other_inputs_follow_the_rules_of_the_engine(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    level = "integer" if scheme in ("nvfp4", "mxfp4") else "qdq"
    graph = fxquant.convert(model, scheme, calibration=batches(model), level=level)
    found = written(graph, tmp_path, calibration=batches(model)).checked
    assert found.under_rules <= 1e-6 * found.largest
    assert RULED[scheme] in found.cause


@ENGINE
def test_the_nearest_rule_of_mxfp8(tmp_path: Path) -> None:
    """It differs where a group's largest is just 1.75 powers of two, which random ones are not."""
    found = written(tiny_llama(), tmp_path, "mxfp8-rceil").checked
    assert found.difference <= 1e-6 * found.largest


@ENGINE
@pytest.mark.parametrize("scheme", cases(["fp8", "mxfp4", "nvfp4", "wnvfp4"]))
def test_biases_and_inputs_without_a_batch(scheme: str, tmp_path: Path) -> None:
    model = small_opt()[0]
    found = written(model, tmp_path, scheme, calibration=batches(model)).checked
    assert found.under_rules <= 1e-6 * found.largest
    assert ("an input [tokens, K] has one scale there" in found.cause) is (scheme == "fp8")


@ENGINE
@pytest.mark.parametrize("scheme", ["wmxfp4", "we2m1-g32-e8m0-even/ae2m1-dynamic-g32-e8m0-even"])
def test_the_runtime_measures_the_graphs_loss(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    graph = fxquant.convert(model, scheme, level="qdq")
    folder = written(graph, tmp_path, check=False).path
    ids = torch.randint(3, 96, (2, 21))
    found = RUNTIMES["transformers"].open(folder)(ids)
    with torch.no_grad():
        own = token_nll(graph(input_ids=ids), ids)
    assert torch.allclose(found, own, rtol=0, atol=2e-6 * float(own.abs().max()))


MIXED = {
    "scheme": "fp8",
    "overrides": {
        "*.layers.0.*": "w8a8-dynamic-token",
        "*.layers.1.*.k_proj": "w4-g32",
        "*.down_proj": "we2m1-g32-e8m0",
        "*.o_proj": "we2m1-g16-e4m3",
        "*.q_proj": "fp",
        "head": "we4m3-g32-e8m0",
    },
}


@ENGINE
def test_sites_of_all_forms_stand_in_one_checkpoint(tmp_path: Path) -> None:
    found = written(tiny_llama(), tmp_path, MIXED)
    assert found.checked.under_rules <= 1e-6 * found.checked.largest
    config = said(found.path)["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {
        *("float-quantized", "int-quantized", "pack-quantized", "mxfp8-quantized"),
        *("mxfp4-pack-quantized", "nvfp4-pack-quantized"),
    }
    assert sorted(config["ignore"]) == [
        f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)
    ]


@ENGINE
@pytest.mark.parametrize("scheme", cases(["nvfp4", "mxfp4", "we4m3/ae4m3-static:absmax"]))
def test_a_saved_graph_is_written_alike(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    data = batches(model)
    direct = written(model, tmp_path, scheme, calibration=iter(data), check=False)
    level = "qdq" if scheme == "nvfp4" else "integer"  # whose inputs are the data's too
    graph = fxquant.convert(model, scheme, calibration=data, level=level)
    fxquant.save(graph, tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    again = compressed_tensors(loaded, tmp_path / "again", calibration=data)
    first, second = (load_file(e.path / "model.safetensors") for e in (direct, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n].float(), second[n].float()) for n in first)
    assert said(direct.path) == said(again.path)


def first_input(model: PreTrainedModel, data: list[Tensor]) -> float:
    """The largest magnitude that reaches the first site: nothing before it is quantized."""
    seen: list[float] = []
    site = model.get_submodule("model.layers.0.self_attn.q_proj")
    hook = site.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    with torch.no_grad():
        for ids in data:
            model(ids)
    hook.remove()
    return max(seen)


def test_the_global_scale_of_an_input_is_that_of_the_data(tmp_path: Path) -> None:
    model = tiny_llama()
    data = [torch.randint(3, 96, (2, 16)) for _ in range(3)]
    graph = fxquant.convert(model, "nvfp4")
    exported = written(graph, tmp_path, calibration=data, check=False)
    stored = load_file(exported.path / "model.safetensors")
    names = [name for name in stored if name.endswith("input_global_scale")]
    assert len(names) == 14
    heads = [stored[f"model.layers.0.self_attn.{n}_proj.input_global_scale"] for n in "qkv"]
    assert float(heads[0]) == pytest.approx(448 * 6 / first_input(model, data), rel=1e-5)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])
    record = json.loads((exported.path / RECORD).read_text())
    (read,) = record["calibration"]
    assert read["readings"] == [{"name": "input_global_scale", "batches": 3}]
    assert fxquant.inspect(graph)  # the source stays as it was
    again = compressed_tensors(graph, tmp_path / "b", calibration=data[:1], check=False)
    assert json.loads((again.path / RECORD).read_text())["calibration"][0]["tokens"] == 32


def test_global_scales_that_vllm_would_make_one_are_told(tmp_path: Path) -> None:
    model = tiny_llama()
    exported = written(fxquant.convert(model, "wnvfp4"), tmp_path, check=False)
    stored = load_file(exported.path / "model.safetensors")
    times = []
    for layer in range(2):
        for names in (("q", "k", "v"), ("gate", "up")):
            block = "self_attn" if "q" in names else "mlp"
            paths = [f"model.layers.{layer}.{block}.{name}_proj" for name in names]
            divisors = [float(stored[f"{path}.weight_global_scale"]) for path in paths]
            times += [max(divisors) / each for each in divisors if each < max(divisors)]
    told = f"{len(times)} linears of this model would come out too small there, by up to "
    assert f"{told}{max(times):.3g} times" in exported.note
    assert exported.note in str(exported)
    assert json.loads((exported.path / RECORD).read_text())["note"] == exported.note
    with torch.no_grad():  # one largest weight for all
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[0, 0] = 8.0
    assert compressed_tensors(model, tmp_path / "b", scheme="wnvfp4", check=False).note == ""


def test_without_data_such_an_input_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    for source, scheme in ((model, "nvfp4"), (fxquant.convert(model, "nvfp4"), None)):
        with pytest.raises(ExportError) as refused:
            written(source, tmp_path, scheme)
        message = str(refused.value)
        assert "model.layers.0.self_attn.q_proj" in message
        assert "fixed there, on calibration data, and none are given" in message
        assert message.endswith("nearest that it can: we2m1-g16-e4m3")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_reads_data_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["export", "--to", "compressed-tensors", "--model", str(SMALL_OPT), "--no-check"]
    short = ["--length", "48", "--scheme", "nvfp4"]
    none = [*asked, *short, "--calibration-windows", "0", "--output", f"{tmp_path}/none"]
    assert main(none) == 2
    assert "(fxquant export and evaluate of the float model read some;" in capsys.readouterr().err
    some = [*asked, *short, "--calibration-windows", "2", "--output", f"{tmp_path}/out"]
    assert main(some) == 0
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["calibration"][0]["origin"]["source"] == "builtin"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith("fc1.input_global_scale") for name in stored)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


REFUSED = {
    "we5m2": ("codes of e5m2 have no form there", "we4m3"),
    "we5m2-g16-e8m0": ("codes of e5m2", "we4m3-g16-e8m0"),
    "wnf4-g32": ("codes of nf4", "w4-g32"),
    "we2m1": ("in groups of 16 under e4m3 scales there", "we2m1-g32-e8m0"),
    "we2m1-g16": ("in groups of 16", "we2m1-g16-e4m3"),
    "we2m1-g64-e8m0-rceil": ("or of 32 under powers of two", "we2m1-g32-e8m0-rceil"),
    "we2m1-g32-e4m3": ("in groups of 16", "we2m1-g16-e4m3"),
    "we4m3-g24": ("groups of 24 do not divide its 64 columns", "we4m3-g16"),
    "we4m3/ae5m2-dynamic-token": ("not of e5m2", "we4m3/ae4m3-dynamic-token"),
    "we4m3/ae5m2-static": ("not of e5m2", "we4m3/ae4m3-static"),
    "mxfp6": ("not of e2m3", "we2m3-g32-e8m0/ae4m3-dynamic-g32-e8m0"),
    "we4m3/ae4m3-dynamic-g16-e8m0": ("groups of 32 of an input", "we4m3/ae4m3-dynamic-g16"),
    "we4m3/ae4m3-dynamic-g24": ("groups of 24", "we4m3/ae4m3-dynamic-g16"),
    "we4m3/ae4m3-dynamic-g128": ("groups of 128", "we4m3/ae4m3-dynamic-g64"),
    "we4m3/ae4m3-dynamic-g16-e4m3": ("those of e2m1 in groups of 16", "we4m3/ae4m3-dynamic-g16"),
    "w8/a8-dynamic-g32-e8m0": ("the scales of floats there", "w8a8-dynamic-g32"),
    "fp8+kv8(format=fp8)": ("storage of a cache", "without +kv8"),
}


@pytest.mark.parametrize("scheme", REFUSED)
def test_refused_before_work(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ExportError) as refused:
        written(model, tmp_path, scheme, calibration=Untouched(batches(model)))
    for part in REFUSED[scheme]:
        assert part in str(refused.value)
    assert str(refused.value).endswith(REFUSED[scheme][1])
    assert list(tmp_path.iterdir()) == []


ELEMENTS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "nf4", "3", "4", "8")
GROUPS = ("", "-g7", "-g16", "-g24", "-g32", "-g100")
SCALES = ("", "-fp16", "-e8m0", "-e8m0-rceil", "-e4m3")


def texts() -> Iterator[str]:
    for element in ELEMENTS:
        for size in GROUPS:
            for scale in SCALES if size else ("",):
                yield f"{element}{size}{scale}"


def random_specs(seed: int, count: int) -> Iterator[SiteSpec]:
    draw, weights = random.Random(seed), list(texts())
    inputs = [f"a{text.replace('-g', '-dynamic-g', 1)}" for text in texts() if "-g" in text]
    inputs += [f"a{text}-dynamic-token" for text in ELEMENTS]
    while count:
        given = draw.choice(("", f"/{draw.choice(inputs)}"))
        try:
            yield Scheme.parse(f"w{draw.choice(weights)}{given}").spec
        except SchemeError:
            continue
        count -= 1


@pytest.mark.parametrize("length", [16, 24, 32, 48, 64, 100])
def test_every_hint_is_held(length: int) -> None:
    refused = 0
    for spec in random_specs(length, 150):
        for calibrated in (True, False):
            found = site_refusal(spec, length, calibrated)
            if found is not None:
                near = Scheme.parse(found.nearest).spec
                assert near != spec
                assert site_refusal(near, length, calibrated) is None, (spec, near)
                refused += 1
    assert refused > 100


@ENGINE
def test_all_powers_are_the_librarys() -> None:
    of_library = import_module("compressed_tensors.compressors.mx_utils")
    stored = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(of_library.decompress_mx_scale(stored).float(), POWERS[0].decode(stored))


def test_streamed_as_in_memory(tmp_path: Path) -> None:
    streamed = fxquant.load_model(SMALL_OPT, streamed=True).graph
    model = small_opt()[0]
    data = batches(model)
    whole, found = (
        compressed_tensors(source, tmp_path / name, scheme="nvfp4", calibration=data, check=False)
        for source, name in ((model, "whole"), (streamed, "streamed"))
    )
    first, second = (load_file(e.path / "model.safetensors") for e in (whole, found))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n].float(), second[n].float()) for n in first)
