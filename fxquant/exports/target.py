"""A format that a graph can be exported to: what it holds, and the refusal of what it does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.fx import GraphModule
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import ExportError
from fxquant.exports.sites import recorded_specs
from fxquant.formats.scales import FP32
from fxquant.ir.graph import Level, Site, info
from fxquant.ir.streamed import streamed_device
from fxquant.pipeline.pipeline import AfterPass, Pass
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import Granularity, SiteSpec, TensorSpec
from fxquant.schemes.spelling import spell_site


@dataclass(frozen=True)
class Refusal:
    """Why a format cannot hold something, and the nearest that it can, in words of a scheme."""

    reason: str
    nearest: str


@dataclass(frozen=True)
class Target:
    """A format.

    Attributes:
        name: as ``--to`` spells it.
        level: of the graph that it is written from.
        needs_codes: whether a graph in float is refused.
        check_site: why it cannot hold what a spec does at a site of this graph, None if it can.
        check_graph: raises ExportError for what else stands in the graph and cannot be held.
        never: passes whose work it can never hold, each with the reason.
        check_specs: raises ExportError for specs that it cannot hold beside each other.
        packages: that write it, by the names that they are imported under.
        streams: whether a streamed graph can be written.
        ready: raises ExportError where something else is missing that writes it.
        check_kinds: the first linear that is to be coded and is of a kind that it cannot hold, with
            the reason; asked before what is to be done there.
        check_repairs: why it cannot hold what a repair of a scheme does to this float graph.
        check_tokenizer: raises ExportError for a tokenizer that it cannot hold beside a model or
            graph, which may be in float still.
        fixes: whether it fixes what a spec chooses on each call, on data that the scheme itself
            does not read.
        with_data: the same where calibration data are given, which then holds that too.
    """

    name: str
    level: Level
    needs_codes: bool
    check_site: Callable[[GraphModule, Site, SiteSpec], Refusal | None]
    check_graph: Callable[[GraphModule], None]
    never: dict[str, str]
    check_specs: Callable[[Sequence[tuple[Site, SiteSpec]]], None] | None = None
    packages: tuple[str, ...] = ()
    streams: bool = True
    ready: Callable[[], None] | None = None
    check_kinds: Callable[[GraphModule, Sequence[Site]], tuple[str, Refusal] | None] | None = None
    check_repairs: Callable[[GraphModule, Scheme], tuple[str, Refusal] | None] | None = None
    check_tokenizer: Callable[[Tokenizer, PreTrainedModel | GraphModule], None] | None = None
    fixes: Callable[[SiteSpec], bool] | None = None
    with_data: Target | None = None

    def reads_calibration(self, scheme: Scheme) -> bool:
        """Whether an export of a model under ``scheme`` reads data itself."""
        return self.fixes is not None and any(map(self.fixes, scheme.specs))

    def given(self, data: object) -> Target:
        """The target where ``data``, None for none, are there to calibrate on."""
        return self if data is None else self.with_data or self


def check_possible(target: Target, streamed: bool = False) -> None:
    """Raise ExportError where nothing can be written, whatever the scheme: a package or a compiler
    is missing, or weights are ``streamed`` and it needs them in memory."""
    absent = [name for name in target.packages if importlib.util.find_spec(name) is None]
    if absent:
        raise ExportError(
            f"{target.name} needs {' and '.join(absent)} to be installed: pip install "
            "'fxquant[exports]'"
        )
    if target.ready is not None:
        target.ready()
    if streamed and not target.streams:
        raise ExportError(
            f"{target.name}: a streamed graph cannot be exported: load it without stream"
        )


def check_scheme(target: Target, gm: GraphModule, scheme: Scheme) -> None:
    """Raise ExportError for the first site at which ``scheme`` asks for what cannot be held.

    ``gm``: the model's float graph with its sites named; nothing has been converted yet.
    """
    check_possible(target, streamed_device(gm) is not None)
    specs = [(site, scheme.spec_for(site.path, site.role)) for site in info(gm).sites]
    _check_specs(target, gm, specs, str(scheme))
    for name, _ in scheme.repairs:
        _check_pass(target, name, str(scheme))
    found = None if target.check_repairs is None else target.check_repairs(gm, scheme)
    if found is not None:
        raise _refused(target, *found)


def check_converted(target: Target, gm: GraphModule) -> None:
    """Raise ExportError for what stands in a converted graph and cannot be held."""
    check_possible(target, streamed_device(gm) is not None)
    facts = info(gm)
    if facts.level not in (Level.QDQ, Level.INTEGER) and (
        target.needs_codes or facts.level != Level.FLOAT
    ):
        raise ExportError(
            f"{target.name}: the graph is at level {facts.level}, and nothing in it is quantized: "
            "convert it under a scheme such as w8"
        )
    records = recorded_specs(gm)
    specs = [(site, records.get(site.path, SiteSpec())) for site in facts.sites]
    _check_specs(target, gm, specs, facts.scheme)
    for record in facts.history:
        _check_pass(target, record.name, facts.scheme)
    target.check_graph(gm)


def refusing(target: Target, scheme: Scheme) -> AfterPass:
    """A callback of the pipeline that raises ExportError as soon as a pass has made what cannot be
    held: sites before any work, the rest behind the pass that makes it."""

    def after(step: Pass, gm: GraphModule) -> None:
        if step.name == "name_sites":
            check_scheme(target, gm, scheme)
        _check_pass(target, step.name, str(scheme))

    return after


def nearest_group(weight: TensorSpec, length: int) -> Refusal | None:
    """Why groups of ``weight`` do not fit rows of ``length``, with a size that does."""
    size = weight.group_size
    if size is None or length <= size or length % size == 0:
        return None
    near = regrouped(weight, length, "channel")
    return Refusal(
        f"groups of {size} do not divide its {length} columns", spell_site(SiteSpec(near))
    )


def regrouped(spec: TensorSpec, length: int, whole: Granularity) -> TensorSpec:
    """``spec``, which has groups, in the largest up to its own that divide rows of ``length``; one
    scale for each ``whole`` where only single columns do."""
    assert spec.group_size is not None
    most = min(length, spec.group_size)
    size = max(each for each in range(1, most + 1) if length % each == 0)
    if size == 1:  # a scale an element: no codes
        return replace(spec, granularity=whole, group_size=None, scale=FP32)
    return replace(spec, group_size=size)


def _check_specs(
    target: Target, gm: GraphModule, specs: Sequence[tuple[Site, SiteSpec]], scheme: str
) -> None:
    coded = [(site, spec) for site, spec in specs if spec.weight is not None]
    linears = [site for site, _ in coded if site.role in ("linear", "head")]
    wrong = target.check_kinds(gm, linears) if target.check_kinds and linears else None
    if wrong is not None:
        raise _refused(target, *wrong)
    for site, spec in coded:
        found = target.check_site(gm, site, spec)
        if found is not None:
            raise _refused(target, f"{site.path} ({spell_site(spec)})", found)
    if target.check_specs is not None:
        target.check_specs(specs)
    if not coded and target.needs_codes:
        raise ExportError(
            f"{target.name}: scheme {scheme} quantizes no weight of a linear, so there is nothing "
            "that the format is for: take a scheme such as w8, or save_pretrained for the float "
            "model"
        )


def _check_pass(target: Target, name: str, scheme: str) -> None:
    if name in target.never:
        nearest = f"the scheme without +{name}"
        raise _refused(target, f"scheme {scheme}", Refusal(target.never[name], nearest))


def _refused(target: Target, where: str, refusal: Refusal) -> ExportError:
    return ExportError(
        f"{target.name} cannot hold {where}: {refusal.reason}; nearest that it can: "
        f"{refusal.nearest}"
    )
