"""Predictions of other tools, as our table has them: a key, ranks, probabilities, `error`.

- pybioclip, CSV: `file_name`, ranks from `kingdom` down, `species_epithet`, `common_name`, `score`, a row for
  each of the k best; with labels of one's own `file_name`, `classification`, `score`.
- timm's `inference.py`, CSV or Parquet: `filename`, `label`, `prob`; with the k best, the first of `label_0`,
  `label_1` … or of the arrays in a cell.
- SpeciesNet, JSON: `predictions`, each a `filepath` and a `prediction`, a label of seven parts from class to
  common name.
- MegaDetector, JSON, format 1.x: `images`, each a `file` and `detections`; of the detection with the highest
  `conf` that is classified, the best of its `classifications`.
- A table of `sampleid`, `label` and, if known, `score`.

A bare label is a name at a rank that only the caller knows. Ranks above the named one have no probability:
the tools do not give it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import polars as pl

from bioscan.errors import DataError, RequestError, unknown
from bioscan.vocabulary import KEYS, RANKS

FILES: Final = ("image_file", "file_name", "filename", "filepath", "file", "image", "path")
LABELS: Final = ("label", "classification", "prediction")
SCORES: Final = ("score", "prob", "probability", "confidence", "prediction_score")
"""What columns of file names, bare names and their probabilities are called; the first found is taken."""

_LABEL_RANKS: Final = ("class", "order", "family", "genus", "species")
"""Parts two to six of a SpeciesNet label; the first is an id, the last a common name."""
_NO_RESULT: Final = "no cv result"

Row = dict[str, Any]
"""Column -> value; absent columns are null."""


def from_table(frame: pl.DataFrame, where: str, rank: str | None = None) -> pl.DataFrame:
    """A table of another tool in our columns; a table with one of our keys and a rank is returned as it is.

    Of several rows for a specimen the one with the highest score is taken, the first of equal ones.

    Args:
        frame: As read.
        where: Its path, for messages.
        rank: Of the names in a column of labels.

    Raises:
        RequestError: labels of an unknown rank.
        DataError: class numbers instead of names, a score that is no probability.
    """
    ranks = [r for r in RANKS if r in frame.columns]
    if ranks and any(key in frame.columns for key in KEYS):
        return frame
    frame = _first_of_several(frame)
    key = "sampleid" if "sampleid" in frame.columns else _first(FILES, frame)
    label = None if ranks else _first(LABELS, frame)
    if key is not None and not ranks and label is None and "index" in frame.columns:
        raise DataError(
            f"{where}: the column 'index' has numbers of classes; names are needed in a column 'label' "
            "(timm: --label-type name)"
        )
    if key is None or not (ranks or label):
        return frame  # what is missing is told where the table is checked
    if label:
        names = {_rank_of(label, where, rank): pl.col(label)}
    else:
        names = {r: pl.col(r) for r in ranks}
        if {"genus", "species_epithet"} <= {*frame.columns}:
            names["species"] = _binomial()
    ours = "sampleid" if key == "sampleid" else "image_file"
    score = _first(SCORES, frame)
    probabilities = {f"{r}_probability": pl.col(f"{r}_probability") for r in names}
    kept = {name: column for name, column in probabilities.items() if name in frame.columns}
    if score:
        kept[[*probabilities][-1]] = _probability(frame, key, score, where)
    if "error" in frame.columns:
        kept["error"] = pl.col("error")
    columns = {ours: pl.col(key), **names, **kept}
    made = frame.select(expression.alias(name) for name, expression in columns.items())
    return _best(made, ours, [*probabilities][-1]) if score else made


def read_json(path: Path, rank: str | None = None) -> pl.DataFrame:
    """The predictions of SpeciesNet or MegaDetector, in our columns, in the order of the file.

    Args:
        path: The file.
        rank: Of MegaDetector's categories, where their descriptions do not say it.

    Raises:
        RequestError: categories of an unknown rank.
        DataError: another form of JSON, or an entry that cannot be used.
        ValueError: no JSON.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and isinstance(content.get("predictions"), list):
        rows = _rows(content["predictions"], f"{path}, prediction", _of_speciesnet)
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        names = _categories(content, path, rank)
        rows = _rows(content["images"], f"{path}, image", lambda entry: _of_megadetector(entry, names))
    else:
        raise DataError(f"{path}: neither SpeciesNet's JSON (predictions) nor MegaDetector's (images)")
    used = [r for r in RANKS if any(r in row for row in rows)]
    if rows and not used and not any("error" in row for row in rows):
        raise DataError(f"{path}: no entry names a taxon")
    used = used or [rank or "species"]
    schema: dict[str, Any] = dict.fromkeys(["image_file", *used], pl.String)
    schema |= {f"{r}_probability": pl.Float64 for r in used} | {"error": pl.String}
    return pl.DataFrame([[row.get(column) for column in schema] for row in rows], schema, orient="row")


def catalogue_files(files: pl.Series, known: pl.Series) -> pl.Series:
    """Each path as the file name in a catalogue that it ends in; a path that ends in none stays.

    Tools write paths as they were given (`photos/part1/a.jpg`), a catalogue has `a.jpg`, or `part1/a.jpg`.

    Args:
        files: Paths, with slashes or backslashes.
        known: The catalogue's file names.

    Raises:
        DataError: two paths end in the same file name of the catalogue.
    """
    known = known.drop_nulls().unique()
    if files.is_in(known.implode()).all():
        return files
    parts = files.str.replace_all("\\", "/", literal=True).str.split("/")
    found = pl.Series(files.name, [None] * files.len(), pl.String)
    slashes = known.str.count_matches("/", literal=True).max()
    deepest = 1 + (slashes if isinstance(slashes, int) else 0)
    for length in range(deepest, 0, -1):
        ending = parts.list.tail(length).list.join("/")
        found = found.zip_with(found.is_not_null() | ~ending.is_in(known.implode()), ending)
    twice = found.is_duplicated() & found.is_not_null()
    if twice.any():
        name = found.filter(twice)[0]
        both = ", ".join(files.filter((found == name).fill_null(False)).head(3))
        raise DataError(f"the predictions of {both} are all of '{name}' in the catalogue; keep one of them")
    return found.zip_with(found.is_not_null(), files)


# -- tables


def _first(names: Sequence[str], frame: pl.DataFrame) -> str | None:
    return next((name for name in names if name in frame.columns), None)


def _rank_of(label: str, where: str, rank: str | None) -> str:
    """The rank of bare names, checked."""
    if rank is None:
        raise RequestError(f"{where}: of which rank are the names in '{label}'? Say it: --rank")
    if rank not in RANKS:
        raise unknown("rank", rank, RANKS)
    return rank


def _first_of_several(frame: pl.DataFrame) -> pl.DataFrame:
    """Of timm's k best the first: `label_0` as `label`, and of an array in a cell its first element."""
    names = (*LABELS, *SCORES, "index")
    numbered = [n for n in names if n not in frame.columns and f"{n}_0" in frame.columns]
    frame = frame.rename({f"{name}_0": name for name in numbered})
    # as NumPy prints them: ['fly' "bee's"], [9.1e-01 8.0e-02]
    first = r"^\[\s*(?:'([^']*)'|\"([^\"]*)\"|([^\s\]]+))"
    for name, kind in frame.select(n for n in names if n in frame.columns).schema.items():
        column = pl.col(name)
        if isinstance(kind, pl.List):
            frame = frame.with_columns(column.list.first())
        elif kind == pl.String:
            inside = [column.str.extract(first, group) for group in (1, 2, 3)]
            frame = frame.with_columns(pl.coalesce(*inside, column))
    return frame


def _binomial() -> pl.Expr:
    """Genus and epithet; null where one is missing: pybioclip then writes half a name as `species`."""
    parts = [pl.col(column).replace("", None) for column in ("genus", "species_epithet")]
    return pl.concat_str(parts, separator=" ")


def _probability(frame: pl.DataFrame, key: str, score: str, where: str) -> pl.Expr:
    """The scores as numbers, checked."""
    values = frame[score].cast(pl.Float64, strict=False)
    odd = frame[score].is_not_null() & ~values.is_between(0, 1).fill_null(False)
    if odd.any():
        row = int(odd.arg_max() or 0)
        found = f"{score} of {frame[key][row]} is {frame[score][row]}"
        raise DataError(f"{where}: {found}, expected a probability from 0 to 1")
    return pl.col(score).cast(pl.Float64)


def _best(frame: pl.DataFrame, key: str, probability: str) -> pl.DataFrame:
    """One row per specimen, specimens in their order: the row with the highest probability."""
    ordered = frame.with_row_index("place").sort(
        probability, descending=True, nulls_last=True, maintain_order=True
    )
    places = frame.with_row_index("place").group_by(key).agg(pl.col("place").min().alias("first"))
    best = ordered.unique(key, keep="first", maintain_order=True)
    return best.join(places, on=key, nulls_equal=True).sort("first").drop("place", "first")


# -- JSON


def _rows(entries: Sequence[Any], where: str, read: Callable[[dict[str, Any]], Row]) -> list[Row]:
    """A row for each entry; an entry that is not as expected is an error that says which."""
    rows = []
    for number, entry in enumerate(entries, 1):
        try:
            rows.append(read(entry))
        except KeyError as error:
            raise DataError(f"{where} {number}: no {error}") from None
        except (TypeError, ValueError, AttributeError, IndexError):
            raise DataError(f"{where} {number}: cannot be used: {json.dumps(entry)[:60]}") from None
    return rows


def _of_speciesnet(entry: dict[str, Any]) -> Row:
    """What the ensemble says, or, where only the classifier has run, its best class."""
    row: Row = {"image_file": entry["filepath"]}
    label, score = entry.get("prediction"), entry.get("prediction_score")
    if label is None and (found := entry.get("classifications")):
        label, score = found["classes"][0], found["scores"][0]
    if label is not None:
        return row | _with_probability(_taxon(label), score)
    failures = entry.get("failures")
    return row | ({"error": f"failed: {', '.join(failures)}"} if failures else {})


def _of_megadetector(entry: dict[str, Any], names: dict[str, Row]) -> Row:
    """The best class of the most certain detection that has one."""
    row: Row = {"image_file": entry["file"]}
    if entry.get("failure"):
        return row | {"error": str(entry["failure"])}
    classified = [d for d in entry.get("detections") or () if d.get("classifications")]
    if not classified:
        return row
    detection = max(classified, key=lambda d: float(d["conf"]))
    category, score = max(detection["classifications"], key=lambda pair: float(pair[1]))
    return row | _with_probability(names[str(category)], score)


def _categories(content: dict[str, Any], path: Path, rank: str | None) -> dict[str, Row]:
    """Category id -> rank -> name: from the descriptions where they are SpeciesNet labels, else the names."""
    names = content.get("classification_categories")
    if not isinstance(names, dict) or not names:
        raise DataError(
            f"{path}: no classification_categories: MegaDetector alone says animal, person or vehicle; "
            "run a classifier on its detections"
        )
    described = content.get("classification_category_descriptions") or {}
    made = {category: _taxon(label) for category, label in described.items() if str(label).count(";") == 6}
    if made:
        return dict.fromkeys(names, Row()) | made
    known = _rank_of("classification_categories", str(path), rank)
    return {category: {known: name} for category, name in names.items()}


def _taxon(label: str) -> Row:
    """Rank -> name of a SpeciesNet label; empty where it names no taxon (`blank`, `vehicle`, `animal`).

    >>> _taxon("83133617-8358-4910-82ee-4c23e40ba3dc;insecta;diptera;;;;fly")
    {'class': 'Insecta', 'order': 'Diptera'}
    """
    _, *names, _ = label.split(";")
    ranks = dict(zip(_LABEL_RANKS, names, strict=True))
    made = {r: name[:1].upper() + name[1:] for r, name in ranks.items() if name and name != _NO_RESULT}
    if "species" in made:  # so far an epithet
        made["species"] = f"{made['genus']} {ranks['species']}"
    return made


def _with_probability(names: Row, score: Any) -> Row:
    """The names, and the score as the probability of the deepest of them."""
    return names | ({f"{list(names)[-1]}_probability": float(score)} if names else {})
