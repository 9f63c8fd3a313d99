"""Daemons as processes of their own, forked from one that has imported torch: an import for each would take minutes in all."""

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
_CONTEXT.set_forkserver_preload(["tests.daemons.preloaded", __name__])


def _run(arguments: Sequence[str], stdout: Path, stderr: Path) -> None:
    """The whole of `sfl ARGUMENTS` in this process; ends it."""
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
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
