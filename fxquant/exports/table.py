"""Every format that a graph can be exported to, by the name that ``--to`` spells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fxquant.exports import (
    aoti_file,
    awq_file,
    compressed_file,
    gguf_file,
    gptq_file,
    onnx_file,
    pt2_file,
)
from fxquant.exports.folder import Exported
from fxquant.exports.target import Target


@dataclass(frozen=True)
class Format:
    """What a format holds, and the function that writes it."""

    target: Target
    export: Callable[..., Exported]


FORMATS = {
    format_.target.name: format_
    for format_ in (
        Format(compressed_file.TARGET, compressed_file.compressed_tensors),
        Format(onnx_file.TARGET, onnx_file.onnx),
        Format(gguf_file.TARGET, gguf_file.gguf),
        Format(gptq_file.TARGET, gptq_file.gptq),
        Format(awq_file.TARGET, awq_file.awq),
        Format(pt2_file.TARGET, pt2_file.pt2),
        Format(aoti_file.TARGET, aoti_file.aoti),
    )
}
