"""What a folder with one packed half says of itself, beside its weights."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sfl.errors import ModelError

_FILE = "sfl.json"
_FORMAT = 1


@dataclass(frozen=True)
class PackedHalf:
    """A device's half of the model with this fingerprint: blocks 0 to `cut` - 1 in `precision`, and the embeddings."""

    fingerprint: str
    cut: int
    precision: str


def read_packed(name_or_dir: str | Path) -> PackedHalf | None:
    """None for a model that is not a packed half. Raises `ModelError` for one of another format."""
    path = Path(name_or_dir).expanduser() / _FILE
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries.pop("format") != _FORMAT:
            raise ModelError(f"'{path}' is of another format than this version of sfl reads: pack the half anew")
        return PackedHalf(str(entries["fingerprint"]), int(entries["cut"]), str(entries["precision"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' does not describe a packed half ({error}): pack it anew") from error


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
    text = json.dumps({"format": _FORMAT, **dataclasses.asdict(half)}, indent=2)
    (folder / _FILE).write_text(text + "\n", encoding="utf-8")
