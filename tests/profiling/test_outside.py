"""A real child process, looked at from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfl.errors import SettingsError
from sfl.profiling.outside import look_at, mapped_parts
from sfl.profiling.result import Profile

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")

SCRIPT = """
import mmap, sys
file = open(sys.argv[1], "rb")
weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
seen = sum(weights[::4096])
own = bytearray(b"x") * 50_000_000
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(8_000_000))
    command = [sys.executable, "-c", SCRIPT, str(weights)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_parts_of_a_running_process(child: subprocess.Popen[str]) -> None:
    looks = []
    profile = look_at(child.pid, 0.35, on_look=lambda: looks.append(1))
    assert profile.kind == "process" and len(looks) == len(profile.rss) >= 3
    parts = {part.name: part.mb for part in profile.parts}
    assert parts["model files"] == pytest.approx(8.0, abs=0.01)
    assert 50 <= parts["anonymous"] <= 60
    assert parts["program and libraries"] > 1 and parts["heap"] > 0 and parts["main stack"] > 0
    assert sum(parts.values()) == pytest.approx(profile.rss[-1][1], abs=0.5)
    last = profile.moments["at the last look"]
    assert last.uss_mb is not None and last.pss_mb is not None and last.rss_mb is not None
    assert 50 < last.uss_mb <= last.pss_mb <= last.rss_mb
    assert profile.settings["peak_since_start_mb"] >= profile.peak.rss_mb - 0.5
    assert profile.settings["command"].startswith(sys.executable)
    assert Profile.from_json(profile.to_json()) == profile


def test_a_process_that_ends_meanwhile(child: subprocess.Popen[str]) -> None:
    def end() -> None:
        child.kill()
        child.wait()

    profile = look_at(child.pid, 30.0, on_look=end)
    assert len(profile.rss) == 1


def test_who_is_not_there(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    with pytest.raises(SettingsError, match=f"there is no process {child.pid}"):
        look_at(child.pid, 1.0)
    with pytest.raises(SettingsError, match="there is no process 0"):
        look_at(0, 1.0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_who_belongs_to_another(child: subprocess.Popen[str]) -> None:
    script = f"""
import os
from sfl.errors import SettingsError
from sfl.profiling.outside import look_at
os.setuid(65534)
try:
    look_at({child.pid}, 1.0)
except SettingsError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == f"process {child.pid} may not be read by this user: run this as its owner or as root\n"


SMAPS = """55d0c0a00000-55d0c0c00000 r--p 00000000 08:02 111 /usr/bin/python3.11
Size:               2048 kB
Rss:                1000 kB
55d0c2000000-55d0c3000000 rw-p 00000000 00:00 0                          [heap]
Rss:                2000 kB
7f0000000000-7f0004000000 r--s 00000000 08:02 222 /data/my models/model-00001.safetensors
Rss:                3000 kB
7f0005000000-7f0006000000 rw-s 00000000 00:01 333 /memfd:pool (deleted)
Rss:                 400 kB
7f0007000000-7f0008000000 rw-p 00000000 00:00 0
Rss:                5000 kB
7f0008000000-7f0008100000 rw-p 00100000 08:02 444 /opt/venv/lib/libtorch_cpu.so.2
Rss:                 600 kB
7f0009000000-7f0009100000 r--p 00000000 08:02 555 /usr/lib/locale/locale-archive
Rss:                  70 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
Rss:                  80 kB
7ffc000f0000-7ffc000f2000 r-xp 00000000 00:00 0                          [vdso]
Rss:                   8 kB
"""


def test_what_is_what_among_mappings(tmp_path: Path) -> None:
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/smaps").write_text(SMAPS, encoding="ascii")
    kilobytes = {part.name: round(part.mb * 1e6 / 1024) for part in mapped_parts(7, tmp_path) if part.mb is not None}
    assert kilobytes == {
        "program and libraries": 1600,
        "model files": 3000,
        "other files": 70,
        "heap": 2000,
        "anonymous": 5008,
        "main stack": 80,
        "shared memory": 400,
    }
