"""``inspect``: everything that fxquant knows about a graph, for reading."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from functools import cached_property
from typing import Any

from torch.fx import GraphModule

from fxquant.analysis.inspection.dot import dot, write_dot
from fxquant.analysis.inspection.history import History, diff
from fxquant.analysis.inspection.printer import HEAD, WIDTH, Section, lay_out
from fxquant.analysis.inspection.shapes import Value, propagate
from fxquant.analysis.inspection.site_view import site_view
from fxquant.analysis.inspection.suggest import unknown
from fxquant.analysis.inspection.summary import summarize
from fxquant.analysis.inspection.summary_text import render
from fxquant.errors import InspectionError
from fxquant.files.doors import Location, as_path
from fxquant.ir.graph import info
from fxquant.pipeline.arguments import checked_call

LEGEND = (
    "B batch, L length in tokens; scales, sizes, indexing stand in operands; fc1.y: y of site fc1"
)
_TIED = "\N{NO-BREAK SPACE}"


class Inspection:
    """Printouts of one graph of any level. ``print`` it for the summary.

    Deterministic: no addresses, the same text on every run (but for milliseconds). The graph is
    read, never changed; it must not change while its Inspection is in use.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._facts = info(gm)

    @cached_property
    def _history(self) -> History:
        return History(self._gm)

    @cached_property
    def _values(self) -> dict[str, Value]:
        return propagate(self._gm)

    def __str__(self) -> str:
        return self.summary()

    @checked_call()
    def summary(self, *, fold: bool = True, markdown: bool = False) -> str:
        """Header, history, sites, left in float, notes; ``fold=False`` lists every site."""
        return render(summarize(self._gm, fold=fold), markdown=markdown, folded=fold)

    @checked_call()
    def layer(self, index: int) -> str:
        """Decoder block ``index`` as a listing in the order of evaluation.

        Raises InspectionError for a block that there is not.
        """
        return self._listing(self._block(index))

    @checked_call()
    def graph(self) -> str:
        """The whole graph: before the blocks, each block, behind them."""
        return "\n\n".join(self._listing(section) for section in self._history.sections(-1))

    @checked_call()
    def diff(self, pass_name: str) -> str:
        """What a pass changed, as a unified diff of the listing; blocks alike are shown once.

        Raises InspectionError listing the passes that ran.
        """
        return diff(self._history, self._history.index(pass_name), self._values)

    @checked_call()
    def site(self, path: str) -> str:
        """One site: its nodes, provenance, scales, histograms.

        ``path`` may be the end of a path where it fits one site. Raises InspectionError listing
        the nearest sites.
        """
        sites = self._facts.sites
        fitting = [s for s in sites if s.path == path] or [
            s for s in sites if s.path.endswith(f".{path}")
        ]
        if len(fitting) != 1:
            paths = [site.path for site in fitting or sites]
            raise unknown("site" if not fitting else "single site", path, paths)
        return site_view(self._gm, fitting[0], self._history, self._values)

    @checked_call()
    def dot(self, index: int = 0) -> str:
        """Graphviz text of decoder block ``index``."""
        section = self._block(index)
        return dot(section, self._history.names(section, self._values), self._values)

    @checked_call()
    def write_dot(self, path: Location, index: int = 0) -> None:
        """Write ``dot(index)``, or an SVG where ``path`` ends in ``.svg`` (extra ``graph``)."""
        write_dot(self.dot(index), as_path(path, "path", InspectionError))

    @checked_call()
    def to_dict(self) -> dict[str, Any]:
        """The summary with every site and each pass's diff, as JSON has it: no NaN, no tuples."""
        data = asdict(summarize(self._gm, fold=False))
        for index, record in enumerate(data["history"]):
            del record["delta"]
            record["diff"] = diff(self._history, index, self._values)
        plain: dict[str, Any] = _plain(data)
        return plain

    def _block(self, index: int) -> Section:
        blocks = self._facts.blocks
        if not 0 <= index < len(blocks):
            last = len(blocks) - 1
            known = f"layers 0..{last}" if blocks else "no decoder blocks"
            raise InspectionError(f"no layer {index}: {self._facts.model} has {known}")
        return next(s for s in self._history.sections(-1) if s.path == blocks[index])

    def _listing(self, section: Section) -> str:
        facts = self._facts
        head = f"{section.title}, level {facts.level}, scheme {facts.scheme}"
        names = self._history.names(section, self._values)
        reads = []
        for name in names.outside(section):
            value = self._values[name]
            text = f"{names.full(self._history.nodes[name])} {value.dtype} {value.shape}"
            reads.append(text.replace(" ", _TIED))
        inputs = textwrap.wrap(f"reads {', '.join(reads)}", WIDTH) if reads else []
        inputs = [line.replace(_TIED, " ") for line in inputs]
        found = self._history.rows(section, self._values)
        return "\n".join([head, LEGEND, *inputs, *lay_out([HEAD, *found])])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


@checked_call()
def inspect(gm: GraphModule) -> Inspection:
    """The printouts of a graph that ``trace`` or ``convert`` made; TypeError for any other."""
    return Inspection(gm)
