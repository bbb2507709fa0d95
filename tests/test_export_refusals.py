"""Refusals of exports: before any work, and with a nearest scheme that is one and is held."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch._inductor import cpp_builder, exc
from torch.fx import GraphModule

import fxquant
from fxquant.cli.main import main
from fxquant.errors import ExportError
from fxquant.exports.folder import write_export
from fxquant.exports.table import FORMATS
from fxquant.exports.target import check_converted, check_scheme
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import SiteSpec
from tests.architectures import ARCHITECTURES, gpt2
from tests.models import SMALL_OPT
from tests.more_architectures import MORE
from tests.test_export_compressed import Untouched, batches, tiny_llama

SCHEMES = (
    *("w8", "w4-g7", "w4-g7-asym", "w4-g65", "w8a8-static", "w8/a4-dynamic", "w4-g24/a4-dynamic"),
    *("w4-g32/a8-dynamic-token", "w4-g32-asym/a8-static", "w8a8-dynamic-g16", "w3-asym/a6-dynamic"),
    *("fp8", "wfp8", "mxfp4", "wmxfp4", "nvfp4", "wnvfp4", "w4-g16-e4m3", "w4-g16-e8m0", "wnf4"),
    *("w8+kv8", "w8+kv4", "w8a8-dynamic+attn8", "w8+rotate", "w8+rotate(online=false)"),
    *("w8+correct_bias", "w8a8-static+split_outliers", "w8+kv8+correct_bias"),
    '{"scheme": "w8", "overrides": {"embeddings": "w4-g7"}}',
    '{"scheme": "w8", "overrides": {"embeddings": "w4-g16-e4m3"}}',
    '{"scheme": "w4-g32", "overrides": {"*.k_proj": "w8"}}',
    '{"scheme": "w4-g32", "overrides": {"*.q_proj": "fp", "head": "w4-g32"}}',
)


@cache
def named(which: str) -> GraphModule:
    model = tiny_llama() if which == "llama" else gpt2()
    return fxquant.convert(model, "fp", level="float")


def refused(target: str, which: str, scheme: Scheme) -> str:
    try:
        check_scheme(FORMATS[target].target, named(which), scheme)
    except ExportError as error:
        return str(error)
    return ""


def place(said: str) -> str:
    """The site of a refusal, or the scheme that holds one repair too many."""
    return said.partition("cannot hold ")[2].partition(": ")[0].partition(" (")[0]


def advised(said: str, scheme: Scheme) -> Iterator[Scheme]:
    """What the hint at the end of a refusal names, as whole schemes."""
    hint = said.rpartition("nearest that it can: ")[2]
    if hint == "the scheme with +rotate(online=false)":
        yield Scheme.parse(str(scheme).replace("+rotate", "+rotate(online=false)"))
    elif hint.startswith("the scheme without +"):
        gone = re.findall(r"\+(\w+)", hint)
        text = str(scheme)
        for name in gone:
            text = re.sub(rf"\+{name}(\([^)]*\))?", "", text)
        yield Scheme.parse(text)
    elif hint == "fp there":
        left = (place(said), SiteSpec())
        yield replace(scheme, overrides=(*scheme.overrides, left))
    elif "(--to " in hint:
        assert hint.rpartition("(--to ")[2].rstrip(")") in FORMATS
    else:
        yield Scheme.parse(hint)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("text", SCHEMES)
def test_every_hint_is_a_scheme_that_is_held(target: str, text: str) -> None:
    for which in ("llama", "gpt2"):
        scheme = Scheme.parse(text)
        said = refused(target, which, scheme)
        if not said:
            continue
        assert "nearest that it can: " in said or "nothing that the format is for" in said
        for nearest in advised(said, scheme):
            again = refused(target, which, nearest)
            # What has several faults is refused for the next one then.
            assert not again or place(again) != place(said)


@pytest.mark.skipif(not find_spec("onnxscript"), reason="the exports extra")
@pytest.mark.parametrize("text", ["fp8", "fp8-static", "mxfp4", "nvfp4", "we4m3/a8-dynamic-token"])
def test_onnx_hints_keep_inputs_in_codes(text: str) -> None:
    (nearest,) = advised(refused("onnx", "llama", Scheme.parse(text)), Scheme.parse(text))
    assert nearest.spec.activation is not None


EARLY = ("w8+rotate", "w8a8-static+correct_bias")
WORDS = [name for name in ("gguf", "gptq", "awq") if name != "gguf" or find_spec(name)]
REPAIRS = ("rotate", "gptq+correct_bias")


NEVER = {
    "w4-g32+kv8": ("compressed-tensors", "onnx", *WORDS),
    "w8+kv4": ("compressed-tensors", "onnx"),
    "w8a8-dynamic+attn8": ("compressed-tensors",),
    "w8a8-static+split_outliers(threshold=2)": ("compressed-tensors",),
}


@pytest.mark.parametrize("text", NEVER)
def test_a_saved_graphs_hint_is_a_scheme_that_is_held(text: str, tmp_path: Path) -> None:
    model, scheme = tiny_llama(), Scheme.parse(text)
    graph = fxquant.convert(model, scheme, calibration=batches(model), level="qdq")
    fxquant.save(graph, tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    for target in NEVER[text]:
        if not all(find_spec(name) for name in FORMATS[target].target.packages):
            continue
        with pytest.raises(ExportError, match="cannot hold scheme") as found:
            check_converted(FORMATS[target].target, loaded)
        assert place(str(found.value)) == f"scheme {text}"
        (nearest,) = advised(str(found.value), scheme)
        assert refused(target, "llama", nearest) == ""


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        *[("compressed-tensors", repair) for repair in EARLY],
        *[(target, f"w4-g32+{repair}") for target in WORDS for repair in REPAIRS],
    ],
)
def test_repairs_that_modules_cannot_hold_are_refused_before_work(
    target: str, scheme: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    with pytest.raises(ExportError, match=r"cannot hold.* the scheme with"):
        FORMATS[target].export(
            model, tmp_path / "out", scheme=scheme, calibration=Untouched(batches(model))
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "awq"])
def test_a_linear_of_another_class_is_refused_before_work(target: str, tmp_path: Path) -> None:
    """By its class first: another format of modules, which words advise, has none of it either."""
    model = MORE["falcon-multi-query"]()
    data = Untouched(batches(model))
    with pytest.raises(ExportError, match="has a FalconLinear there") as found:
        FORMATS[target].export(model, tmp_path / "out", scheme="w4-g16+gptq", calibration=data)
    assert "nearest that it can: ONNX (--to onnx)" in str(found.value)


@pytest.mark.parametrize("options", ["", "(online=false)"])
@pytest.mark.parametrize("name", ["phi", "opt-no-bias"])
def test_layer_norms_without_their_means_are_in_no_module(
    name: str, options: str, tmp_path: Path
) -> None:
    """Phi's head has a bias, so that no tensor of a rotated graph is one too many."""
    model, scheme = ARCHITECTURES[name](), f"w4-g32+rotate{options}"
    data = Untouched(batches(model))
    with pytest.raises(ExportError, match=r"LayerNorms.*the scheme without \+rotate$"):
        FORMATS["gptq"].export(model, tmp_path / "out", scheme=f"{scheme}+gptq", calibration=data)
    rotated = fxquant.convert(model, "w4-g32+rotate(online=false)", level="qdq")
    for target in ("compressed-tensors", "gptq"):
        with pytest.raises(ExportError, match=r"RMSNorm there.*the scheme without \+rotate$"):
            FORMATS[target].export(rotated, tmp_path / "out", check=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("onnx", ["--stream"], "without stream"),
        ("pt2", ["--stream"], "without stream"),
        ("aoti", ["--stream"], "without stream"),
        ("onnx", [], "pip install 'fxquant[exports]'"),
        ("gguf", [], "gguf needs gguf to be installed: pip install 'fxquant[exports]'"),
        ("aoti", [], "aoti needs a C++ compiler"),
    ],
)
def test_what_no_scheme_mends_is_refused_before_the_model_is_read(
    target: str,
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the model was read")

    def no_compiler() -> str:
        raise exc.InvalidCxxCompiler

    if not options:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    monkeypatch.setattr("fxquant.evaluation.job.load_model", forbidden)
    asked = ["export", "--to", target, "--model", str(SMALL_OPT), "--scheme", "w8", *options]
    assert main([*asked, "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *(["--text", "builtin2"], ["--dataset", "builtin"], ["--length", "48"], ["--seed", "1"]),
        *(["--calibration-windows", "2"], ["--windows", "3"], ["--allow-overlap"]),
        *(["--dtype", "float16"], ["--cache", "x"]),
    ],
)
def test_a_saved_graph_takes_no_option_of_a_conversion(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fxquant.save(fxquant.convert(tiny_llama(), "w8"), tmp_path / "saved")
    asked = ["export", "--to", "compressed-tensors", "--model", str(tmp_path / "saved"), *option]
    assert main([*asked, "--output", str(tmp_path / "out")]) == 2
    assert f"leave out {option[0]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_engines_own_error_is_no_error_of_writing(tmp_path: Path) -> None:
    def check(folder: Path) -> Any:
        raise OSError("the engine lost its library")

    gm = fxquant.convert(tiny_llama(), "w8")
    with pytest.raises(OSError, match=r"^the engine lost its library$"):
        write_export(gm, tmp_path / "out", "onnx", lambda folder: None, check, ())
    assert list(tmp_path.iterdir()) == []
