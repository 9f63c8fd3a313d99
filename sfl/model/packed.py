"""What a folder with one packed half says of itself, beside its weights."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sfl.errors import DamagedModelError, ModelError

_FILE = "sfl.json"
FORMAT = 2  # of packed halves: their files and how weights are quantised; part of a half's source


@dataclass(frozen=True)
class PackedHalf:
    """A device's half of the model with this fingerprint: blocks 0 to `cut` - 1 in `precision`, and the embeddings.

    `source` (see sfl/model/source.py) names all that it was packed from: the configuration and the tokenizer, too.
    """

    fingerprint: str
    source: str
    cut: int
    precision: str


def read_packed(name_or_dir: str | Path) -> PackedHalf | None:
    """None for a model that is not a packed half. Raises `ModelError` for one of another format."""
    path = Path(name_or_dir).expanduser() / _FILE
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries["format"] != FORMAT:
            raise DamagedModelError(
                f"'{path}' is of pack format {str(entries['format'])[:20]}, and this version of sfl reads format {FORMAT}:"
                " run the same version here and where it was packed, and have it packed anew"
            )
        return PackedHalf(str(entries["fingerprint"]), str(entries["source"]), int(entries["cut"]), str(entries["precision"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedModelError(f"'{path}' does not describe a packed half ({error}): pack it anew") from error


def require_packed(name_or_dir: str | Path, cut: int, precision: str) -> None:
    """Raise `ModelError` when this is a packed half from which the half at `cut` in `precision` cannot be had."""
    packed = read_packed(name_or_dir)
    if packed is not None and (cut > packed.cut or packed.precision not in (precision, "fp32")):
        raise ModelError(
            f"'{name_or_dir}' is packed for cuts up to {packed.cut} in {packed.precision}, not for cut {cut} in {precision}:"
            " take the whole model, or have this half packed"
        )


def require_whole(name_or_dir: str | Path) -> None:
    """Raise `ModelError` when this is a packed half."""
    packed = read_packed(name_or_dir)
    if packed is not None:
        raise ModelError(f"'{name_or_dir}' holds a device's half alone, up to cut {packed.cut}: take the whole model")


def write_packed(folder: Path, half: PackedHalf) -> None:
    """Write what `read_packed` reads."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(half)}, indent=2)
    (folder / _FILE).write_text(text + "\n", encoding="utf-8")
