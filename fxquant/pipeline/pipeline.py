"""Pass and Pipeline: named rewrites with contracts that are checked on every result."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import FxquantError, GraphCallError, VerificationError
from fxquant.ir.graph import (
    Level,
    PassRecord,
    clone_sharing_storage,
    float_dtype,
    info,
    lowered_already,
    site_outputs,
    tag,
    update_info,
)
from fxquant.ir.legal_forms import verify
from fxquant.ir.snapshot import Snapshot
from fxquant.ir.streamed import check_present
from fxquant.pipeline.context import BARE, Context
from fxquant.pipeline.modes import without_modes
from fxquant.pipeline.options import check_options
from fxquant.pipeline.recording import recorded, remember
from fxquant.run.apart import apart
from fxquant.run.probe import Probe, probe_for, relative_difference, run_probe
from fxquant.schemes.spelling import spell_repair

Effect = Literal["exact", "equivalent", "lossy"]


class Pass(abc.ABC):
    """One rewrite: a frozen dataclass whose fields are its options and nothing else.

    Options are checked against their annotations when the pass is made (SchemeError); what all
    passes of a run are given stands in the Context.

    Class attributes: ``name``; ``requires``, the levels it accepts; ``ensures``, the level it
    leaves (None: as it was); ``effect`` on the function: "exact" (bit for bit), "equivalent" (to
    ``tolerance``, at every site's output unless ``keeps_site_outputs`` is False) or "lossy";
    ``only_names``: an exact pass that changes what is known of nodes and no node, which is checked
    node by node and needs no probe.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[Level, ...]]
    ensures: ClassVar[Level | None] = None
    effect: ClassVar[Effect]
    only_names: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self, self.name)

    @abc.abstractmethod
    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        """Change ``gm``, which the pipeline owns, and return it."""

    @property
    def sequence(self) -> tuple[Pass, ...]:
        """The passes that run in its place: itself, and those that it cannot do without."""
        return (self,)

    @property
    def keeps_site_outputs(self) -> bool:
        """Whether "equivalent" holds at every site; False: at the logits only.

        A pass that moves a scale through the rows of a linear changes what that linear puts out.
        """
        return True

    def tolerance(self, dtype: torch.dtype) -> float:
        """Largest difference of a site's output over its largest magnitude, if "equivalent".

        In fp32, K-term dot products summed in another order differ by about sqrt(K) eps of the
        largest term: 1e-4 holds K to 16384 with a factor of 6. In half precision the operands
        themselves are rounded to the dtype's eps.
        """
        return max(1e-4, 16 * torch.finfo(dtype).eps)

    def __str__(self) -> str:
        """The name with its options: ``smooth(alpha=0.5)``."""
        names = (each.name for each in fields(self))  # type: ignore[arg-type]
        return spell_repair(self.name, tuple((name, getattr(self, name)) for name in names))

    def __call__(self, gm: GraphModule, context: Context = BARE) -> GraphModule:
        """The pass alone on a copy of ``gm``, verified and recorded."""
        return Pipeline((self,), context).run(gm)


AfterPass = Callable[[Pass, GraphModule], None]


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run.

    ``context`` is what they work on; ``after_pass`` sees every result (to print it, say). ``run``
    works on a copy that shares the input's storage; nothing is written in place.
    """

    passes: tuple[Pass, ...]
    context: Context = BARE
    after_pass: AfterPass | None = None

    @property
    def sequence(self) -> tuple[Pass, ...]:
        """Every pass that runs, each with those that it cannot do without."""
        return tuple(step for each in self.passes for step in each.sequence)

    def run(self, gm: GraphModule) -> GraphModule:
        """The lowered graph; VerificationError names the pass that broke its promise."""
        return without_modes(self._run, gm)

    def _run(self, gm: GraphModule) -> GraphModule:
        info(gm)  # GraphError for what is no graph of ours
        check_present(gm)
        try:
            return self._run_passes(clone_sharing_storage(gm))
        except RuntimeError as error:
            # Asked of the graph as it came: codes say no more what their weight's dtype was.
            if isinstance(error, FxquantError) or (said := apart(gm, error)) is None:
                raise
            raise GraphCallError(said) from error

    def _run_passes(self, gm: GraphModule) -> GraphModule:
        snapshot = Snapshot.take(gm)
        for current in self.sequence:
            gm, snapshot = _run_checked(current, gm, self.context, snapshot)
            if self.after_pass is not None:
                gm.recompile()
                self.after_pass(current, gm)
        gm.recompile()
        return gm


def _run_checked(
    current: Pass, gm: GraphModule, context: Context, before: Snapshot
) -> tuple[GraphModule, Snapshot]:
    """The result of the pass, verified and recorded, and its snapshot."""
    found = info(gm).level
    if found not in current.requires:
        wanted = " or ".join(current.requires)
        already = lowered_already(info(gm)) if Level.FLOAT in current.requires else ""
        raise VerificationError(
            f"pass {current.name} needs level {wanted}, the graph is at {found}"
            + (f": {already}" if already else "")
        )
    started = time.perf_counter()
    probe = probe_for(gm)
    probed = current.effect != "lossy" and not current.only_names
    outputs = run_probe(gm, probe, {}) if probed else None
    reading, recording = recorded(context)
    gm = current.rewrite(gm, reading)
    remember(gm, recording, str(current))
    if current.ensures is not None:
        update_info(gm, level=current.ensures)
    verify(gm, current.name)
    _compile_when_called(gm)
    difference = None if outputs is None else _compare(current, gm, probe, *outputs)
    after = Snapshot.take(gm)
    if current.only_names:
        difference = _no_difference(current, before, after)
    record = _record(current, before, after, started, difference)
    update_info(gm, history=(*info(gm).history, record))
    return gm, after


def _compile_when_called(gm: GraphModule) -> None:
    """What ``recompile`` does, put off: passes seldom call a graph, they read its nodes."""

    def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
        self.recompile()
        return self.forward(*args, **kwargs)

    type(gm).forward = forward  # each graph has a class of its own


def _no_difference(current: Pass, before: Snapshot, after: Snapshot) -> float:
    """0, where every node computes what it computed before."""
    changed = after.changed_function(before)
    if changed is not None:
        raise VerificationError(
            f"after {current.name}: {changed} is not as it was, but the pass only names nodes"
        )
    return 0.0


def _record(
    current: Pass, before: Snapshot, after: Snapshot, started: float, difference: float | None
) -> PassRecord:
    delta, sites = after.since(before)
    old, new = before.nodes(), after.nodes()
    gone, came = old - new, new - old
    names = {node.name for node in gone}
    replaced = len({tag(node).replaces for node in came} & names)
    return PassRecord(
        current.name,
        added=len(came) - replaced,
        removed=len(gone) - replaced,
        sites=len(sites),
        milliseconds=1e3 * (time.perf_counter() - started),
        difference=difference,
        replaced=replaced,
        spelling=str(current),
        delta=delta,
    )


def _compare(
    current: Pass, gm: GraphModule, probe: Probe, logits: Tensor, outputs: dict[str, Tensor]
) -> float:
    exact = current.effect == "exact"
    if not current.keeps_site_outputs:
        outputs = {}
    new_logits, new_outputs = run_probe(gm, probe, {} if exact else outputs)
    differences = {
        site: relative_difference(probe.attended(outputs[site]), probe.attended(new_outputs[site]))
        for site, _ in ((s.path, n) for s, n in site_outputs(gm))
        if site in outputs
    }
    differences["logits"] = relative_difference(probe.attended(logits), probe.attended(new_logits))
    worst = max(differences, key=lambda place: differences[place])
    allowed = 0.0 if exact else current.tolerance(float_dtype(gm))
    if differences[worst] > allowed:
        why = ""
        if differences[worst] == float("inf"):
            why = (
                "; NaN or infinity is on one side only, or shape or dtype differ: where fp16 "
                "overflows, give the model in fp32 or bf16"
            )
        raise VerificationError(
            f"after {current.name}: {worst}: relative difference {differences[worst]:.3g} on the "
            f"probe batch, but the pass is {current.effect} (at most {allowed:.3g}){why}"
        )
    return differences[worst]
