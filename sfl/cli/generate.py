"""`sfl generate`: a seeded Zeek log to try things out with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfl.errors import DataError


def generate(
    out: Annotated[Path, typer.Option(help="file to write; replaced if it exists")],
    flows: Annotated[int, typer.Option(min=1, help="number of flows")] = 5000,
    profile: Annotated[str, typer.Option(help="what kind of device the log is from: camera, hub or lock")] = "camera",
    seed: Annotated[int, typer.Option(min=0, help="equal seeds give equal files")] = 0,
) -> None:
    """Write a labelled Zeek log (conn.log.labeled) of made-up traffic over one day."""
    from sfl.data.generate import PROFILES, generate_log

    if profile not in PROFILES:
        raise DataError(f"there is no profile '{profile}': choose among {', '.join(PROFILES)}")
    generate_log(out, flows, PROFILES[profile], seed)
    typer.echo(f"{flows} flows of a {profile} in {out}")
