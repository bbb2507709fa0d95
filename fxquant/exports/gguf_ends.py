"""The tokens at which a model stops, beside the eos of its tokenizer."""

from __future__ import annotations

from typing import Any, Final

from transformers import GenerationConfig

from fxquant.errors import ExportError

# What llama.cpp stops at by its text, whatever a file says.
_BY_TEXT: Final = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<|endoftext|>"),
        *("</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>"),
    )
)
_KEYS: Final = ("end of turn", "end of message")


def other_ends(
    tokens: tuple[str, ...], eos: int, config: dict[str, Any], generation: GenerationConfig | None
) -> tuple[int, ...]:
    """Ids at which the model stops besides ``eos``, and llama.cpp would not; ``tokens``: by id.

    Raises ExportError for more than the format has places for.
    """
    own = getattr(generation, "eos_token_id", None)
    found = config.get("eos_token_id") if own is None else own
    given = [found] if isinstance(found, int) else list(found or ())
    ends = [end for end in dict.fromkeys(given) if end != eos and 0 <= end < len(tokens)]
    more = tuple(end for end in ends if tokens[end] not in _BY_TEXT)
    if len(more) > len(_KEYS):
        raise ExportError(
            f"gguf cannot hold the ends {given} (eos_token_id of the generation config, or of the "
            f"model's): besides the tokenizer's own ({eos}) it has {' and '.join(_KEYS)}: leave "
            "some out (from Python generation_config=), or take another format (--to onnx)"
        )
    return more
