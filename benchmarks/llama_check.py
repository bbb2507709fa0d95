"""GGUF files in llama.cpp itself: its codes, its products, its logits, its loss, its tokens.

    make llama-check

or, with the binding on the path, python -m benchmarks.llama_check [--windows 2] [--length 512]:
the real model under each scheme that GGUF holds. ``tried`` holds a file to what has no tolerance
but rounding: every block read by llama.cpp's own reader is the graph's weight bit for bit, and a
float32 file's logits are the graph's. A row says how far products are from their rule's, from the
input that the engine itself read, and how far that rule moves the model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import fxquant
from benchmarks.llama_engine import Engine, dequantized, engine_version
from benchmarks.llama_products import product
from benchmarks.llama_texts import TEXTS, lines, random_texts
from benchmarks.machine import processor
from benchmarks.memory import MODEL
from fxquant.evaluation.models import versions
from fxquant.exports import gguf
from fxquant.exports.gguf_file import MODEL as FILE
from fxquant.exports.half_scales import weight_specs
from fxquant.exports.sites import codes_at
from fxquant.run.loss import token_nll

SCHEMES: Final = ("fp", "w8-g32-fp16", "w4-g32-fp16", "w4-g32-fp16-asym")
TOLERANCE: Final = 1e-5  # of the largest: float32 sums of some hundred terms, in another order
_PRODUCTS_ON: Final = 32  # tokens of the first window


@dataclass(frozen=True)
class Tried:
    """A file in llama.cpp beside the graph that it was written from.

    Attributes:
        kinds: how many tensors there are of each kind of block.
        product: the largest difference of a product from its rule's, over its largest number.
        logits, largest: the largest difference of a logit from the graph's, and largest logit.
        losses: mean nats a token, the graph's and the engine's.
        same: at how many of ``tokens`` places both find the same token most likely.
    """

    scheme: str
    kinds: dict[str, int]
    product: float
    logits: float
    largest: float
    losses: tuple[float, float]
    same: int
    tokens: int


def tried(
    model: PreTrainedModel, scheme: str, windows: Tensor, tokenizer: Tokenizer | None = None
) -> Tried:
    """``windows``: token ids int64 [C, T]. Raises RuntimeError where blocks are not the graph's
    weights, or logits of a float32 file are not the graph's."""
    graph = fxquant.trace(model) if scheme == "fp" else fxquant.convert(model, scheme)
    source, asked = (model, "fp") if scheme == "fp" else (graph, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export" / FILE
        gguf(source, path.parent, scheme=asked, tokenizer=tokenizer, check=False)
        stored = tensors(path)
        check_blocks(model, graph, stored)
        with Engine.of(path, windows.shape[1]) as engine:
            furthest = check_products(engine, stored, windows[0, :_PRODUCTS_ON])
            found = _beside(graph, engine, windows)
    kinds = dict(Counter(each.kind for each in stored.values()))
    row = Tried(scheme, kinds, furthest, **found)
    if set(kinds) == {"F32"} and row.logits > TOLERANCE * row.largest:
        raise RuntimeError(f"a float file's logits are {row.logits:.3g} from the graph's")
    return row


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: floats [N, K], or blocks uint8 [N, bytes] of K ``columns``."""

    kind: str
    columns: int
    data: Tensor


def tensors(path: Path) -> dict[str, Stored]:
    """What stands in a file, by llama.cpp's names."""
    from gguf import GGUFReader

    return {
        each.name: Stored(
            each.tensor_type.name, int(each.shape[0]), torch.from_numpy(each.data.copy())
        )
        for each in GGUFReader(path).tensors
    }


def check_blocks(model: PreTrainedModel, graph: GraphModule, stored: dict[str, Stored]) -> None:
    """Raise RuntimeError unless llama.cpp reads the graph's weights, bit for bit."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    turns = config.model_type in ("llama", "mistral")  # rows by pairs, by halves here
    names = get_tensor_name_map(MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for path, spec in weight_specs(graph).items():
        held = stored[f"{names.get_name(path)}.weight"]
        theirs = dequantized(held.kind, held.data, held.columns)
        own = path.rpartition(".")[2]
        if turns and own in heads:
            theirs = theirs.unflatten(0, (heads[own], -1, 2)).transpose(1, 2).flatten(0, 2)
        if not torch.equal(theirs, codes_at(graph, path, spec, held.columns).dequantize()):
            raise RuntimeError(f"{path}: llama.cpp reads other numbers of its blocks")


def check_products(engine: Engine, stored: dict[str, Stored], ids: Tensor) -> float:
    """The largest difference of a product from its rule's, over the largest number of it.

    Raises RuntimeError for a matrix of the file that no product took.
    """
    furthest = 0.0
    used: set[str] = set()
    for each in engine.products(ids):
        held = stored[each.weight]
        ruled = product(each.x, held.kind, held.data)
        apart = float((each.output - ruled).abs().max() / ruled.abs().max())
        furthest, used = max(furthest, apart), used | {each.weight}
    rows = {name for name, held in stored.items() if held.data.dim() > 1}
    unused = rows - used - {"token_embd.weight"}  # whose rows are taken, and nothing multiplied
    if unused:
        raise RuntimeError(f"no product took {', '.join(sorted(unused))}")
    return furthest


def _beside(graph: GraphModule, engine: Engine, windows: Tensor) -> dict[str, Any]:
    apart, largest, same = 0.0, 0.0, 0
    losses = torch.zeros(2, dtype=torch.float64)
    for ids in tqdm(windows, disable=None):
        ours = graph(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])[0]
        theirs = engine.logits(ids)
        apart = max(apart, float((theirs - ours).abs().max()))
        largest = max(largest, float(ours.abs().max()))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        for number, logits in enumerate((ours, theirs)):
            losses[number] += token_nll(logits[None], ids[None]).mean() / len(windows)
    return {
        "logits": apart,
        "largest": largest,
        "losses": (float(losses[0]), float(losses[1])),
        "same": same,
        "tokens": windows.numel(),
    }


def same_tokens(tokenizer: Tokenizer, engine: Engine, texts: list[str]) -> list[str]:
    """The texts to which llama.cpp gives other ids than ``tokenizer``."""
    return [text for text in texts if tokenizer(text)["input_ids"] != engine.token_ids(text)]


def table(rows: list[Tried]) -> str:
    return tabulate(
        [
            (
                row.scheme,
                ", ".join(f"{count} {kind}" for kind, count in row.kinds.items()),
                f"{row.product:.1e}",
                f"{row.logits:.2g} of {row.largest:.3g}",
                f"{row.losses[0]:.4f}",
                f"{row.losses[1] - row.losses[0]:+.4f}",
                f"{100 * row.same / row.tokens:.1f}%",
            )
            for row in rows
        ],
        headers=(
            *("scheme", "tensors", "a product off its rule", "a logit off the graph's"),
            *("graph's loss", "llama.cpp's", "same next token"),
        ),
        tablefmt="github",
        disable_numparse=True,
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    loaded = fxquant.load_model(MODEL)
    windows = fxquant.windows(
        "builtin", loaded.tokenizer, count=options.windows, length=options.length
    ).evaluation
    rows = [tried(loaded.model, scheme, windows, loaded.tokenizer) for scheme in SCHEMES]
    print(table(rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export" / FILE
        gguf(loaded.model, path.parent, scheme="fp", tokenizer=loaded.tokenizer, check=False)
        with Engine.of(path) as engine:
            for name, texts in (("lines", lines()), ("odd", TEXTS), ("random", random_texts())):
                others = same_tokens(loaded.tokenizer, engine, list(texts))
                print(f"{name}: the same ids for {len(texts) - len(others)} of {len(texts)} texts")
                for text in others[:8]:
                    print(f"  other ids: {text!r}")
    print(
        f"{MODEL}, {options.windows} x {options.length} tokens; {engine_version()}, "
        f"{', '.join(f'{name} {number}' for name, number in versions().items())}; {processor()}"
    )


if __name__ == "__main__":
    main()
