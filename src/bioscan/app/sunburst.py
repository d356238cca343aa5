"""The sunburst of a taxonomy: one HTML page to go into with clicks, or arcs for a drawing in another page."""

import heapq
import html
import math
from dataclasses import dataclass
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
    ids, labels, parents, values, colours, texts = [], [], [], [], [], []
    colour = _colours(taxonomy)
    everything = int(taxonomy.counts_N[0])
    drawn = pieces(taxonomy, max_nodes)
    for piece in drawn:
        node, many = piece.node, _specimens(piece.count, everything)
        values.append(piece.count)
        if node is None:
            ids.append(f"{piece.parent} other")
            labels.append(f"{piece.taxa:,} other")
            parents.append(str(piece.parent))
            colours.append(REST)
            taxa = "taxon" if piece.taxa == 1 else "taxa"
            texts.append(f"{piece.taxa:,} {taxa} not drawn one by one<br>{many}")
            continue
        name = html.escape(taxonomy.name(node))
        ids.append(str(node))
        labels.append(name if node else f"{piece.count:,}<br>specimens")
        parents.append(str(piece.parent) if node else "")
        colours.append(colour[node])
        rank = RANKS[taxonomy.rank_N[node]] if node else "the whole dataset"
        texts.append(f"<b>{name}</b> {rank}<br>{many}")
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
        title=html.escape(title), note=html.escape(_note(taxonomy, drawn)), chart=chart, ink=INK
    )


@dataclass(frozen=True)
class Piece:
    """A taxon, or those parts of one that are not drawn one by one."""

    node: int | None
    """None: a rest."""
    parent: int
    """Node above; -1 for the root."""
    count: int
    """Specimens."""
    taxa: int = 1


def pieces(taxonomy: Taxonomy, max_nodes: int) -> list[Piece]:
    """The taxa with most specimens, in the order of the nodes; then, for each parent, the rest of its parts.

    Args:
        taxonomy: The tree, with counts.
        max_nodes: Taxa drawn one by one, the root apart.
    """
    shown = _largest(taxonomy, max_nodes)
    drawn = []
    others: dict[int, list[int]] = {}
    for node in range(taxonomy.num_nodes):
        parent = int(taxonomy.parent_N[node])
        if node in shown:
            drawn.append(Piece(node, parent, int(taxonomy.counts_N[node])))
        elif parent in shown:
            others.setdefault(parent, []).append(node)
    rests = [Piece(None, p, int(taxonomy.counts_N[nodes].sum()), len(nodes)) for p, nodes in others.items()]
    return drawn + rests


@dataclass(frozen=True)
class Arc:
    """Where a piece is drawn; lengths in units of the drawing, whose middle is 0, 0 and radius `RADIUS`."""

    piece: Piece
    path: str
    """SVG path of the outline."""
    label: str
    """As much of the name as there is room for; "" for none."""
    baseline: str
    """SVG path that the label runs along, its middle in the middle of the piece."""


RADIUS: Final = 320
_HOLE: Final = 46
"""Radius of the middle, which is no taxon."""
_LETTER: Final = 6.7
"""Mean width of a letter of the labels, 12 px; a little generous."""
_LINE: Final = 15


def arcs(taxonomy: Taxonomy, drawn: list[Piece]) -> list[Arc]:
    """The pieces as arcs, a ring for each rank, clockwise from the top; the root is left out.

    A taxon is as wide as its share of its parent's specimens. What lacks a name at a rank leaves its ring
    empty there: specimens at the end of their parent, taxa that skip the rank in their own place.
    """
    width = (RADIUS - _HOLE) / len(taxonomy.ranks)
    reached: dict[int, float] = {0: 0.0}  # up to where the parts of a taxon are drawn
    per_specimen = 2 * math.pi / max(1, int(taxonomy.counts_N[0]))
    made = []
    for piece in drawn:
        if piece.node == 0 or not piece.count:
            continue
        begin = reached[piece.parent]
        end = reached[piece.parent] = begin + piece.count * per_specimen
        if piece.node is not None:
            reached[piece.node] = begin
            ring = taxonomy.ranks.index(RANKS[taxonomy.rank_N[piece.node]])
            name = _short(taxonomy.name(piece.node), taxonomy.name(piece.parent))
        else:
            ring, name = _ring_below(taxonomy, piece.parent), f"{piece.taxa:,} other"
        inner = _HOLE + ring * width
        label, baseline = _label(name, begin, end, inner, inner + width)
        made.append(Arc(piece, _outline(begin, end, inner, inner + width), label, baseline))
    return made


def _short(name: str, above: str) -> str:
    """A species below its genus with the genus abbreviated, as is usual: `V. atalanta` in Vanessa."""
    return f"{above[0]}.{name[len(above) :]}" if above and name.startswith(f"{above} ") else name


def _ring_below(taxonomy: Taxonomy, parent: int) -> int:
    """The ring outside a taxon's own."""
    return taxonomy.ranks.index(RANKS[taxonomy.rank_N[parent]]) + 1 if parent else 0


def _outline(begin: float, end: float, inner: float, outer: float) -> str:
    if end - begin > 2 * math.pi - 1e-6:  # an arc from a point to itself would be nothing
        return " ".join(
            f"M{_at(0, r)}A{r:g} {r:g} 0 1 {turn} {_at(math.pi, r)}A{r:g} {r:g} 0 1 {turn} {_at(0, r)}Z"
            for r, turn in ((outer, 1), (inner, 0))
        )
    large = int(end - begin > math.pi)
    return (
        f"M{_at(begin, outer)}A{outer:g} {outer:g} 0 {large} 1 {_at(end, outer)}"
        f"L{_at(end, inner)}A{inner:g} {inner:g} 0 {large} 0 {_at(begin, inner)}Z"
    )


def _label(name: str, begin: float, end: float, inner: float, outer: float) -> tuple[str, str]:
    """The name and its line: along the ring where it fits whole, else from the middle outward, never upside
    down.
    """
    middle, radius = (begin + end) / 2, (inner + outer) / 2
    if (end - begin) * radius > _LETTER * len(name) + 6:
        upper = math.cos(middle) > 0
        radius += -4 if upper else 4  # half the height of the letters
        half = min((end - begin) / 2, 0.49 * 2 * math.pi)
        ends = (middle - half, middle + half) if upper else (middle + half, middle - half)
        large = int(2 * half > math.pi)
        line = f"M{_at(ends[0], radius)}A{radius:g} {radius:g} 0 {large} {int(upper)} {_at(ends[1], radius)}"
        return name, line
    room = int((outer - inner - 8) / _LETTER)
    if (end - begin) * inner < _LINE or room < 3:
        return "", ""
    right = math.sin(middle) >= 0
    shift = (4 if right else -4) / radius
    ends = (inner, outer) if right else (outer, inner)
    line = f"M{_at(middle + shift, ends[0])}L{_at(middle + shift, ends[1])}"
    return name if len(name) <= room else f"{name[: room - 1].rstrip()}…", line


def _at(angle: float, radius: float) -> str:
    """A point, by its angle clockwise from the top."""
    return f"{radius * math.sin(angle):.1f} {-radius * math.cos(angle):.1f}".replace("-0.0", "0.0")


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


def _note(taxonomy: Taxonomy, shown: list[Piece]) -> str:
    drawn, taxa = sum(piece.node is not None for piece in shown) - 1, taxonomy.num_nodes - 1
    text = (
        f"{int(taxonomy.counts_N[0]):,} specimens, {taxa:,} taxa at ranks {', '.join(taxonomy.ranks)}. "
        "Click a taxon to go into it, the middle to go back. "
        "A gap in a ring: specimens without a name at a deeper rank."
    )
    if drawn < taxa:
        text += f" Drawn one by one are the {drawn:,} taxa with most specimens; grey pieces hold the others."
    return text
