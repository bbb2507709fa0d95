"""What the figures of worst sites allow to say, and what not."""

from __future__ import annotations

from collections.abc import Iterator

from fxquant.analysis.results import Findings, GroupFigures, SiteFigures, is_ranked, rank_value

BLOCKS = "in_order:blocks"
NAMED = 4  # blocks, at most
SMALLEST = 0.00005  # nats a token, what is printed as a change


def ranked_sites(found: Findings) -> list[SiteFigures]:
    """The sites that have the figure by which sites are ranked, worst first."""
    return [each for each in found.worst if is_ranked(each, found.ranking)]


def closed_blocks(found: Findings) -> list[GroupFigures]:
    """Blocks that were measured as a whole, but not site by site; most added first."""
    closed = [each for each in found.blocks if BLOCKS in each.measured and not each.sums]
    closed = [each for each in closed if found.ranking == "in_order"]
    return sorted(closed, key=lambda each: -each.measured[BLOCKS])


def settled(found: Findings) -> int:
    """How many of the worst sites add at least as much as every closed block does as a whole."""
    closed = closed_blocks(found)
    sites = ranked_sites(found)
    if not closed:
        return len(sites)
    most = closed[0].measured[BLOCKS]
    return sum(rank_value(site, found.ranking) >= most for site in sites)


def rank_words(found: Findings, wanted: int) -> str:
    """What is known of the rank of the ``wanted`` worst sites; empty where all were measured."""
    closed = closed_blocks(found)
    if not closed:
        return ""
    count = min(settled(found), wanted)
    first = closed[0]
    hidden = (
        "the sites of a block that was not opened may still add more than the block, where others "
        "of it lower the loss"
    )
    if count == min(wanted, len(ranked_sites(found))):
        return (
            f"No block that was not opened adds as much as the worst {count} sites; the most is "
            f"{first.measured[BLOCKS]:+.4f}, {first.name}. But {hidden}: --methods in_order "
            "measures every site."
        )
    more = [each.name for each in closed if _exceeds(found, each, wanted)]
    rest = f" and {len(more) - NAMED} more" if len(more) > NAMED else ""
    return (
        f"Of the worst {wanted} sites {count} are certain: {', '.join(more[:NAMED])}{rest} add "
        f"more as a whole than the last of them, and were not opened. And {hidden}: "
        "--methods in_order measures every site."
    )


def _exceeds(found: Findings, block: GroupFigures, wanted: int) -> bool:
    last = ranked_sites(found)[:wanted][-1]
    return block.measured[BLOCKS] > rank_value(last, found.ranking)


def opposed(found: Findings) -> Iterator[tuple[SiteFigures, float]]:
    """Of the worst sites those that alone in float would change the loss the other way than they
    do where they are ranked, with what that recovers."""
    if found.ranking not in ("in_order", "alone"):
        return
    known = {c.site: c.recovered for c in found.counterfactuals if c.choice == "float"}
    for site in ranked_sites(found):
        effect, recovered = rank_value(site, found.ranking), known.get(site.site)
        if recovered is None or min(abs(effect), abs(recovered)) < SMALLEST:
            continue
        if (effect > 0) != (recovered > 0):
            yield site, recovered


def opposed_words(found: Findings) -> list[str]:
    """A sentence for each of these."""
    where = {"in_order": "to those before it", "alone": "alone"}.get(found.ranking, "")
    said = []
    for site, recovered in opposed(found):
        effect = rank_value(site, found.ranking)
        if effect > 0:
            said.append(
                f"{site.site} adds {effect:+.4f} {where}, and yet the loss gets worse by "
                f"{-recovered:.4f} when it alone is left in float: errors of other sites, mostly "
                "behind it, make up for its own and are left without it. It is to be repaired "
                "together with them, not by itself."
            )
        else:
            said.append(
                f"{site.site} adds {effect:+.4f} {where}, that is, its error makes up for that of "
                f"others there; with every site quantized, leaving it in float recovers "
                f"{recovered:.4f}."
            )
    return said
