"""A device's half written to a folder by a process of its own: training goes on, and the memory goes back at its end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

from sfl.cache.key import HalfKey
from sfl.errors import ModelError, SflError
from sfl.settings import Precision
from sfl.telemetry import log
from sfl.wire.provision import PACKING_S

Packer = Callable[[HalfKey, Path], Awaitable[None]]
"""Fills an empty folder with a half. Raises `ModelError`."""

_ERROR = "error: "


def packable() -> tuple[Precision, ...]:
    """The precisions that this machine can pack."""
    return ("fp32", "bf16", "int8", "nf4") if find_spec("bitsandbytes") is not None else ("fp32", "bf16", "int8")


def packer(model: str) -> Packer:
    """One that packs halves of `model`, a folder or hub id."""

    async def pack(key: HalfKey, folder: Path) -> None:
        command = [sys.executable, "-m", "sfl.edge_server.packing", model, str(key.cut), key.precision, str(folder)]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # which ends with this process, and with it the other
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            errors = await asyncio.wait_for(process.stderr.read() if process.stderr else process.wait(), PACKING_S)
            code = await process.wait()
        except asyncio.TimeoutError:
            raise ModelError(f"packing {key} was not done after {PACKING_S:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if code != 0:
            said = errors.decode(errors="replace").strip() if isinstance(errors, bytes) else ""
            reason = said.splitlines()[-1] if said else f"exit code {code}"
            if not reason.startswith(_ERROR):  # a mistake in the program, or the end of the memory
                log.error("packing %s ended with exit code %d: %s", key, code, said)
            raise ModelError(f"{key} cannot be packed: {reason.removeprefix(_ERROR)}")

    return pack


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main(model: str, cut: str, precision: Precision, folder: str) -> None:
    """Pack in this process, at a low priority; an error ends it with a line on standard error."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(10)
    from sfl.model.pack import pack_device_half

    try:
        pack_device_half(model, int(cut), precision, Path(folder))
    except (SflError, OSError) as error:
        sys.exit(f"{_ERROR}{error}")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]  # the precision was checked by who calls
