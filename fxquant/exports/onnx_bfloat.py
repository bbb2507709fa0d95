"""Arithmetic of bfloat16 that a model computes in whatever its own dtype, as Falcon its ALiBi.

ONNX Runtime's processors hold and convert such numbers but do not compute with them. Torch computes
in float32 and rounds each result, which is written out here.
"""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir

_WIDE, _NARROW = ir.DataType.FLOAT, ir.DataType.BFLOAT16
_CONVERSIONS: Final = ("Cast", "CastLike", "Constant")


def computed_in_float32(model: Any) -> None:
    """Let each node of ``model`` that reads or gives bfloat16 read float32, and round what it
    gives."""
    for node in list(model.graph):
        if node.op_type in _CONVERSIONS:
            continue
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype == _NARROW:
                wide = _cast(value, _WIDE)
                model.graph.insert_before(node, wide)
                node.replace_input_with(place, wide.outputs[0])
        for value in node.outputs:
            if value.dtype == _NARROW:
                value.dtype = _WIDE
                narrow = _cast(value, _NARROW)
                model.graph.insert_after(node, narrow)
                for user, place in list(value.uses()):
                    if user is not narrow:
                        user.replace_input_with(place, narrow.outputs[0])


def _cast(value: Any, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype.value})
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    return node
