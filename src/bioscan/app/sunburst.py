"""The sunburst of a taxonomy, as one HTML page that needs nothing else."""

import heapq
import html
from typing import Final

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.app.figures import CLASS_COLOURS, INK, REST
from bioscan.errors import require
from bioscan.vocabulary import RANKS

MAX_NODES: Final = 1500
_PALER: Final = (0.0, 0.25, 0.45, 0.6, 0.7)
"""Share of white in the colour of each ring outward."""
_NEARLY_ALL: Final = 0.9
_TRUNK: Final = "#8C8C8C"
RINGS: Final = 4
"""Rings shown at once; a click on a taxon goes further down."""

_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
  body {{ margin: 0; font-family: system-ui, sans-serif; color: {ink}; background: #fff; }}
  header {{ padding: 1rem 1.5rem 0; }}
  h1 {{ font-size: 1.25rem; margin: 0 0 .3rem; }}
  p {{ margin: 0; max-width: 115ch; font-size: .9rem; }}
  #chart {{ height: calc(100vh - 6.5rem); min-height: 24rem; }}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{note}</p>
</header>
<main id="chart">{chart}</main>
</body>
</html>
"""


def sunburst_html(taxonomy: Taxonomy, *, title: str, max_nodes: int = MAX_NODES) -> str:
    """A page with the taxonomy as rings, each taxon as wide as its specimens.

    Specimens without a name at the next rank leave a gap. The taxa with most specimens are shown; the others
    of each parent are one grey piece that says how many they are.

    Args:
        taxonomy: The tree, with counts.
        title: Heading of the page.
        max_nodes: Taxa drawn.
    """
    graph_objects = require("plotly.graph_objects", "report")
    shown = _largest(taxonomy, max_nodes)
    ids, labels, parents, values, colours, texts = [], [], [], [], [], []
    colour = _colours(taxonomy)
    everything = int(taxonomy.counts_N[0])
    others: dict[int, list[int]] = {}
    for node in range(taxonomy.num_nodes):
        parent = int(taxonomy.parent_N[node])
        if node in shown:
            count = int(taxonomy.counts_N[node])
            ids.append(str(node))
            labels.append(html.escape(taxonomy.name(node)) if node else f"{count:,}<br>specimens")
            parents.append(str(parent) if node else "")
            values.append(count)
            colours.append(colour[node])
            rank = RANKS[taxonomy.rank_N[node]] if node else "the whole dataset"
            texts.append(
                f"<b>{html.escape(taxonomy.name(node))}</b> {rank}<br>{_specimens(count, everything)}"
            )
        elif parent in shown:
            others.setdefault(parent, []).append(node)
    for parent, nodes in others.items():
        count = int(taxonomy.counts_N[nodes].sum())
        ids.append(f"{parent} other")
        labels.append(f"{len(nodes):,} other")
        parents.append(str(parent))
        values.append(count)
        colours.append(REST)
        taxa = "taxon" if len(nodes) == 1 else "taxa"
        texts.append(f"{len(nodes):,} {taxa} not drawn one by one<br>{_specimens(count, everything)}")
    figure = graph_objects.Figure(
        graph_objects.Sunburst(
            ids=ids,
            labels=labels,
            parents=parents,
            values=values,
            branchvalues="total",
            maxdepth=RINGS,
            marker={"colors": colours, "line": {"color": "#fff", "width": 0.6}},
            customdata=texts,
            hovertemplate="%{customdata}<extra></extra>",
            leaf={"opacity": 1},
            insidetextorientation="radial",
            sort=False,
        )
    )
    figure.update_layout(
        margin={"l": 4, "r": 4, "t": 4, "b": 12},
        font={"color": INK, "size": 13},
        template="none",
        uniformtext={"minsize": 9, "mode": "hide"},
    )
    chart = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="sunburst",
        default_height="100%",
        config={"modeBarButtons": [["toImage"]], "displaylogo": False, "responsive": True},
    )
    return _PAGE.format(
        title=html.escape(title), note=html.escape(_note(taxonomy, shown)), chart=chart, ink=INK
    )


def _largest(taxonomy: Taxonomy, max_nodes: int) -> set[int]:
    """The nodes with most records, each with its parent; the smaller number where records are equal."""
    shown: set[int] = set()
    waiting = [(-int(taxonomy.counts_N[0]), 0)]
    children = _children(taxonomy)
    while waiting and len(shown) <= max_nodes:
        _, node = heapq.heappop(waiting)
        shown.add(node)
        for child in children[node]:
            heapq.heappush(waiting, (-int(taxonomy.counts_N[child]), child))
    return shown


def _children(taxonomy: Taxonomy) -> list[list[int]]:
    below: list[list[int]] = [[] for _ in range(taxonomy.num_nodes)]
    for node, parent in enumerate(taxonomy.parent_N[1:].tolist(), start=1):
        below[parent].append(node)
    return below


def _colours(taxonomy: Taxonomy) -> list[str]:
    """The palette's colours in turn for the first taxa that differ; for those under them the same, paler.

    A taxon that has nearly all records stays grey, so that the colours go to its parts.
    """
    made = ["#FFFFFF"] * taxonomy.num_nodes
    depth = [-1] * taxonomy.num_nodes
    branch = [0] * taxonomy.num_nodes
    everything, branches = int(taxonomy.counts_N[0]), 0
    for node, parent in enumerate(taxonomy.parent_N[1:].tolist(), start=1):
        if depth[parent] >= 0:
            branch[node], depth[node] = branch[parent], depth[parent] + 1
        elif taxonomy.counts_N[node] > _NEARLY_ALL * everything:
            made[node] = _TRUNK
            continue
        else:
            branch[node], branches, depth[node] = branches, branches + 1, 0
        made[node] = _paler(CLASS_COLOURS[branch[node] % len(CLASS_COLOURS)], _PALER[min(depth[node], 4)])
    return made


def _paler(colour: str, share: float) -> str:
    parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * share):02X}" for part in parts)


def _specimens(count: int, everything: int) -> str:
    share = 100 * count / everything if everything else 0.0
    return f"{count:,} of {everything:,} specimens ({share:.3g} %)"


def _note(taxonomy: Taxonomy, shown: set[int]) -> str:
    drawn, taxa = len(shown) - 1, taxonomy.num_nodes - 1
    text = (
        f"{int(taxonomy.counts_N[0]):,} specimens, {taxa:,} taxa at ranks {', '.join(taxonomy.ranks)}. "
        "Click a taxon to go into it, the middle to go back. "
        "A gap in a ring: specimens without a name at a deeper rank."
    )
    if drawn < taxa:
        text += f" Drawn one by one are the {drawn:,} taxa with most specimens; grey pieces hold the others."
    return text
