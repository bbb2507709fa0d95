"""docs/exports.md: what vLLM makes of each form that is written for it.

    make vllm-check                                in an environment of its own
    python -m benchmarks.vllm_table [MODEL ...]    where vLLM is, all of MODELS unless said
    python -m benchmarks.vllm_table --render       the page from what was kept

Each model is exported under each scheme and opened in vLLM, which gives the log probabilities of
random tokens in short windows; the graph's own, at level integer, are compared with them. Writes
benchmarks/vllm.json and, between its marks, the page.

Where they differ by more than rounding, the graph is run by what vLLM may do instead (``others``),
and the nearest is named with what it leaves; in float16, by how much that moves the graph itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fxquant
from benchmarks.machine import processor
from benchmarks.memory import MODEL
from fxquant.errors import ExportError
from fxquant.evaluation.models import versions
from fxquant.exports.check import ALLOWED
from fxquant.exports.runtimes import RUNTIMES
from fxquant.exports.table import FORMATS
from fxquant.exports.vllm_engine import Vllm, dtype_of
from fxquant.files.whole_file import write_text
from fxquant.ir.graph import clone_sharing_storage
from fxquant.ir.operands import operands
from fxquant.run.loss import token_nll
from tests.architectures import build
from tests.models import small_opt

HERE: Final = Path(__file__).parent
KEPT: Final = HERE / "vllm.json"
PAGE: Final = HERE.parent / "docs" / "exports.md"
BEGIN, END = "<!-- vllm -->", "<!-- /vllm -->"
EXACT, CODES, RULE, HALF = "exact", "exact but for codes", "by rule", "float16"
REFUSED, OTHER = "refused", "other numbers"
WINDOWS, LENGTH = 48, 9
_WORDS: Final = 330
FEW: Final = 4  # times as far as the graph itself moves: of another rule it is more


def small_llama() -> PreTrainedModel:
    """Heads of 32 and rows that are multiples of 32, which vLLM's kernels ask for."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return build(LlamaForCausalLM, config)


MODELS: Final[dict[str, Callable[[], PreTrainedModel]]] = {
    "Llama": small_llama,
    "OPT": lambda: small_opt()[0],
    "SmolLM2": lambda: fxquant.load_model(MODEL).model,
}
MIXED: Final = '{"scheme": "w8a8-dynamic-token", "overrides": {"*.layers.1.*": "w8a8-static-asym"}}'
PACKED_MIXED: Final = '{"scheme": "w4-g32", "overrides": {"*down_proj": "w8a8-dynamic-token"}}'
APART: Final = '{"scheme": "w8a8-dynamic-token", "overrides": {"*.q_proj": "w8a8-static"}}'
CT, GPTQ, AWQ = "compressed-tensors", "gptq", "awq"
_ALL: Final = (
    *((CT, each) for each in (
        "w8", "w4", "w3", "w4-g32", "w4-g32-fp16", "w4-g32-asym", "w4-g32+gptq",
        "w8a8-static", "w8a8-static:absmax", "w8a8-static-asym", "w8a8-dynamic",
        "w8a8-dynamic-token", "w8a8-dynamic-token-asym", "w8-tensor/a8-dynamic-token",
        "w8-asym/a8-dynamic-token", "w4a8-dynamic-token", "w4-g32/a8-dynamic-token",
        "w4a8-dynamic-token-asym",
        "wfp8", "fp8", "fp8-static", "we4m3-tensor/ae4m3-static", "w4-g32/afp8", "wmxfp8", "mxfp8",
        "wmxfp4", "mxfp4", "wnvfp4", "nvfp4", MIXED, PACKED_MIXED, APART,
    )),
    *((GPTQ, each) for each in ("w4-g32", "w4-g32-fp16", "w4-g32-fp16-asym", "w8-g32-fp16")),
    *((AWQ, each) for each in ("w4-g32-fp16", "w4-g32-fp16-asym")),
)  # fmt: skip
_SOME: Final = (
    "w4-g32", "w8a8-dynamic-token", "w8a8-static", "w4-g32-asym", "w8a8-static-asym",
)  # fmt: skip
ROWS: Final = {
    "Llama": _ALL,
    "OPT": tuple((CT, each) for each in _SOME),
    "SmolLM2": ((CT, "w8a8-dynamic-token"),),
}


@dataclass(frozen=True)
class Cell:
    """What vLLM did with an export.

    Attributes:
        dtype: that it computed in.
        difference: of a log probability, the largest, in nats; ``mean`` of the mean loss.
        allowed: what sums in another order may come to: ALLOWED of the largest logit.
        equal: windows of WINDOWS in which nothing differs by more than that.
        rule: what it does instead, "" where nothing of ``others`` is nearer; ``left`` under that.
        moved: what float16 moves the graph itself by, where vLLM computes in that; else what level
            qdq does, whose sums are of floats.
        refused: its words.
    """

    dtype: str = ""
    difference: float = 0.0
    mean: float = 0.0
    allowed: float = 0.0
    equal: int = 0
    rule: str = ""
    left: float = 0.0
    moved: float = 0.0
    refused: str = ""

    @property
    def kind(self) -> str:
        if self.refused:
            return REFUSED
        if self.difference <= self.allowed:
            return EXACT
        if self.rule:
            return RULE
        near = self.difference <= FEW * self.moved
        if self.dtype == "float16":
            return HALF if near else OTHER
        return CODES if near or self.equal >= WINDOWS // 2 else OTHER


@cache
def subject(name: str) -> PreTrainedModel:
    return MODELS[name]()


def tokens(model: PreTrainedModel, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, shape, generator=generator)


def reaching(gm: GraphModule) -> GraphModule:
    """The graph with symmetric codes that reach -128."""
    found = clone_sharing_storage(gm)
    for node in found.graph.nodes:
        if node.target is torch.ops.fxquant.quantize.default:
            given = operands(node)
            if given.zero_point is None and given.qmin == -127:
                node.args = tuple(-128 if each == -127 else each for each in node.args)
    found.recompile()
    return found


def bfloat16_scales(gm: GraphModule) -> GraphModule:
    """The graph, changed, with scales of weights that are rounded."""
    for name, value in gm.named_buffers():
        if name.endswith("weight_scale"):
            value.data = value.data.to(torch.bfloat16).to(value.dtype)
    return gm


def others(model: PreTrainedModel, gm: GraphModule, scheme: str) -> Iterator[tuple[str, Any]]:
    """What vLLM may do instead, in words, and the graph that does it."""
    if "-static" in scheme:
        yield "symmetric codes of a static input reach -128 there, -127 here", reaching(gm)
    if "a8-dynamic-token" in scheme and not scheme.endswith("-asym") and "{" not in scheme:
        rule = "inputs have a zero point there, as under a8-dynamic-token-asym"
        asymmetric = fxquant.convert(model, f"{scheme}-asym", level="integer")
        yield rule, asymmetric
        yield f"{rule}, and groups' scales are bfloat16", bfloat16_scales(asymmetric)


@torch.no_grad()
def tried(engine: Vllm, name: str, target: str, scheme: str) -> Cell:
    model = subject(name)
    ids, calibration = tokens(model, 7, WINDOWS, LENGTH), [tokens(model, 5, 2, 16)]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "export"
        FORMATS[target].export(model, folder, scheme=scheme, calibration=calibration, check=False)
        dtype = dtype_of(folder)
        try:
            engine.open(folder)
            found = engine.losses(ids)
        except ExportError as error:
            return Cell(dtype, refused=str(error).replace(str(folder), "it"))
    gm = fxquant.convert(model, scheme, calibration=calibration, level="integer")
    logits = gm(input_ids=ids)
    expected = token_nll(logits, ids)
    cell = compared(dtype, found, expected, ALLOWED * float(logits.abs().max()))
    if cell.kind == EXACT:
        return cell
    if dtype == "float16":
        own = copy.deepcopy(gm).half()
    else:
        own = fxquant.convert(model, scheme, calibration=calibration, level="qdq")
    cell = replace(cell, moved=largest(token_nll(own(input_ids=ids), ids), expected))
    left = {
        rule: largest(found, token_nll(other(input_ids=ids), ids))
        for rule, other in others(model, gm, scheme)
    }
    rule = min(left, key=lambda each: left[each], default="")
    if rule and left[rule] < cell.difference / 2:
        return replace(cell, rule=rule, left=left[rule])
    return cell


def largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().nan_to_num(torch.inf).max())


def compared(dtype: str, found: Tensor, expected: Tensor, allowed: float) -> Cell:
    """Nats [windows, tokens] of vLLM and of the graph."""
    apart = (found - expected).abs().nan_to_num(torch.inf)
    equal = int((apart.amax(1) <= allowed).sum())
    mean = float((found - expected).mean())
    return Cell(dtype, largest(found, expected), mean, allowed, equal)


def measure(names: list[str]) -> None:
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"models": {}}
    engine = Vllm()
    made = {"engine": RUNTIMES["vllm"].engine(), "processor": processor(), "versions": versions()}
    for name in names:
        cells: list[Any] = []
        for target, scheme in tqdm(ROWS[name], name, disable=None):
            cells.append([target, scheme, asdict(tried(engine, name, target, scheme))])
            models = {**kept["models"], name: cells}
            kept = {**made, "models": {each: models[each] for each in ROWS if each in models}}
            write_text(KEPT, json.dumps(kept, indent=1) + "\n")


def said(cell: Cell) -> str:
    """The reason of a cell."""
    if cell.refused:
        return cell.refused.removeprefix("runtime vllm ").replace("\\n", " ")[:_WORDS]
    if cell.kind == CODES:
        return (
            f"{cell.equal} of {WINDOWS} windows are equal, and the mean is {cell.mean:+.1e} apart; "
            f"sums in another order (level qdq) move the graph itself by {cell.moved:.1e}"
        )
    if cell.kind == HALF:
        return f"float16 there, which moves the graph itself by {cell.moved:.1e}"
    if cell.kind == RULE:
        return f"{cell.rule}; under that {cell.left:.1e}"
    return "" if cell.kind == EXACT else f"level qdq moves the graph itself by {cell.moved:.1e}"


def table() -> str:
    """What stands between the marks."""
    data = json.loads(KEPT.read_text())
    reasons: dict[str, int] = {}
    body = []
    for name, cells in data["models"].items():
        for target, scheme, kept in cells:
            cell = Cell(**kept)
            why = said(cell)
            note = f" ({reasons.setdefault(why, len(reasons) + 1)})" if why else ""
            largest = "" if cell.refused else f"{cell.difference:.1e}"
            body.append([name, target, f"`{scheme}`", f"{cell.kind}{note}", largest])
    head = ("model", "format", "scheme", "in vLLM", "largest difference, nats")
    text = tabulate(body, head, "github", disable_numparse=True)
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    made = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return f"{data['engine']} on {data['processor']}; {made}\n\n{text}\n\n{notes}"


def rendered(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--render", action="store_true", help="the page alone")
    options = parser.parse_args()
    if unknown := set(options.models) - MODELS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(MODELS)}")
    if not options.render:
        measure(options.models)
    write_text(PAGE, rendered(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
