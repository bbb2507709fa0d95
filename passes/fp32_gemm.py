"""fp32_gemm: compute every linear of the decoder blocks in fp32 inside a half-precision model."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from fxquant.ir.graph import (
    Level,
    install,
    leave_in_float,
    linear_parameters,
    site_outputs,
    update_info,
)
from fxquant.ir.leaves import Fp32Linear
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass


@dataclass(frozen=True)
class Fp32Gemm(Pass):
    """The reference between the model's dtype and quantization: same weights, fp32 arithmetic.

    before:  y = call_module layers.0.fc1(x)        nn.Linear in fp16
    after:   y = call_module layers.0.fc1(x)        Fp32Linear, weight still stored in fp16
    """

    name = "fp32_gemm"
    requires = (Level.FLOAT,)
    effect = "equivalent"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        for site, _ in site_outputs(gm):
            if site.role != "linear":
                leave_in_float(gm, site.path, f"{site.role}: not a linear of the blocks")
                continue
            install(gm, site.path, Fp32Linear(*linear_parameters(gm.get_submodule(site.path))))
        update_info(gm, scheme="fp32-gemm")
        return gm
