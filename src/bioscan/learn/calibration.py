"""What a model folder holds of a model's confidence: its temperature, the records that thresholds and
prediction sets come from, and how reliable each taxon's name was.

`learn.calibrating` makes it, at the end of a training or on a user's own records.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import polars as pl

from bioscan.errors import DataError

RECORDS: Final = "calibration.parquet"
RELIABILITY: Final = "reliability.parquet"


@dataclass(frozen=True)
class Calibration:
    """How a model's logits become probabilities that mean something, and what is known of its answers.

    Validation specimens, or other labelled ones, are cut into two parts, groups kept whole: the temperature
    comes from the first, records and reliability from the second.
    """

    temperature: float
    """Leaf logits are divided by it, after the logit adjustment by `tau`."""
    rank_temperatures: dict[str, float] | None
    """Of the probabilities at each rank, after `temperature`, where asked for: see
    `analysis.confidence.tempered_rank_probabilities`. A rank that is not among them has 1. What is shown is
    the `running_minimum` of the names' probabilities from the root down."""
    tau: float
    """Strength of the logit adjustment that all this is for."""
    decode: str
    """Decoding that all this is for; see `analysis.hierarchy.DECODINGS`."""
    info: dict[str, Any]
    """What it was made from and how good it is: `group`, `share`, `seed`, `first` and `second` (`n`,
    `groups`), `fit` (`n`, `nll_before`, `nll_after`, `at_bound`), `measured_on` (`first` or `second`),
    `ranks` (rank -> `n`, `nll_before`, `nll_after`, `ece_before`, `ece_after`), `warnings`, `experiment`,
    `roles`, `data_fingerprint`."""
    records: pl.DataFrame | None = None
    """A row for each record of the second part, in the probabilities that are shown: `group`, and for each
    rank of the taxonomy `<rank>_true` (node; null: no name there, -1: a taxon that the model does not know),
    `<rank>_named` (node of the answer; null: none), `<rank>_probability` (of the answer), and as in
    `analysis.conformal.Truth`, among all nodes at the rank, `<rank>_truth_probability`, `<rank>_before` and
    `<rank>_place`, null where `<rank>_true` is. None where nothing was kept from the first part."""
    reliability: pl.DataFrame | None = None
    """What is known of each taxon's name at each rank, root down: see `analysis.reliability`."""
    fingerprint: str = ""
    """SHA-256 of all this, once it is in a model folder."""

    @property
    def cut(self) -> dict[str, Any] | None:
        """How validation specimens were cut in two: `group`, `share` and `seed` as `analysis.groups` takes
        them; None where they were not, or where it was other specimens.
        """
        if self.records is None or self.info.get("roles") != ["validation"]:
            return None
        return {name: self.info[name] for name in ("group", "share", "seed")}

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the tables into a folder; what its model.json is to say."""
        files = {}
        for name, table in ((RECORDS, self.records), (RELIABILITY, self.reliability)):
            if table is not None:
                table.write_parquet(folder / name)
                files[name] = sha256((folder / name).read_bytes()).hexdigest()
        told = {name: getattr(self, name) for name in _NUMBERS}
        return {**told, **self.info, "files": files}


_NUMBERS: Final = ("temperature", "rank_temperatures", "tau", "decode")


def read(folder: Path, told: Mapping[str, Any] | None) -> Calibration | None:
    """The calibration of a model folder, from what its model.json says of it; None: nothing.

    Raises:
        DataError: what is told is broken; a table that is absent, or not the one that is named.
    """
    if told is None:
        return None
    tables = {name: _table(folder / name, digest) for name, digest in told["files"].items()}
    ranks = told["rank_temperatures"]
    return Calibration(
        temperature=float(told["temperature"]),
        rank_temperatures=None if ranks is None else {rank: float(value) for rank, value in ranks.items()},
        tau=float(told["tau"]),
        decode=str(told["decode"]),
        info={key: value for key, value in told.items() if key not in (*_NUMBERS, "files")},
        records=tables.get(RECORDS),
        reliability=tables.get(RELIABILITY),
        fingerprint=sha256(json.dumps(dict(told), sort_keys=True).encode()).hexdigest(),
    )


def _table(path: Path, digest: str) -> pl.DataFrame:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: is missing, though model.json names it") from None
    if sha256(content).hexdigest() != digest:
        raise DataError(f"{path}: not the table that model.json names (its SHA-256 differs)")
    try:
        return pl.read_parquet(BytesIO(content))
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
