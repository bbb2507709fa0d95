"""Other tools' int8 linears on CUDA, in a copy of the same model: what benchmarks/cuda.py compares.

Each is installed by who wants it. What is missing is skipped by name, and so is what fails: their
versions go with a torch of their own.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], object]


class MissingPeer(Exception):
    """A library that is not installed."""


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPeer(f"not installed ({error})") from error


def torchao_int8(model: nn.Module) -> nn.Module:
    """torchao's int8 weights and dynamic activations, compiled."""
    torchao = _imported("torchao.quantization")
    changed = copy.deepcopy(model)
    torchao.quantize_(changed, torchao.Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(changed)
    assert isinstance(compiled, nn.Module)
    return compiled


def bitsandbytes_int8(model: nn.Module) -> nn.Module:
    """bitsandbytes' LLM.int8() (columns over 6 stay float) in the decoder's linears."""
    library = _imported("bitsandbytes")
    changed = copy.deepcopy(model)
    for path, module in list(changed.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in path:
            device = module.weight.device
            ours = library.nn.Linear8bitLt(
                *(module.in_features, module.out_features),
                bias=module.bias is not None,
                has_fp16_weights=False,
                threshold=6.0,
            )
            ours.load_state_dict(module.state_dict())
            changed.set_submodule(path, ours.to(device))
    return changed


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8 dynamic, compiled": torchao_int8,
    "bitsandbytes LLM.int8()": bitsandbytes_int8,
}


def prepared(name: str, model: nn.Module, ids: Tensor) -> tuple[Forward, float]:
    """The peer's forward, and seconds until its first result (compilation counts).

    Raises MissingPeer with the reason, whatever went wrong in it.
    """
    started = time.perf_counter()
    try:
        changed = PEERS[name](model)
        changed(input_ids=ids, use_cache=False)
        if ids.is_cuda:
            torch.cuda.synchronize()
    except MissingPeer:
        raise
    except Exception as error:  # not ours, and no reason to lose the other figures
        text = " ".join(str(error).split())[:200]
        raise MissingPeer(f"fails here: {type(error).__name__}: {text}") from error
    seconds = time.perf_counter() - started
    return (lambda batch: changed(input_ids=batch, use_cache=False)), seconds
