"""correct_bias: take the mean error that quantization leaves out of each linear's output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.ir.graph import (
    Level,
    Site,
    clone_sharing_storage,
    coded_linears,
    info,
    install,
    linear_parameters,
    site_outputs,
    update_info,
)
from fxquant.ir.legal_forms import erase_observers
from fxquant.ir.weights import with_parameters
from fxquant.numerics.observers import attended
from fxquant.passes.quantize import Quantize
from fxquant.pipeline.context import Context
from fxquant.pipeline.repair import Repair
from fxquant.run.sequential import SequentialRun
from fxquant.structure.outcome import Blocked, Changed, Outcome


@dataclass(frozen=True)
class CorrectBias(Repair):
    """Empirical bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix D).

    before:  y = fc1(x)
    after:   y = fc1(x)     bias - E[y^ - y], created where there is none

    y is the float model's output, y^ that of the quantized model on the input as it arrives there,
    with the biases before it already corrected; the mean is over attended calibration tokens, per
    output channel. Runs behind calibration, on the codes that the scheme and earlier repairs give.

    Cost: one run of the data through the float model and one through the quantized one, side by
    side from site to site; each batch keeps what is alive at the site.
    """

    name = "correct_bias"
    requires = (Level.FLOAT, Level.OBSERVED)
    effect = "lossy"
    after_calibration = True
    no_place = "quantizes no linear"

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        sites = [site for site, *_ in coded_linears(gm, context.scheme)]
        if not sites:
            return
        errors = self._mean_errors(gm, context, sites)
        for site in sites:
            error = errors[site.path]
            if not bool(error.any()):
                yield site.path, Blocked("its mean error is 0")
                continue
            module = gm.get_submodule(site.path)
            weight, bias = linear_parameters(module)
            corrected = -error if bias is None else bias.double() - error
            install(gm, site.path, with_parameters(module, bias=corrected.to(weight.dtype)))
            size = float(error.square().mean().sqrt())
            created = ", which is new" if bias is None else ""
            text = f"mean error {size:.3g} (rms over channels) moved into the bias{created}"
            yield site.path, Changed(text)
        biased = (
            replace(s, bias=s.bias or bool(errors[s.path].any())) if s.path in errors else s
            for s in info(gm).sites
        )
        update_info(gm, sites=tuple(biased))

    def _mean_errors(
        self, gm: GraphModule, context: Context, sites: list[Site]
    ) -> dict[str, Tensor]:
        """E[y^ - y] of each site: float64 [N]."""
        batches = list(context.batches or ())  # read by two runs
        reference = _Means(without_observers(gm), batches, self.name, context.progress)
        quantized = _Means(Quantize()(gm, context), batches, self.name, context.progress)
        errors: dict[str, Tensor] = {}
        previous: str | None = None
        for site in sites:
            before = None if previous is None else (previous, errors[previous])
            errors[site.path] = quantized.at(site.path, before) - reference.at(site.path)
            previous = site.path
        return errors


class _Means:
    """Mean output of one site after another, all batches stopped behind the last one."""

    def __init__(self, gm: GraphModule, batches: list[Any], label: str, progress: bool) -> None:
        self._outputs = {site.path: node for site, node in site_outputs(gm)}
        self._run = SequentialRun(gm, batches, label=label, progress=progress)

    def at(self, path: str, corrected: tuple[str, Tensor] | None = None) -> Tensor:
        """Mean over attended tokens of the output of ``path``: float64 [N].

        ``corrected``: the site asked for before, and what is taken from its output from there on.
        """
        node = self._outputs[path]
        total: list[Tensor] = []

        def on_value(current: Node, value: Any, mask: Tensor) -> Any:
            if corrected is not None and current is self._outputs[corrected[0]]:
                value = (value.double() - corrected[1]).to(value.dtype)
            if current is node:
                total.append(attended(value, mask).double().sum(0))
            return value

        self._run.advance(node.next, on_value)
        return torch.stack(total).sum(0) / self._run.tokens


def without_observers(gm: GraphModule) -> GraphModule:
    """A copy of an observed graph that can be run without being observed again."""
    plain = clone_sharing_storage(gm)
    erase_observers(plain)
    plain.recompile()
    return plain
