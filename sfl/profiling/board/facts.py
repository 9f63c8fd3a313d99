"""All that is known of the board, at one moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sfl.profiling.board.files import ROOT
from sfl.profiling.board.identity import Identity, identity
from sfl.profiling.board.jetson import gpu_memory_mb, power_mode, power_rails_w
from sfl.profiling.board.memory import BoardMemory, board_memory
from sfl.profiling.board.raspberry import Throttling, throttling, vcgencmd
from sfl.profiling.board.thermal import temperatures_c


@dataclass(frozen=True)
class Board:
    """`temperatures_c` by zone and `power_rails_w` by rail are empty, the others None, where they are not measured.

    `shared_gpu_mb` is what all processes hold of a Jetson's RAM for its GPU; it is no part of any process's RSS.
    """

    identity: Identity
    memory: BoardMemory
    temperatures_c: dict[str, float]
    throttling: Throttling | None
    shared_gpu_mb: float | None
    power_rails_w: dict[str, float]
    power_mode: str | None


def board_facts(root: Path = ROOT, ask_firmware: Callable[[], str | None] = vcgencmd) -> Board:
    """Read everything; what is not there is not measured."""
    return Board(
        identity(root),
        board_memory(root),
        temperatures_c(root),
        throttling(root, ask_firmware),
        gpu_memory_mb(root),
        power_rails_w(root),
        power_mode(root),
    )
