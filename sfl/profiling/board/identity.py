"""Which board and which processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfl.profiling.board.files import ROOT, text_of

# MIDR part numbers of Arm's own cores, as in /proc/cpuinfo; 64-bit Arm kernels print no name.
_ARM_CORES = {
    0xB76: "ARM1176",
    0xC07: "Cortex-A7",
    0xD03: "Cortex-A53",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD42: "Cortex-A78AE",
}
_ARM = "0x41"


@dataclass(frozen=True)
class Identity:
    """`model` of the board, `cpu` by name, number of `cores` that are on; each None where it is not measured."""

    model: str | None
    cpu: str | None
    cores: int | None


def identity(root: Path = ROOT) -> Identity:
    """From the device tree (Pi, Jetson) or DMI (PCs), and /proc/cpuinfo."""
    dmi = [text_of(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name")]
    model = text_of(root / "proc/device-tree/model") or " ".join(filter(None, dmi)) or None
    lines = (text_of(root / "proc/cpuinfo") or "").splitlines()
    pairs = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
    fields = dict(reversed(pairs))  # of a key that is there for each core, the first one
    cores = sum(key == "processor" for key, _ in pairs)
    return Identity(model, fields.get("model name") or _arm_core(fields), cores or None)


def _arm_core(fields: dict[str, str]) -> str | None:
    implementer, part = fields.get("CPU implementer"), fields.get("CPU part")
    if implementer is None or part is None:
        return None
    known = _ARM_CORES.get(int(part, 16)) if implementer == _ARM else None
    return known or f"implementer {implementer}, part {part}"
