"""The tree of taxa. A taxon is its path, not its name.

Two specimens belong to one taxon when rank and name agree and their paths do not contradict each other: a
hole in one path (a subfamily left out, say) is filled by the other. Where a path with holes fits several
taxa, it stays a taxon of its own; `bioscan check` lists such cases.
"""

import itertools
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bioscan.errors import DataError, RequestError, near, unknown
from bioscan.vocabulary import RANKS

Lineage = tuple[str | None, ...]
"""Names aligned with RANKS, from phylum down to the taxon's own rank; None is a hole."""


@dataclass(frozen=True)
class Taxonomy:
    """A tree over some ranks, its nodes numbered depth first; node 0 is the root.

    Children are ordered by descending count of records, ties by first appearance, so that with one rank the
    leaf numbers are the class numbers of the paper's program (0: the most common).
    """

    ranks: tuple[str, ...]
    """Ranks that have nodes, root down."""
    rank_N: NDArray[np.int8]
    """Index into RANKS; -1 for the root."""
    parent_N: NDArray[np.int32]
    """Node above; -1 for the root."""
    first_leaf_N: NDArray[np.int32]
    end_leaf_N: NDArray[np.int32]
    """The leaves below node n are the leaf numbers first_leaf_N[n] to end_leaf_N[n] - 1."""
    counts_N: NDArray[np.int64]
    """Records at or below the node that the tree was built from."""
    paths: tuple[Lineage, ...]
    """Lineage of each node; the root's is empty."""
    predictable_N: NDArray[np.bool_]
    """False for the placeholders that `filled` puts into gaps: they are no taxa and no answers."""

    @classmethod
    def build(cls, frame: pl.DataFrame, ranks: Sequence[str]) -> "Taxonomy":
        """The tree of the taxa named in a table at the given ranks.

        Args:
            frame: One row per record; rank columns as in RANKS, missing null (an absent column: all).
            ranks: Ranks that get nodes. Ranks above the first of them still tell homonyms apart.

        Raises:
            RequestError: an unknown rank, or no rank.
            DataError: no record has a name at any of the ranks.
        """
        ordered = _ordered(ranks)
        table = _distinct_paths(frame, ordered[-1])
        canonical = resolve_paths(table.rows())
        counts: dict[Lineage, int] = {(): 0}
        parents: dict[Lineage, Lineage] = {}
        for *names, count in table.iter_rows():
            counts[()] += count
            node = _node_of(canonical[trimmed(names)], ordered)
            while node:
                counts[node] = counts.get(node, 0) + count
                parents[node] = _node_of(node[:-1], ordered)
                node = parents[node]
        if len(counts) == 1:
            raise DataError(f"no record has a name at rank {' or '.join(ordered)}")
        return cls._numbered(ordered, counts, parents)

    def filled(self) -> tuple["Taxonomy", int]:
        """The tree without gaps: every rank of the tree above a leaf has a node.

        Where a child skips ranks of the tree, a placeholder «unassigned PARENT» takes its place at each of
        them, one for a parent and rank, as the dataset's own package does it. Placeholders are nodes with
        counts and leaves, but `predictable_N` is False, `targets` never finds them, and the paths of the
        taxa below them keep their holes. Leaves are the same taxa as before, in a new order. Below a leaf
        nothing is added: a family without deeper records stays a leaf at rank family.

        Returns:
            The tree (numbered anew), and how many placeholders were made. With one rank there are none.

        >>> rows = {"order": ["Diptera"], "family": [None], "genus": ["Aus"]}
        >>> tree, made = Taxonomy.build(pl.DataFrame(rows), ["order", "family", "genus"]).filled()
        >>> [tree.name(node) for node in range(tree.num_nodes)], made
        (['', 'Diptera', 'unassigned Diptera', 'Aus'], 1)
        """
        levels = [RANKS.index(rank) for rank in self.ranks]
        counts = dict(zip(self.paths, self.counts_N.tolist(), strict=True))
        parents: dict[Lineage, Lineage] = {}
        placeholders: dict[tuple[Lineage, int], Lineage] = {}
        made: dict[Lineage, int] = {}
        for path, parent_number in zip(self.paths[1:], self.parent_N[1:].tolist(), strict=True):
            parent = above = self.paths[parent_number]
            for level in levels:
                if not len(parent) <= level < len(path) - 1:
                    continue
                if (parent, level) not in placeholders:
                    name = f"unassigned {self.name(parent_number)}".rstrip()
                    while (place := (*parent, *(None,) * (level - len(parent)), name)) in counts:
                        name = f"unassigned {name}"  # a table may have taxa of this name
                    placeholders[parent, level] = place
                    parents[place] = above
                above = placeholders[parent, level]
                made[above] = made.get(above, 0) + counts[path]
            parents[path] = above
        unpredictable = {self.paths[n] for n in np.flatnonzero(~self.predictable_N)} | made.keys()
        return self._numbered(self.ranks, counts | made, parents, unpredictable), len(made)

    @classmethod
    def _numbered(
        cls,
        ranks: tuple[str, ...],
        counts: dict[Lineage, int],
        parents: dict[Lineage, Lineage],
        unpredictable: Set[Lineage] = frozenset(),
    ) -> "Taxonomy":
        children: dict[Lineage, list[Lineage]] = {}
        for node, parent in parents.items():
            children.setdefault(parent, []).append(node)
        for siblings in children.values():
            siblings.sort(key=lambda node: -counts[node])  # stable: ties stay in order of appearance
        paths: list[Lineage] = []
        parent_N: list[int] = []
        first_N: list[int] = []
        end_N: list[int] = []
        leaves = 0
        stack: list[tuple[Lineage, int]] = [((), -1)]
        open_nodes: list[int] = []
        while stack:
            node, above = stack.pop()
            while open_nodes and open_nodes[-1] != above:
                end_N[open_nodes.pop()] = leaves
            number = len(paths)
            paths.append(node)
            parent_N.append(above)
            first_N.append(leaves)
            end_N.append(-1)
            open_nodes.append(number)
            below = children.get(node, [])
            leaves += not below
            stack.extend((child, number) for child in reversed(below))
        for number in open_nodes:
            end_N[number] = leaves
        return cls(
            ranks=ranks,
            rank_N=np.array([len(p) - 1 for p in paths], np.int8),
            parent_N=np.array(parent_N, np.int32),
            first_leaf_N=np.array(first_N, np.int32),
            end_leaf_N=np.array(end_N, np.int32),
            counts_N=np.array([counts[p] for p in paths], np.int64),
            paths=tuple(paths),
            predictable_N=np.array([p not in unpredictable for p in paths], bool),
        )

    @property
    def num_nodes(self) -> int:
        """Nodes, the root included."""
        return len(self.paths)

    @property
    def num_leaves(self) -> int:
        """Leaf taxa: the length of a probability vector."""
        return int(self.end_leaf_N[0])

    @cached_property
    def leaves_L(self) -> NDArray[np.int32]:
        """Node number of each leaf."""
        has_child = np.zeros(self.num_nodes, bool)
        has_child[self.parent_N[1:]] = True
        return np.flatnonzero(~has_child).astype(np.int32)

    @property
    def leaf_paths(self) -> list[Lineage]:
        """Lineage of each leaf."""
        return [self.paths[n] for n in self.leaves_L]

    def name(self, node: int) -> str:
        """The node's own name; "" for the root."""
        return (self.paths[node] or ("",))[-1] or ""

    def targets(self, frame: pl.DataFrame) -> NDArray[np.int32]:
        """Per record the node of its deepest known rank among the tree's ranks.

        Holes in a path are filled from the table's other records first, as in `build`. 0 (the root) where no
        rank of the tree is known, -1 where the taxon is not in the tree or where holes leave several open.
        """
        columns = [r for r in RANKS[: RANKS.index(self.ranks[-1]) + 1] if r in frame.columns]
        if not columns:
            return np.zeros(frame.height, np.int32)
        distinct = frame.select(columns).unique(maintain_order=True)
        paths = [aligned(row, columns) for row in distinct.iter_rows()]
        resolved = resolve_paths(paths)
        nodes = [self._find(resolved[path]) for path in paths]
        nodes = [n if n >= 0 else self._find(path) for n, path in zip(nodes, paths, strict=True)]
        found = frame.select(columns).join(
            distinct.with_columns(pl.Series("node", nodes, pl.Int32)),
            on=columns,
            how="left",
            nulls_equal=True,
            maintain_order="left",
        )
        return found["node"].to_numpy()

    @cached_property
    def _by_name(self) -> dict[tuple[int, str | None], list[int]]:
        table: dict[tuple[int, str | None], list[int]] = {}
        for number in np.flatnonzero(self.predictable_N[1:]) + 1:
            path = self.paths[number]
            table.setdefault((len(path) - 1, path[-1]), []).append(int(number))
        return table

    def _find(self, path: Lineage) -> int:
        """The node of a path by the rule of `resolve_paths`: 0 for the root, -1 for none or several."""
        wanted = _node_of(path, self.ranks)
        if not wanted:
            return 0
        above = self._find(wanted[:-1])
        if above > 0:
            parent = self.paths[above]
            wanted = (*_union([wanted[: len(parent)], parent]), *wanted[len(parent) :])
        same_name = self._by_name.get((len(wanted) - 1, wanted[-1]), [])
        fitting = [n for n in same_name if _compatible(self.paths[n], wanted)]
        if len(fitting) == 1:
            return fitting[0]
        exact = [n for n in fitting if self.paths[n] == wanted]
        if exact:
            return exact[0]
        paths = [self.paths[n] for n in same_name]
        clear = [n for n in fitting if _all_compatible(_fitting(self.paths[n], paths))]
        return clear[0] if len(clear) == 1 and _all_compatible([self.paths[n] for n in fitting]) else -1

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON; `from_dict` reads it back."""
        return {
            "ranks": list(self.ranks),
            "nodes": [
                {"path": list(path), "parent": int(parent), "count": int(count)}
                | ({} if predictable else {"placeholder": True})
                for path, parent, count, predictable in zip(
                    self.paths, self.parent_N, self.counts_N, self.predictable_N, strict=True
                )
            ],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Taxonomy":
        """A tree from `to_dict`; numbers and order are as they were.

        Raises:
            DataError: the content is not a tree numbered depth first.
        """
        try:
            paths = [tuple(node["path"]) for node in content["nodes"]]
            counts = {path: int(node["count"]) for path, node in zip(paths, content["nodes"], strict=True)}
            parents = {
                path: paths[node["parent"]]
                for path, node in zip(paths[1:], content["nodes"][1:], strict=True)
            }
            unpredictable = {
                path
                for path, node in zip(paths, content["nodes"], strict=True)
                if node.get("placeholder", False)
            }
            tree = cls._numbered(tuple(content["ranks"]), counts, parents, unpredictable)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise DataError(
                "the taxonomy cannot be read: nodes with path, parent and count expected"
            ) from None
        if list(tree.paths) != paths:
            raise DataError("the taxonomy's nodes are not in depth-first order by descending count")
        return tree


def within(frame: pl.DataFrame, taxon: str) -> pl.DataFrame:
    """The rows below a taxon, named as `Lepidoptera`, or `order:Lepidoptera` where ranks share a name.

    Raises:
        RequestError: no rank has the name (with near ones), or several ranks have it.
    """
    rank, _, name = taxon.rpartition(":")
    if rank and rank not in RANKS:
        raise unknown("rank", rank, RANKS)
    columns = [r for r in ([rank] if rank else RANKS) if r in frame.columns]
    having = [r for r in columns if frame.select((pl.col(r) == name).any()).item()]
    if not having:
        names = {n for r in columns for n in frame[r].drop_nulls().unique()}
        raise RequestError(f"no record belongs to '{taxon}'{near(name, names)}")
    if len(having) > 1:
        raise RequestError(f"'{name}' is a name at ranks {', '.join(having)}; say {having[0]}:{name}")
    return frame.filter(pl.col(having[0]) == name)


def resolve_paths(rows: Iterable[Sequence[Any]]) -> dict[Lineage, Lineage]:
    """Each path as written -> the path of its taxon, holes filled where exactly one taxon fits.

    A path first takes over the taxon of the path above it. Then it is joined with the paths of its own name
    that it fits, if these fit each other too. The order of the rows does not matter.

    Args:
        rows: Names aligned with RANKS; anything after the ranks' columns is ignored, null is a hole.

    Returns:
        A dict with every prefix of every row that ends in a name. A path that fits no other or several stays.

    >>> found = resolve_paths([("Arthropoda", "Insecta", "Diptera", "Aidae"), (None, None, None, "Aidae")])
    >>> found[None, None, None, "Aidae"]
    ('Arthropoda', 'Insecta', 'Diptera', 'Aidae')
    """
    prefixes: dict[Lineage, None] = {(): None}
    for row in rows:
        path = trimmed(row[: len(RANKS)])
        while path and path not in prefixes:
            prefixes[path] = None
            path = trimmed(path[:-1])
    written = list(prefixes)
    canonical = {path: path for path in written}
    while True:
        step = _merge_once(dict.fromkeys(canonical.values()))
        merged = {path: step[taxon] for path, taxon in canonical.items()}
        for taxon in list(merged.values()):  # what a filled path says about the taxa above it
            above = trimmed(taxon[:-1])
            while above and above not in merged:
                merged[above] = above
                above = trimmed(above[:-1])
        if merged == canonical:
            return {path: canonical[path] for path in written}
        canonical = merged


def _merge_once(paths: Iterable[Lineage]) -> dict[Lineage, Lineage]:
    """One pass root down: a path takes over its parent's taxon, then fills the holes of its fellows."""
    groups: dict[tuple[int, str | None], list[Lineage]] = {}
    for path in paths:
        if path:
            groups.setdefault((len(path), path[-1]), []).append(path)
    canonical: dict[Lineage, Lineage] = {(): ()}
    for (length, name), members in sorted(groups.items(), key=lambda item: item[0][0]):
        raised = {}
        for path in members:
            above = trimmed(path[:-1])
            parent = canonical.get(above, above)
            raised[path] = (*parent, *(None,) * (length - 1 - len(parent)), name)
        joined = _joined(list(dict.fromkeys(raised.values())))
        canonical |= {path: joined[lifted] for path, lifted in raised.items()}
    return canonical


def _joined(paths: list[Lineage]) -> dict[Lineage, Lineage]:
    """Different paths of one name -> each filled from those that it fits, where these fit each other."""
    joined = {path: path for path in paths}
    if len(paths) == 1:
        return joined
    known = [place for place in range(len(paths[0])) if all(path[place] is not None for path in paths)]
    groups: dict[Lineage, list[Lineage]] = {}  # paths that differ at a rank known to all never fit
    for path in paths:
        groups.setdefault(tuple(path[place] for place in known), []).append(path)
    for members in groups.values():
        fits = {path: _fitting(path, members) for path in members if None in path}
        clear = {path for path in members if _all_compatible(fits.get(path, ()))}
        for path in members:
            if None in path and path in clear:
                joined[path] = _union([other for other in fits[path] if other in clear])
    return joined


def _fitting(path: Lineage, others: Iterable[Lineage]) -> list[Lineage]:
    return [other for other in others if _compatible(path, other)]


def _compatible(one: Lineage, other: Lineage) -> bool:
    return all(a == b or a is None or b is None for a, b in zip(one, other, strict=True))


def _all_compatible(paths: Sequence[Lineage]) -> bool:
    return all(_compatible(one, other) for one, other in itertools.combinations(paths, 2))


def _union(paths: Sequence[Lineage]) -> Lineage:
    """The known names of compatible paths of one length together."""
    return tuple(
        next((name for name in names if name is not None), None) for names in zip(*paths, strict=True)
    )


def trimmed(names: Sequence[Any]) -> Lineage:
    """The path without the holes at its end."""
    end = len(names)
    while end and names[end - 1] is None:
        end -= 1
    return tuple(names[:end])


def aligned(row: Sequence[Any], columns: Sequence[str]) -> Lineage:
    """The path of a row of rank columns, absent ranks as holes."""
    known = dict(zip(columns, row, strict=True))
    return trimmed([known.get(rank) for rank in RANKS])


def _node_of(path: Lineage, ranks: Sequence[str]) -> Lineage:
    """The longest prefix of a path that ends in a name at one of the ranks."""
    for end in range(len(path), 0, -1):
        if path[end - 1] is not None and RANKS[end - 1] in ranks:
            return path[:end]
    return ()


def _ordered(ranks: Sequence[str]) -> tuple[str, ...]:
    for rank in ranks:
        if rank not in RANKS:
            raise unknown("rank", rank, RANKS)
    if not ranks:
        raise RequestError(f"name at least one rank of {', '.join(RANKS)}")
    return tuple(r for r in RANKS if r in ranks)


def _distinct_paths(frame: pl.DataFrame, deepest: str) -> pl.DataFrame:
    """Distinct paths down to rank `deepest`, aligned with RANKS, in order of appearance; and their `len`."""
    used = RANKS[: RANKS.index(deepest) + 1]
    columns = [pl.col(r) if r in frame.columns else pl.lit(None, pl.String).alias(r) for r in used]
    padding = [pl.lit(None, pl.String).alias(r) for r in RANKS[len(used) :]]
    counted = frame.select(columns).group_by(used, maintain_order=True).len()
    return counted.select(*used, *padding, "len")
