"""A node's own certificate: whatever is wrong with it is said at once, with what to do."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from sfl.cli.load_settings import load
from sfl.connection_settings import TlsSettings
from sfl.errors import CertificateTimeError, OwnCertificateError, PlaintextError, SettingsError
from sfl.identity import authority
from sfl.identity.identity import Identity
from sfl.identity.node import Node, NodeFiles
from sfl.identity.revoked import Revocations
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings
from sfl.wire.own import node_of
from tests.identity.made import Certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Another authority, with nodes of the same names."""
    return Certificates(tmp_path_factory.mktemp("others"))


def test_an_expired_certificate(tmp_path: Path) -> None:
    expired = Certificates(tmp_path, days=-0.01)
    with pytest.raises(CertificateTimeError, match=r"pi-1/node.pem cannot be used: it has expired .*`sfl certs renew NAME`"):
        expired.node("pi-1")


def test_a_certificate_of_tomorrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Certificates(tmp_path)
    monkeypatch.setattr(authority, "_EARLIER", -timedelta(hours=2))
    made.book.renew("pi-1")
    with pytest.raises(CertificateTimeError, match="it is not valid yet: is this machine's clock right"):
        made.node("pi-1")


def changed(certificates: Certificates, others: Certificates, tmp_path: Path) -> dict[str, tuple[NodeFiles, str]]:
    own, edge, foreign = certificates.files("pi-1"), certificates.files("edge-1"), others.files("pi-1")
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(b"-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    nowhere = tmp_path / "nowhere.pem"
    return {
        "another's key": (replace(own, key=edge.key), "edge-1/key.pem is not the key of the certificate"),
        "no key in the file": (replace(own, key=own.certificate), "is damaged, or not in PEM"),
        "garbage": (replace(own, certificate=garbage), "garbage.pem or .* is damaged, or not in PEM"),
        "garbage as authority": (replace(own, ca=garbage), "garbage.pem holds no certificate in PEM"),
        "no list": (replace(own, revoked=nowhere), "there is no .*nowhere.pem: copy this node's whole folder"),
        "a certificate as list": (replace(own, revoked=own.ca), "the list of revoked certificates is not that of this authority"),
        "another authority": (replace(own, ca=foreign.ca), "given out by another authority"),
        "another authority's list": (replace(own, revoked=foreign.revoked), "not that of this authority"),
        "nothing": (NodeFiles.within(tmp_path / "no"), "there is no .*no/ca.pem: copy this node's whole folder"),
    }


CASES = [
    "another's key",
    "no key in the file",
    "garbage",
    "garbage as authority",
    "no list",
    "a certificate as list",
    "another authority",
    "another authority's list",
    "nothing",
]


@pytest.mark.parametrize("case", CASES)
def test_files_that_do_not_go_together(case: str, certificates: Certificates, others: Certificates, tmp_path: Path) -> None:
    files, why = changed(certificates, others, tmp_path)[case]
    with pytest.raises(OwnCertificateError, match=why):
        Node(files)


def test_a_certificate_that_ends_soon_and_a_key_that_all_can_read_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soon = Certificates(tmp_path, days=10)
    soon.files("pi-1").key.chmod(0o644)
    with caplog.at_level(logging.WARNING, "sfl"):
        soon.node("pi-1")
    assert "the certificate of device 'pi-1' expires in 10 days" in caplog.text
    assert "key.pem can be read by others on this machine: chmod 600 it" in caplog.text


def test_renewed_files_are_taken_and_wrong_ones_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Certificates(tmp_path)
    node = made.node("edge-1")
    first = node.shown()
    assert node.shown() is first
    made.book.renew("edge-1", ("10.1.1.1",))
    second = node.shown()
    assert second is not first and "10.1.1.1" in second.hosts
    files = made.files("edge-1")
    good = files.key.read_bytes()
    files.key.write_bytes(made.files("edge-2").key.read_bytes())
    assert node.shown() is second
    assert "the renewed certificate is not used: " in caplog.text
    assert "is not the key of the certificate" in caplog.text
    files.key.unlink()
    assert node.shown() is second
    files.key.write_bytes(good)
    assert node.shown().certificate == second.certificate
    for name in ("certificate", "key"):  # another node's folder, copied over this one's
        getattr(files, name).write_bytes(getattr(made.files("edge-2"), name).read_bytes())
    assert node.shown().certificate == second.certificate
    assert "is now that of edge server 'edge-2'" in caplog.text


def test_a_list_of_revoked_certificates_is_followed_and_never_shrinks_by_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Certificates(tmp_path / "a")
    files = made.files("fed")
    serial = next(issued.serial for issued in made.book.issued() if issued.identity.name == "pi-1")
    revoked = Revocations(files.revoked, files.ca)
    assert serial not in revoked and not revoked.refresh()
    made.revoke("pi-1")
    before = files.revoked.read_bytes()
    made.revoke("pi-2")
    assert revoked.refresh() and serial in revoked
    empty = Certificates(tmp_path / "b").files("fed").revoked.read_bytes()  # signed by another authority
    for damage in (b"", b"-----BEGIN X509 CRL-----\n", empty, before):
        files.revoked.write_bytes(damage)
        assert not revoked.refresh() and serial in revoked
    files.revoked.unlink()
    assert not revoked.refresh() and serial in revoked
    assert caplog.text.count("the new list of revoked certificates is not used") == 5
    assert "is older than the list in use" in caplog.text
    with pytest.raises(OwnCertificateError, match="cannot be read"):
        Revocations(files.revoked, files.ca)


def test_the_list_of_an_authority_that_takes_over_is_used(tmp_path: Path) -> None:
    first, second = Certificates(tmp_path / "1"), Certificates(tmp_path / "2")
    first.revoke("pi-1")
    second.revoke("pi-2")
    files, fresh = first.files("fed"), second.files("fed")
    revoked = Revocations(files.revoked, files.ca)
    files.ca.write_bytes(fresh.ca.read_bytes())
    files.revoked.write_bytes(fresh.revoked.read_bytes())
    assert revoked.refresh()
    serials = {issued.identity.name: issued.serial for issued in second.book.issued()}
    assert serials["pi-2"] in revoked and serials["pi-1"] not in revoked


# From settings to who a daemon is


def device(**changes: Any) -> DeviceSettings:
    return DeviceSettings.model_validate({"name": "pi-1", "data": {"path": "none"}, **changes})


def test_loopback_needs_no_certificate() -> None:
    assert node_of(device(edge="localhost:7301", federation="[::1]:7300"), "device") is None
    assert node_of(FedSettings(devices=1, listen="127.0.0.2:1"), "fed") is None


@pytest.mark.parametrize(
    ("settings", "role", "named"),
    [
        (device(edge="10.0.0.2:7301"), "device", "nothing protects what passes between machines at edge = 10.0.0.2:7301: make"),
        (
            device(edge="edge.lan:7301", federation="fed.lan:7300"),
            "device",
            "at federation = fed.lan:7300 and edge = edge.lan:7301:",
        ),
        (FedSettings(devices=1, listen="0.0.0.0:7300"), "fed", "listen = 0.0.0.0:7300"),
        (FedSettings(devices=1, listen="[::]:7300"), "fed", r"listen = \[::\]:7300"),
        (EdgeSettings(model="m", listen="127.0.0.1:1", federation="fed:7300"), "edge", "federation = fed:7300"),
    ],
)
def test_other_addresses_need_one_or_the_word_that_gives_it_up(
    settings: Any, role: Any, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PlaintextError, match=named) as raised:
        node_of(settings, role)
    for what in ("`sfl certs make`", "tls.folder", "tls.plaintext = true", "read and change activations, labels and adapters"):
        assert what in str(raised.value)
    plain = settings.model_copy(update={"tls": TlsSettings(plaintext=True)})
    assert node_of(plain, role) is None
    assert "without TLS (tls.plaintext): anyone on the way can read and change" in caplog.text


def test_a_certificate_must_be_this_daemons_own(certificates: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    folder = certificates.folder / "nodes"
    node = node_of(device(tls={"folder": folder / "pi-1"}), "device")
    assert node is not None and node.identity == Identity("device", "pi-1")
    with pytest.raises(OwnCertificateError, match=r"is the certificate of device 'pi-2', but this daemon's name is 'pi-1'"):
        node_of(device(tls={"folder": folder / "pi-2"}), "device")
    with pytest.raises(OwnCertificateError, match=r"is the certificate of edge server 'edge-1', but this is a device"):
        node_of(device(name="edge-1", tls={"folder": folder / "edge-1"}), "device")
    listening = FedSettings(devices=1, listen="10.7.7.7:7300", tls=TlsSettings(folder=folder / "fed"))
    assert node_of(listening, "fed") is not None
    assert "is not for '10.7.7.7', on which it listens" in caplog.text


@pytest.mark.parametrize(
    ("tls", "why"),
    [
        ({"folder": "f", "plaintext": True}, "tls.plaintext = true goes without a certificate, but tls.folder name one"),
        ({"certificate": "c"}, "tls.certificate without tls.ca and tls.key and tls.revoked: give all four, or tls.folder"),
        ({"certificate": "c", "key": "k", "ca": "a"}, "without tls.revoked"),
        ({"key": "k", "plaintext": True}, "tls.key name one: remove either"),
    ],
)
def test_settings_that_contradict_each_other(tls: dict[str, Any], why: str, tmp_path: Path) -> None:
    arguments = [f"--tls.{name}" if value is True else f"--tls.{name}={value}" for name, value in tls.items()]
    with pytest.raises(SettingsError, match=why):
        load(FedSettings, None, ["--devices", "1", *arguments], environment={})


def test_single_files_override_those_of_the_folder() -> None:
    files = TlsSettings(folder=Path("f"), key=Path("/run/secrets/key")).files
    assert files == NodeFiles(Path("f/ca.pem"), Path("f/node.pem"), Path("/run/secrets/key"), Path("f/revoked.crl"))
    assert TlsSettings().files is None


def test_a_largest_request_is_not_above_what_may_be_in_flight() -> None:
    with pytest.raises(SettingsError, match=r"limits.request_mb = 500 is above limits.in_flight_mb = 100: raise that too"):
        load(FedSettings, None, ["--devices=1", "--limits.request-mb=500", "--limits.in-flight-mb=100"], environment={})
