"""Daemons as processes of their own, forked from one that has imported torch: an import for each would take minutes in all.

What a forked daemon does not test:

- its imports: torch is there from the start, in the federation server, too, and so is what another daemon imports, whether it
  imports that itself or not; nothing shows that a device's settings, provisioning and plan come before torch;
- its entry point: `main` is called as a function, not as `sfl` or `python -m sfl.cli.main`;
- what is read once, when a library is loaded, such as OMP_NUM_THREADS and GOMP_SPINCOUNT: it is that of the first process;
- its memory, most of which it shares with that one, and how long its start takes, or a signal in the middle of it.

So some tests take daemons that are not forked: in this folder test_killed, test_auto_cut and test_separate_machines, and
tests/provision/test_daemons.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sfl.cli.main import main
from tests.daemons.environment import ENVIRONMENT

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = "tests.daemons.preloaded"
_CONTEXT.set_forkserver_preload([_PRELOADED, __name__])


def _run(arguments: Sequence[str], stdout: Path, stderr: Path) -> None:
    """The whole of `sfl ARGUMENTS` in this process; ends it."""
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    cold = {_PRELOADED, "torch"} - sys.modules.keys()
    if cold:  # a fork server passes over what it cannot import, and each daemon would then import it itself
        sys.exit(f"this daemon was forked from a process that has not imported {' and '.join(sorted(cold))}")
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    sys.argv = ["sfl", *arguments]
    main()


class Forked:
    """`sfl ARGUMENTS` with its output in files, to be handled as a `subprocess.Popen`; ends with this process at the latest."""

    def __init__(self, arguments: Sequence[str], stdout: Path, stderr: Path) -> None:
        self._process = _CONTEXT.Process(target=_run, args=(arguments, stdout, stderr), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
