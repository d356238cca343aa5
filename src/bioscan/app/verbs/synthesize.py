"""`bioscan synthesize`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite, SettingsFile, flags_of
from bioscan.config import layered
from bioscan.data.synthesis import SynthesisSettings, synthesize
from bioscan.parallel import cores
from bioscan.vocabulary import RANKS

Flags = flags_of(SynthesisSettings)


def run(
    folder: Path,
    /,
    *,
    config: SettingsFile = None,
    settings: Annotated[Flags | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Write an artificial dataset in the layout of BIOSCAN-1M, with the truth about it in FOLDER/truth.

    Invented taxa with the real orders, shares and gaps; insects drawn in wells; barcodes evolved down the
    same tree. Equal settings give equal bytes. At 1,128,313 specimens (with --no-images: a minute) orders and
    Diptera families have exactly the published counts.

    Args:
        folder: New folder for everything.
    """
    chosen = layered(
        SynthesisSettings, recipe={"workers": cores()}, file=config, table="synthesize", flags=settings
    )
    unit = "pictures" if chosen.images else "rows"
    with out.progress("synthesizing", unit) as progress:
        result = synthesize(folder, chosen, overwrite=overwrite, progress=progress)
    if json:
        out.show(out.to_json({k: str(v) if isinstance(v, Path) else v for k, v in result.items()}))
        return 0
    taxa = ", ".join(f"{result[name]:,} {name}" for name in ("orders", "families", "genera", "species"))
    out.show(
        f"{result['specimens']:,} specimens: {taxa}, {result['bins']:,} BINs, {result['plates']:,} plates"
    )
    shares = (f"{rank} {result['labelled'][rank] / result['specimens']:.1%}" for rank in RANKS[2:-1])
    out.show(f"labelled: {', '.join(shares)}")
    for kind, count in result["faults"].items():
        out.show(f"planted: {count:,} {kind.replace('_', ' ')}")
    for name in ("metadata", "images", "zip", "hdf5", "controls", "truth"):
        if result[name] is not None:
            out.show(f"{name}: {result[name]}")
    return 0
