"""Resident bytes of tensors, to the page."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from sfl.profiling.resident import resident

pytestmark = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's /proc/self/pagemap")
PAGE = mmap.PAGESIZE


def mapped(path: Path, pages: int) -> torch.Tensor:
    """A file of zeros, mapped and not touched."""
    path.write_bytes(b"\0" * PAGE * pages)
    storage = torch.UntypedStorage.from_file(str(path), False, PAGE * pages)
    return torch.tensor([], dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


def resident_by_smaps(suffix: str) -> int:
    """Resident bytes of the mapped file whose path ends so."""
    inside, kilobytes = False, 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(suffix)
        elif inside and line.startswith("Rss:"):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024


def test_of_a_mapped_file_only_what_was_touched(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "weights", 1024)
    before = resident([tensor])
    assert before is not None and before.total == 0
    tensor[500 * PAGE].item()
    after = resident([tensor])
    assert after is not None
    # The kernel maps what it likes around the page that was touched, and says so itself.
    assert PAGE <= after.total < tensor.nbytes
    assert after.total == resident_by_smaps("/weights")
    assert after.of_files == after.total
    part = resident([tensor[500 * PAGE + 10 : 500 * PAGE + 110]])
    assert part is not None and part.total == 100


def test_each_byte_once_and_none_of_a_file() -> None:
    tensor = torch.ones(1_000_000)
    twice = resident([tensor, tensor[:10], tensor.view(1000, 1000).t()])
    assert twice is not None and twice == (tensor.nbytes, 0)
    assert resident([torch.empty(0), torch.empty(5, device="meta")]) == (0, 0)


def test_not_measured_where_it_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules["sfl.profiling.resident"].__dict__, "open", refuse)
    assert resident([torch.ones(10)]) is None
