"""`sfl certs` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfl.cli.certs import app
from sfl.errors import SettingsError
from sfl.identity.identity import Identity
from sfl.identity.node import Node, NodeFiles

ALL = ["--fed", "fed=10.0.0.1,fed.lan", "--edge", "edge-1=10.0.0.2", "--device", "pi-1", "--device", "pi-2", "--operator", "anna"]


def certs(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, SettingsError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def states(out: Path) -> list[tuple[str, str, str]]:
    return [(each["name"], each["role"], each["state"]) for each in json.loads(certs("list", "--out", str(out), "--json"))]


def test_from_the_first_certificate_to_a_revoked_one(tmp_path: Path) -> None:
    out = tmp_path / "certs"
    said = certs("make", "--out", str(out), *ALL)
    for name in ("fed", "edge-1", "pi-1", "pi-2", "anna"):
        assert f"{out}/nodes/{name}: copy this folder to {name}" in said
    assert f"{out}/authority signs certificates" in said
    node = Node(NodeFiles.within(out / "nodes" / "fed"))
    assert node.identity == Identity("fed", "fed") and {"10.0.0.1", "fed.lan"} <= set(node.shown().hosts)
    certs("add", "--out", str(out), "--device", "pi-3", "--days", "30")
    certs("renew", "edge-1=10.0.0.9", "pi-1", "--out", str(out))
    assert "10.0.0.9" in Node(NodeFiles.within(out / "nodes" / "edge-1")).shown().hosts
    said = certs("revoke", "pi-2", "pi-3", "--out", str(out))
    assert "pi-2: 1 revoked" in said and f"copy {out}/authority/revoked.crl to the federation server" in said
    assert "pi-2: was revoked before" in certs("revoke", "pi-2", "--out", str(out))
    assert states(out) == [
        ("anna", "operator", "valid"),
        ("edge-1", "edge", "replaced"),
        ("edge-1", "edge", "valid"),
        ("fed", "fed", "valid"),
        ("pi-1", "device", "replaced"),
        ("pi-1", "device", "valid"),
        ("pi-2", "device", "revoked"),
        ("pi-3", "device", "revoked"),
    ]
    table = certs("list", "--out", str(out))
    assert "fed.lan" in table and "replaced" in table and "UTC" in table


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["make", "--edge", "edge-1"], "edge server 'edge-1' has no address"),
        (["make", "--edge", "edge-1="], "names no address after the equals sign"),
        (["make", "--device", "pi-1=10.0.0.1"], "nobody dials a device"),
        (["add", "--device", "pi-1"], "holds no authority"),
        (["add"], "say for whom: --fed, --edge, --device or --operator"),
        (["revoke", "pi-1"], "holds no authority"),
        (["list"], "holds no authority"),
    ],
)
def test_mistakes_are_named(arguments: list[str], why: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=why):
        certs(*arguments, "--out", str(tmp_path / "certs"))
    assert not (tmp_path / "certs").exists()
