"""Convert one float graph under many schemes, and measure each on the same windows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.fx import GraphModule

from fxquant.errors import FxquantError
from fxquant.evaluation.overlap import overlap_of
from fxquant.evaluation.perplexity import evaluate
from fxquant.evaluation.results import Row
from fxquant.evaluation.statistics import Difference, WindowSums, paired_difference
from fxquant.evaluation.token_windows import Windows
from fxquant.ir.coverage import float_share
from fxquant.ir.graph import GraphInfo, info
from fxquant.ir.size import bits_per_weight
from fxquant.pipeline.recording import DrawnBatches
from fxquant.recipes import conversion
from fxquant.recipes.repairs import REPAIRS, can_resume
from fxquant.schemes.scheme import Scheme, brief


def measure(
    converter: Converter,
    scheme: Scheme,
    windows: Windows,
    batch_size: int,
    reference: WindowSums | None,
) -> Row:
    """Convert and evaluate one scheme; ``reference``: the float model's, None for itself."""
    started = time.perf_counter()
    try:
        converted = converter.convert(scheme)
    except FxquantError as error:
        error.add_note(f"while converting to {scheme}")
        raise
    convert_seconds = time.perf_counter() - started
    measured = evaluate(
        converted,
        windows.evaluation,
        batch_size=batch_size,
        label=brief(str(scheme)),
        scored=windows.scored,
    )
    sums = measured.sums
    if reference is None:
        change = Difference(math.nan if converter.as_it_is else 0.0, None)
    else:
        change = paired_difference(sums, reference)
    found, share = info(converted).calibration, float_share(converted)
    return Row(
        scheme=str(scheme),
        loss=measured.loss,
        perplexity=measured.perplexity,
        delta_loss=change.delta,
        delta_error=change.error,
        bits_per_weight=bits_per_weight(converted),
        share_clipped=measured.share_clipped,
        convert_seconds=convert_seconds,
        evaluate_seconds=measured.seconds,
        left_in_float=tuple(f"{e.path}: {e.reason}" for e in info(converted).left_in_float),
        window_nll=sums.nll,
        window_tokens=sums.tokens,
        calibration=None if found is None else tuple(record.brief() for record in found),
        overlap=overlap_of(found, windows),
        float_share=None if math.isnan(share) else share,
        level=str(info(converted).level),
    )


@dataclass
class Converter:
    """Converts one float graph to many schemes; calibrates once for all that observe alike.

    ``calibration``: None where there are no windows for it; ``cache``: a folder for finished
    blocks of the repairs that keep them; ``as_it_is``: a saved graph, which is its own scheme's;
    ``keeps_last``: whether the graph of the last scheme is held, which is asked for again;
    ``level``: that schemes are lowered to.
    """

    graph: GraphModule
    calibration: DrawnBatches | None
    cache: Path | None = None
    as_it_is: bool = False
    keeps_last: bool = False
    level: str = "integer"
    observed: dict[frozenset[str], GraphModule] = field(default_factory=dict)
    _last: tuple[Scheme, GraphModule] | None = None

    def check_overrides(self, schemes: Sequence[Scheme]) -> None:
        """Raise SchemeError for an override that matches no site of the model, before any row.

        Where a repair makes sites of its own, only its conversion can tell.
        """
        asked = [each for each in schemes if each.overrides and not _makes_sites(each)]
        if not asked or self.as_it_is:
            return
        named = conversion.convert(self.graph, Scheme(), level="float")
        for scheme in asked:
            scheme.check_overrides((site.path, site.role) for site in info(named).sites)

    def convert(self, scheme: Scheme) -> GraphModule:
        if self.as_it_is:
            return self.graph
        if self._last is not None and self._last[0] == scheme:
            return self._last[1]
        self._last = None
        found = self._convert(scheme)
        if self.keeps_last:
            self._last = scheme, found
        return found

    def _convert(self, scheme: Scheme) -> GraphModule:
        if not scheme.needs_calibration or scheme.repairs:
            return conversion.convert(
                self.graph,
                scheme,
                calibration=self.calibration,
                level=self.level,
                progress=True,
                cache=self.cache if can_resume(scheme) else None,
            )
        named = conversion.convert(self.graph, scheme, level="float")
        static = static_sites(info(named), scheme)
        if static not in self.observed:
            self.observed[static] = conversion.convert(
                self.graph,
                scheme,
                calibration=self.calibration,
                level="observed",
                progress=True,
            )
        last = conversion.recipe(scheme, start="observed", level=self.level)
        return last.run(self.observed[static])


def _makes_sites(scheme: Scheme) -> bool:
    """Whether a repair of the scheme does, such as attn8."""
    return any(REPAIRS[name].makes_sites for name, _ in scheme.repairs)


def static_sites(facts: GraphInfo, scheme: Scheme) -> frozenset[str]:
    """Paths of the sites whose input range is calibrated."""
    activations = (
        (site.path, scheme.spec_for(site.path, site.role).activation) for site in facts.sites
    )
    return frozenset(path for path, spec in activations if spec is not None and not spec.dynamic)
