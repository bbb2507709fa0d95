"""The models that the tests run on."""

from pathlib import Path
from typing import Final

import torch
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

SMALL_OPT: Final = Path(__file__).parent / "small_opt" / "model"


def small_opt() -> tuple[OPTForCausalLM, PreTrainedTokenizerFast]:
    """The trained one-million-parameter OPT of `tests/small_opt`, float32, in eval mode.

    Its weights are stored as float16, so every float32 value here is exact in float16 too.
    """
    model = OPTForCausalLM.from_pretrained(SMALL_OPT, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(SMALL_OPT)
