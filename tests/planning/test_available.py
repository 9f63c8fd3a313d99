"""Free memory, from recorded trees of /proc and /sys."""

from __future__ import annotations

from pathlib import Path

from sfl.planning.available import available_memory

MEMINFO = "MemTotal:        1000000 kB\nMemFree:          200000 kB\nMemAvailable:     500000 kB\n"


def tree(root: Path, **files: str) -> Path:
    """Write files by their paths, in which `__` stands for a slash and `_DOT_` for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    tree(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    assert available_memory(tmp_path) == 512.0


def test_what_this_process_holds_already_counts(tmp_path: Path) -> None:
    status = "VmRSS:\t  300000 kB\nRssAnon:\t  100000 kB\nRssFile:\t  200000 kB\n"
    tree(tmp_path, proc__meminfo=MEMINFO, proc__self__status=status)
    assert available_memory(tmp_path) == 512.0 + 102.4


def test_version_2_counts_file_cache_as_free(tmp_path: Path) -> None:
    tree(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/box\n",
        sys__fs__cgroup__box__memory_DOT_max="400000000\n",
        sys__fs__cgroup__box__memory_DOT_current="300000000\n",
        sys__fs__cgroup__box__memory_DOT_stat="anon 100000000\ninactive_file 30000000\nactive_file 20000000\n",
    )
    assert available_memory(tmp_path) == 150.0


def test_a_group_around_may_allow_less(tmp_path: Path) -> None:
    tree(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/user/box\n",
        sys__fs__cgroup__user__memory_DOT_max="100000000\n",
        sys__fs__cgroup__user__memory_DOT_current="60000000\n",
        sys__fs__cgroup__user__box__memory_DOT_max="max\n",
        sys__fs__cgroup__user__box__memory_DOT_current="1000\n",
    )
    assert available_memory(tmp_path) == 40.0


def test_in_a_container_the_own_group_is_at_the_top(tmp_path: Path) -> None:
    tree(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/system.slice/docker-0123.scope\n",
        sys__fs__cgroup__memory_DOT_max="512000000\n",
        sys__fs__cgroup__memory_DOT_current="212000000\n",
    )
    assert available_memory(tmp_path) == 300.0


def test_version_1(tmp_path: Path) -> None:
    folder = "sys__fs__cgroup__memory__docker__0123__memory_DOT_"
    tree(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="9:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n",
        **{
            f"{folder}limit_in_bytes": "256000000\n",
            f"{folder}usage_in_bytes": "200000000\n",
            f"{folder}stat": "cache 1\ntotal_inactive_file 50000000\ntotal_active_file 0\n",
            "sys__fs__cgroup__memory__memory_DOT_limit_in_bytes": "9223372036854771712\n",
            "sys__fs__cgroup__memory__memory_DOT_usage_in_bytes": "900000000\n",
        },
    )
    assert available_memory(tmp_path) == 106.0


def test_a_group_that_is_over_its_limit_has_nothing(tmp_path: Path) -> None:
    tree(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/box\n",
        sys__fs__cgroup__box__memory_DOT_max="100\n",
        sys__fs__cgroup__box__memory_DOT_current="200\n",
    )
    assert available_memory(tmp_path) == 0.0


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_here_it_is_a_number() -> None:
    found = available_memory()
    assert found is None or 1 < found < 10**8
