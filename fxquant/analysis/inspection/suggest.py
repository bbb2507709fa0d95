"""The error for a name that is not known, with the nearest ones that are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fxquant.errors import InspectionError

_SHOWN = 12


def unknown(what: str, name: str, known: Sequence[str]) -> InspectionError:
    """``no pass 'integrize'; did you mean integerize? known: ...``."""
    if not known:
        return InspectionError(f"no {what} {name!r}: there is none in this graph")
    near = difflib.get_close_matches(name, known, 3, 0.5)
    if not near:
        ends = {each: each.rpartition(".")[2] for each in known}
        alike = difflib.get_close_matches(name.rpartition(".")[2], set(ends.values()), 1, 0.5)
        near = [each for each, end in ends.items() if end in alike][:3]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    more = f", ... ({len(known)} in all)" if len(known) > _SHOWN else ""
    return InspectionError(
        f"no {what} {name!r} in this graph; {hint}known: {', '.join(known[:_SHOWN])}{more}"
    )
