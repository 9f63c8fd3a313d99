"""A device's half written to a folder by a process of its own: training goes on, and the memory goes back at its end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from sfl.cache.key import HalfKey
from sfl.errors import ModelError, SflError
from sfl.settings import Precision
from sfl.telemetry import log
from sfl.wire.provision import PACKING_S

RequireRoom = Callable[[int], Awaitable[None]]
"""Told how many bytes are about to be written. Raises an `SflError` where there is no room for them."""
Packer = Callable[[HalfKey, Path, RequireRoom], Awaitable[None]]
"""Fills an empty folder with a half, once there is room. Raises `ModelError`, and what `RequireRoom` raises."""

_ERROR = "error: "


def packable() -> tuple[Precision, ...]:
    """The precisions that this machine can pack, as far as can be told at once.

    Whether bitsandbytes runs is only tried when a device asks for nf4, as importing it takes 2 s and more than 100 MB; where
    it does not, packing fails with the reason.
    """
    return ("fp32", "bf16", "int8", "nf4") if find_spec("bitsandbytes") is not None else ("fp32", "bf16", "int8")


def packer(model: str) -> Packer:
    """One that packs halves of `model`, a folder or hub id."""

    async def pack(key: HalfKey, folder: Path, require_room: RequireRoom) -> None:
        command = [sys.executable, "-m", "sfl.edge_server.packing", model, str(key.cut), key.precision, str(folder)]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # which ends with this process, and with it the other
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            said = await asyncio.wait_for(_packed(process, require_room), PACKING_S)
        except asyncio.TimeoutError:
            raise ModelError(f"packing {key} was not done after {PACKING_S:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            reason = said.splitlines()[-1] if said else f"exit code {process.returncode}"
            if not reason.startswith(_ERROR):  # a mistake in the program, or the end of the memory
                log.error("packing %s ended with exit code %d: %s", key, process.returncode, said)
            raise ModelError(f"{key} cannot be packed: {reason.removeprefix(_ERROR)}")

    return pack


async def _packed(process: asyncio.subprocess.Process, require_room: RequireRoom) -> str:
    """Answer the other process's one question, for room, and wait for its end; what it said on standard error."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise ValueError("the process has no pipes")
    errors = asyncio.create_task(process.stderr.read())
    try:
        size = await process.stdout.readline()
        if size:
            await require_room(int(size))
            process.stdin.write(b"go on\n")
        await process.wait()
        return (await errors).decode(errors="replace").strip()
    finally:
        errors.cancel()


def _ask_for_room(size: int, question: int) -> None:
    """Ask the edge server, which ends this process where there is none. From then on this process ends with it."""
    os.write(question, f"{size}\n".encode())
    if not sys.stdin.readline():
        os._exit(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main(model: str, cut: str, precision: Precision, folder: str) -> None:
    """Pack in this process, at a low priority; an error ends it with a line on standard error."""
    os.nice(10)
    question = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is not the question
    from sfl.model.pack import pack_device_half

    try:
        pack_device_half(model, int(cut), precision, Path(folder), partial(_ask_for_room, question=question))
    except (SflError, OSError) as error:
        sys.exit(f"{_ERROR}{error}")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]  # the precision was checked by who calls
