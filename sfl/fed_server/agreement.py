"""What all devices have in common, and how it comes from those that have joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfl.errors import RefusedError, TrainingDiffersError
from sfl.fed_server.members import Member


@dataclass(frozen=True)
class Agreement:
    """What all devices have in common: class names in the order of the logits, flow columns, tokens."""

    labels: tuple[str, ...]
    columns: tuple[str, ...]
    max_length: int


def check_labels(member: Member, allowed: Sequence[str]) -> None:
    """Raise `RefusedError` for a classifying device with labels that are none of the `allowed` ones, unless these are open,
    or without any."""
    unknown = sorted(set(member.labels) - set(allowed))
    if allowed and unknown:
        raise TrainingDiffersError(
            f"{member.describe()} has the label '{unknown[0]}', which is not among those agreed: {', '.join(allowed)};"
            " name all labels with `labels` in the federation server's settings"
        )
    if not member.labels:
        raise RefusedError(f"{member.describe()} cannot join: classification needs labels and its data has none")


def agree(devices: Sequence[Member], expected: int, labels: tuple[str, ...]) -> Agreement | None:
    """What `devices` agree on once the `expected` number of them is there, or at the first one when `labels` are fixed.

    None before that. Raises `RefusedError` when all of them together have seen fewer than two classes.
    """
    if not devices:
        return None
    first = devices[0]
    fixed = labels if first.task == "classification" else ()
    if len(devices) < (1 if fixed else expected):
        return None
    if first.task != "classification":
        return Agreement((), first.columns, first.max_length)
    found = fixed or tuple(sorted({label for device in devices for label in device.labels}))
    if len(found) < 2:
        raise RefusedError(
            f"all devices together have seen only one class, '{found[0]}': a classifier needs two or more; name"
            " the classes with `labels` in the federation server's settings, or give some device other data"
        )
    return Agreement(found, first.columns, first.max_length)
