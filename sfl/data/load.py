"""The one call that a device makes: its settings to its examples, split."""

from __future__ import annotations

from dataclasses import replace

from sfl.data.partition import take_part
from sfl.data.read import read_file
from sfl.data.settings import DataSettings, Task
from sfl.data.split import Splits, drop_repeats, split_examples
from sfl.errors import DataError
from sfl.telemetry import log


def load_splits(settings: DataSettings, task: Task) -> Splits:
    """Read the file, drop repeats, take this device's part, at most `max_examples` of it, and split.

    Raises `DataError` for whatever is wrong with the file or its size.
    """
    found, columns = read_file(settings.path, settings, task)
    kept = drop_repeats(found) if settings.drop_repeats else found
    try:
        part = take_part(
            kept,
            settings.part_index,
            settings.part_count,
            settings.partition,
            settings.partition_alpha,
            settings.partition_seed,
        )
        if settings.max_examples is not None and len(part) > settings.max_examples:
            part = [part[i * len(part) // settings.max_examples] for i in range(settings.max_examples)]
        splits = split_examples(part, settings.split, settings.validation, settings.test)
    except DataError as error:
        raise type(error)(f"{settings.path}, {len(found)} examples, {len(kept)} after repeats: {error}") from None
    log.info(
        "%s: %d examples, %d after repeats, %d here; %d train, %d validation, %d test",
        settings.path,
        len(found),
        len(kept),
        len(part),
        len(splits.train),
        len(splits.validation),
        len(splits.test),
    )
    return replace(splits, columns=columns)
