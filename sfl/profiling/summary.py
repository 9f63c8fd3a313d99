"""From what was recorded to a profile: above all, which part of the peak is whose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfl.phases import IDLE
from sfl.profiling.board.facts import board_facts
from sfl.profiling.board.files import ROOT
from sfl.profiling.recorder import Recorder
from sfl.profiling.result import FORMAT, Energy, Part, Peak, Phase, Profile
from sfl.profiling.timeline import COUNT
from sfl.settings import DeviceSettings

FLOOR, CODE, REST = "process floor", "code used later", "allocator and kernels"
_ORDER = ("provision", "import", "load", "tokenise", "forward", "wait", "backward", "step", IDLE, COUNT)


def summarise(recorder: Recorder, settings: Mapping[str, Any], limit_mb: float | None = None, root: Path = ROOT) -> Profile:
    """The profile of a recording that has ended; `limit_mb` defaults to the container's own limit."""
    timeline, at_peak = recorder.timeline, recorder.at_peak
    board = board_facts(root)
    ordered = sorted(timeline.totals.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER))
    return Profile(
        format=FORMAT,
        kind="device",
        settings=dict(settings),
        peak=Peak(
            rss_mb=timeline.peak_mb,
            at_s=timeline.peak_at_s,
            phase=at_peak.phase if at_peak else timeline.phase,
            step=at_peak.step if at_peak else 0,
            exact=recorder.resets_peak,
        ),
        parts=parts_of(recorder),
        phases=tuple(Phase(name, total.count, total.seconds, total.peak_mb, total.mean_mb) for name, total in ordered),
        moments=dict(recorder.moments),
        cuda=_cuda(recorder),
        energy=_energy(recorder),
        board=board,
        limit_mb=limit_mb if limit_mb is not None else board.memory.limit_mb,
        spans=tuple(timeline.spans),
        rss=tuple(timeline.rss.points),
        pss=tuple(recorder.pss.points),
        uss=tuple(recorder.uss.points),
    )


def described(settings: DeviceSettings) -> dict[str, Any]:
    """What a profile says of the settings that it was made with."""
    names = ("model", "task", "cut", "batch_size", "micro_batch", "checkpointing", "max_length", "precision", "run_on", "steps")
    return {
        **{name: getattr(settings, name) for name in names},
        "compute": settings.compute_format,
        "rank": settings.lora.rank,
        "targets": list(settings.lora.target_modules),
    }


def parts_of(recorder: Recorder) -> tuple[Part, ...]:
    """The parts of the peak; the last one, the rest, makes them add up to it.

    The rest is what the allocator has and no tensor uses, what kernels take for themselves, and Python objects made after the
    imports. It is below 0 where memory that the imports had freed, and that is in the floor, was used again.
    """
    at_peak = recorder.at_peak
    held = at_peak.held if at_peak else None
    counted = recorder.parts.counter.phases.get(at_peak.phase) if recorder.parts and at_peak and held else None
    code = None
    if at_peak and held and held.mapped is not None and at_peak.file_mb is not None and recorder.floor_file_mb is not None:
        code = max(0.0, at_peak.file_mb - recorder.floor_file_mb - held.mapped / 1e6)
    parts = [
        Part(FLOOR, recorder.floor_mb),
        Part(CODE, code),
        Part("weights", _mb(held.weights if held else None)),
        Part("embedding rows", _mb(held.embeddings if held else None)),
        Part("adapter", _mb(held.adapter if held else None)),
        Part("gradients", _mb(held.gradients if held else None)),
        Part("optimiser", _mb(held.optimiser if held else None)),
        Part("activations", _mb(counted.activations if counted else None)),
        Part("temporaries", _mb(counted.temporaries if counted else None)),
        Part("wire buffers", _mb(held.wire if held else None)),
    ]
    return *parts, Part(REST, recorder.timeline.peak_mb - sum(part.mb for part in parts if part.mb is not None))


def _mb(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def _energy(recorder: Recorder) -> Energy | None:
    if recorder.meter is None or recorder.joules is None or not recorder.energy_steps:
        return None
    return Energy(recorder.meter.source, recorder.joules, recorder.energy_steps, recorder.joules / recorder.energy_steps)


def _cuda(recorder: Recorder) -> dict[str, float] | None:
    if recorder.parts is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    figures = {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "max_allocated": torch.cuda.max_memory_allocated(),
        **recorder.parts.on_gpu(),
    }
    return {name: size / 1e6 for name, size in figures.items()}
