"""A profile for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sfl.profiling.board.facts import Board
from sfl.profiling.result import Profile

NOT_MEASURED = "not measured"


def tables(profile: Profile) -> RenderableType:
    """The peak in a sentence, then parts, phases, moments and the board."""
    shown: list[RenderableType] = [Text(title(profile), style="bold"), Text(headline(profile)), Text(), _parts(profile)]
    if profile.phases:
        shown += [Text(), _phases(profile)]
    shown += [Text(), _moments(profile), Text(), _board(profile)]
    return Group(*shown)


def title(profile: Profile) -> str:
    """What was profiled."""
    about = profile.settings
    if profile.kind == "process":
        return f"process {about['pid']}: {about['command']}"
    micro = f" in micro-batches of {about['micro_batch']}" if about.get("micro_batch") else ""
    checkpointing = ", checkpointing" if about.get("checkpointing") else ""
    return (
        f"{about['model']}, cut {about['cut']}, {about['precision']} base, {about['compute']} activations,"
        f" {about['batch_size']}x{about['max_length']}{micro}{checkpointing}"
    )


def headline(profile: Profile) -> str:
    """The peak, and how it stands to the limit."""
    peak = profile.peak
    text = f"peak {peak.rss_mb:.0f} MB at {peak.at_s:.1f} s"
    if peak.phase:
        text += f", {peak.phase}" + (f" of step {peak.step}" if peak.step else "")
    if profile.kind == "process":
        text += f"; since its start {profile.settings['peak_since_start_mb']:.0f} MB"
    elif not peak.exact:
        text += "; from samples, as this kernel does not let the peak be counted anew"
    if profile.limit_mb is not None:
        room = profile.limit_mb - peak.rss_mb
        text += f"; limit {profile.limit_mb:.0f} MB, {abs(room):.0f} MB {'to spare' if room >= 0 else 'too much'}"
    return text


def _parts(profile: Profile) -> Table:
    whole = sum(part.mb for part in profile.parts if part.mb is not None)
    table = _table("parts of the peak" if profile.kind == "device" else "parts at the last look")
    table.add_column("part")
    table.add_column("MB", justify="right")
    table.add_column("share", justify="right")
    for part in profile.parts:
        share = "" if part.mb is None or not whole else f"{part.mb / whole:.0%}"
        table.add_row(part.name, _mb(part.mb), share)
    table.add_section()
    table.add_row("sum", _mb(whole), "", style="bold")
    return table


def _phases(profile: Profile) -> Table:
    table = _table("phases")
    for name in ("phase", "times", "seconds", "peak MB", "mean MB"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in profile.phases:
        style = "bold" if phase.name == profile.peak.phase else ""
        figures = (str(phase.count), f"{phase.seconds:.2f}", _mb(phase.peak_mb), _mb(phase.mean_mb))
        table.add_row(phase.name, *figures, style=style)
    return table


def _moments(profile: Profile) -> Table:
    table = _table("the kernel's and the C heap's figures, MB")
    for name in ("", "at s", "RSS", "PSS", "USS", "swap", "heap", "used", "free", "large blocks"):
        table.add_column(name, justify="left" if not name else "right")
    for name, moment in sorted(profile.moments.items(), key=lambda item: item[1].at_s):
        kernel = (moment.rss_mb, moment.pss_mb, moment.uss_mb, moment.swap_mb)
        heap = (moment.arena_mb, moment.used_mb, moment.free_mb, moment.mapped_mb)
        table.add_row(name, f"{moment.at_s:.1f}", *(_mb(mb, "-") for mb in (*kernel, *heap)))
    if all(moment.arena_mb is None for moment in profile.moments.values()):
        table.caption = f"C heap: {NOT_MEASURED}"
    return table


def _board(profile: Profile) -> Table:
    table = _table("board", show_header=False)
    for name, value in board_lines(profile.board):
        table.add_row(name, value)
    energy = profile.energy
    joules = f"{energy.joules_per_step:.2f} ({energy.source}, {energy.steps} steps)" if energy else NOT_MEASURED
    table.add_row("joules per step", joules)
    cuda = profile.cuda
    table.add_row("CUDA", ", ".join(f"{name} {mb:.1f} MB" for name, mb in cuda.items()) if cuda else "none")
    return table


def board_lines(board: Board) -> Iterator[tuple[str, str]]:
    """Name and value of each fact."""
    identity, memory, throttling = board.identity, board.memory, board.throttling
    yield "model", identity.model or NOT_MEASURED
    yield "CPU", f"{identity.cpu or 'name ' + NOT_MEASURED}, {identity.cores or '?'} cores"
    yield "RAM", f"{_mb(memory.ram_mb)} MB, {_mb(memory.available_mb)} MB available"
    yield "swap", f"{_mb(memory.swap_mb)} MB, {_mb(memory.swap_free_mb)} MB free"
    yield "container's limit", "none" if memory.limit_mb is None else f"{_mb(memory.limit_mb)} MB"
    yield "temperature", ", ".join(f"{name} {degrees:.1f} °C" for name, degrees in board.temperatures_c.items()) or NOT_MEASURED
    if throttling is not None:
        since = NOT_MEASURED if throttling.since_boot is None else ", ".join(throttling.since_boot) or "nothing"
        yield "held back by", f"now: {', '.join(throttling.now) or 'nothing'}; since boot: {since}"
    if board.power_mode is not None:
        yield "power mode", board.power_mode
    if board.power_rails_w:
        yield "power rails", ", ".join(f"{name} {watts:.2f} W" for name, watts in board.power_rails_w.items())
    if "Jetson" in (identity.model or ""):
        shared = NOT_MEASURED if board.shared_gpu_mb is None else f"{board.shared_gpu_mb:.1f} MB"
        yield "GPU's share of RAM", f"{shared}, all processes"


def _mb(mb: float | None, missing: str = NOT_MEASURED) -> str:
    return missing if mb is None else f"{mb:.1f}"


def _table(title: str, show_header: bool = True) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="bold", show_header=show_header)
