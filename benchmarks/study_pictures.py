"""The pictures of docs/why_static_fails.md (matplotlib, the ``plots`` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from benchmarks.study_page import causes_of, collapse, effect

COLOURS = {"weights": "#4c72b0", "clipping": "#c44e52", "rounding": "#ccb974", "scale": "#64b5cd"}


def draw(data: dict[str, Any], folder: Path) -> None:
    """heatmap.png, causes.png, histogram.png, recovery.png."""
    folder.mkdir(parents=True, exist_ok=True)
    subjects = data["subjects"]
    for name, picture in (
        ("heatmap", _heatmap),
        ("causes", _causes),
        ("histogram", _histogram),
        ("recovery", _recovery),
    ):
        figure, axes = plt.subplots(1, len(subjects), figsize=(10, 4), layout="constrained")
        for axis, subject in zip(axes, subjects, strict=True):
            picture(axis, subject)
        # No date, no version: the same data give the same file.
        figure.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
        plt.close(figure)


def _heatmap(axis: Any, subject: dict[str, Any]) -> None:
    """Effect of each site under the worst static scheme: blocks down, sites of a block across."""
    scheme = collapse(subject)
    found = subject["schemes"][scheme]
    sites = found["sites"]
    blocks = subject["blocks"]
    order = {site["site"]: site for site in sites}
    names = list(dict.fromkeys(_inside(site) for site in sorted(sites, key=lambda s: s["site"])))
    values = [
        [
            effect(found, order[path]) if (path := f"{block}.{name}") in order else 0.0
            for name in names
        ]
        for block in blocks
    ]
    limit = max(abs(value) for row in values for value in row) or 1.0
    image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_xticks(range(len(names)), [n.split(".")[-1] for n in names], rotation=60, ha="right")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("block")
    axis.set_title(f"{subject['name']}: {found['ranking']}, nats\n{scheme}", fontsize=9)
    axis.figure.colorbar(image, ax=axis)


def _inside(site: dict[str, Any]) -> str:
    return str(site["site"]).removeprefix(f"{site['block']}.")


def _causes(axis: Any, subject: dict[str, Any]) -> None:
    schemes, causes = list(subject["schemes"]), causes_of([subject])
    for row, scheme in enumerate(schemes):
        # Negative values go to the left of 0, positive ones are stacked to the right.
        ends = [0.0, 0.0]
        for cause in causes:
            value = subject["schemes"][scheme]["causes"].get(cause, 0.0)
            side, label = int(value > 0), cause if row == 0 else None
            axis.barh(row, value, left=ends[side], color=COLOURS[cause], label=label)
            ends[side] += value
    axis.set_yticks(range(len(schemes)), schemes)
    axis.invert_yaxis()
    axis.set_xlabel("Δloss, nats a token")
    axis.set_title(f"{subject['name']}: causes", fontsize=9)
    axis.legend(fontsize=8)


def _histogram(axis: Any, subject: dict[str, Any]) -> None:
    found = subject["histogram"]
    axis.stairs(found["counts"], found["edges"], fill=True, color="#8c8c8c")
    axis.set_xscale("log")
    axis.set_yscale("log")
    colours = ("#55a868", "#c44e52", "#8172b3", "#4c72b0")
    for (name, limit), colour in zip(found["limits"].items(), colours, strict=True):
        axis.axvline(limit, color=colour, label=f"{name}: {limit:.3g}")
    axis.set_xlabel("|x|")
    axis.set_ylabel("elements")
    axis.set_title(f"{subject['name']}\ninput of {found['site']}", fontsize=9)
    axis.legend(fontsize=8)


def _recovery(axis: Any, subject: dict[str, Any]) -> None:
    for scheme, found in subject["schemes"].items():
        steps = found["recovery"]
        axis.plot(
            [step["fixed"] for step in steps],
            [step["delta_loss"] for step in steps],
            marker="o",
            markersize=3,
            label=scheme,
        )
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlabel("worst sites in float")
    axis.set_ylabel("Δloss, nats a token")
    axis.set_title(f"{subject['name']}: recovery", fontsize=9)
    axis.legend(fontsize=7)
