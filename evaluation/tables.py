"""The table of an evaluation, and the sentences that its numbers say."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tabulate import tabulate

from fxquant.evaluation.results import Row, float_words, overlap_words
from fxquant.evaluation.statistics import Difference
from fxquant.schemes.scheme import Scheme, brief

HEADERS = ("scheme", "loss", "ppl", "Δloss ± s.e.", "bits/weight", "clipped", "seconds")

LEGEND = (
    "bits/weight: stored bits of the blocks' weights (codes, scales, zero points, what stays in "
    "float; no biases) over their number. clipped: share of the quantized activation elements of "
    "the evaluated text whose code was clipped: they lay beyond the range by more than half a step."
)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text, in GitHub's form."""
    body = [
        (
            _scheme(row),
            f"{row.loss:.4f}",
            f"{row.perplexity:.2f}" if row.perplexity < 1e6 else f"{row.perplexity:.2e}",
            _delta(row, reference=rows[0]),
            "-" if row.engine else f"{row.bits_per_weight:.2f}",
            "-" if row.share_clipped is None else f"{row.share_clipped:.4%}",
            f"{row.convert_seconds + row.evaluate_seconds:.1f}",
        )
        for row in rows
    ]
    align = ("left", *("right",) * (len(HEADERS) - 1))
    return tabulate(body, HEADERS, tablefmt="github", disable_numparse=True, colalign=align)


def _scheme(row: Row) -> str:
    said = (f"in {row.engine}" if row.engine else "", overlap_words(row), float_words(row))
    return " ".join((brief(row.scheme), *(f"[{words}]" for words in said if words)))


def _delta(row: Row, reference: Row) -> str:
    """The float model's own difference is zero by definition and has no error."""
    if math.isnan(row.delta_loss):
        return "-"  # a saved graph, which has no float model beside it
    if row is reference:
        return "0"
    return str(Difference(row.delta_loss, row.delta_error))


def _cost(row: Row) -> str:
    return f"{brief(row.scheme)} {row.delta_loss:+.4f}"


def sentences(rows: Sequence[Row]) -> list[str]:
    """What a reader needs to know, said from the numbers: nothing where rows are missing."""
    kinds: dict[str, list[Row]] = {"weight": [], "dynamic": [], "static": [], "repaired": []}
    for row in rows[1:]:
        if row.engine:
            continue
        activation = Scheme.parse(row.scheme).spec.activation
        if Scheme.parse(row.scheme).repairs:
            kinds["repaired"].append(row)
        elif activation is not None:
            kinds["dynamic" if activation.dynamic else "static"].append(row)
        elif Scheme.parse(row.scheme).spec.weight is not None:
            kinds["weight"].append(row)
    said = [_weights(rows[0], kinds["weight"]), _dynamic(kinds["dynamic"])]
    said += [_static(rows[0], kinds["static"]), _clipping(kinds["static"]), _repaired(kinds)]
    said += [_deployed(rows)]
    return [sentence for sentence in said if sentence]


def _weights(reference: Row, rows: list[Row]) -> str:
    if not rows:
        return ""
    worst = max(rows, key=lambda row: abs(row.delta_loss))
    share = abs(worst.delta_loss) / reference.loss
    unclear = [brief(row.scheme) for row in rows if within_noise(row)]
    doubt = f" Within two standard errors of zero: {', '.join(unclear)}." if unclear else ""
    return (
        f"Weights alone: {', '.join(map(_cost, rows))} nats a token against a float loss of "
        f"{reference.loss:.4f}; the largest change is {share:.2%} of it.{doubt}"
    )


def within_noise(row: Row) -> bool:
    """Whether Δloss cannot be told from zero: less than two standard errors."""
    return row.delta_error is not None and abs(row.delta_loss) < 2 * row.delta_error


def _dynamic(rows: list[Row]) -> str:
    if not rows:
        return ""
    ordered = sorted(rows, key=lambda row: row.delta_loss)
    text = f"Activations with dynamic ranges: {', '.join(map(_cost, ordered))}"
    best, worst = ordered[0], ordered[-1]
    if len(ordered) > 1 and best.delta_loss > 0:
        text += f", {worst.delta_loss / best.delta_loss:.0f} times as much as {brief(best.scheme)}"
    return f"{text}."


def _static(reference: Row, rows: list[Row]) -> str:
    if not rows:
        return ""
    worst = max(rows, key=lambda row: row.delta_loss)
    factor = math.exp(min(worst.loss - reference.loss, 700))
    return (
        f"Static ranges: {', '.join(map(_cost, rows))}; {brief(worst.scheme)} multiplies "
        f"perplexity by {factor:.3g}."
    )


def _repaired(kinds: dict[str, list[Row]]) -> str:
    if not kinds["repaired"]:
        return ""
    text = f"Repaired: {', '.join(map(_cost, kinds['repaired']))}"
    against = [
        f"{_cost(min(kinds[kind], key=lambda row: row.delta_loss))}, the best {kind} one"
        for kind in ("static", "dynamic")
        if kinds[kind]
    ]
    return f"{text}; without repairs: {'; '.join(against)}." if against else f"{text}."


def _deployed(rows: Sequence[Row]) -> str:
    """Each engine's loss less the graph's own, where both are there."""
    graphs = {row.scheme: row for row in rows if not row.engine}
    pairs = [(row, graphs[row.scheme]) for row in rows if row.engine and row.scheme in graphs]
    if not pairs:
        return ""
    apart = (f"{brief(row.scheme)} {row.loss - graph.loss:+.5f}" for row, graph in pairs)
    return f"{pairs[0][0].engine} less the graph itself, nats a token: {', '.join(apart)}."


def _clipping(rows: list[Row]) -> str:
    clipped = [row for row in rows if row.share_clipped is not None]
    if not clipped:
        return ""
    least = min(clipped, key=lambda row: row.share_clipped or 0)
    most = max(clipped, key=lambda row: row.share_clipped or 0)
    if most.share_clipped == least.share_clipped:
        return ""
    verdict = "more" if most.delta_loss > least.delta_loss else "less"
    return (
        f"{brief(most.scheme)} clips {most.share_clipped:.4%} of the activation elements, "
        f"{brief(least.scheme)} {least.share_clipped:.4%}; the former loses "
        f"{abs(most.delta_loss - least.delta_loss):.4f} nats {verdict}."
    )
