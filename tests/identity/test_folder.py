"""What `sfl certs` writes, and refuses to write."""

from __future__ import annotations

import os
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509

from sfl.errors import OwnCertificateError, SettingsError
from sfl.identity.folder import CertificateFolder, Wanted
from sfl.identity.identity import Identity
from sfl.identity.node import Node, NodeFiles
from tests.identity.made import ROLES, Certificates, wanted


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_are_for_their_owner_alone_and_the_authoritys_goes_to_no_node(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "certs"
    Certificates(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 3 + 5 * len(ROLES)
    assert {mode(path) for path in files} == {0o600}
    assert {mode(path) for path in folder.rglob("*") if path.is_dir()} | {mode(folder)} == {0o700}
    authority = (folder / "authority" / "key.pem").read_bytes()
    for name in ROLES:
        node = folder / "nodes" / name
        assert {path.name for path in node.iterdir()} == {"ca.pem", "node.pem", "key.pem", "revoked.crl"}
        assert authority not in {path.read_bytes() for path in node.iterdir()}


def test_certificates_hold_all_names_and_what_they_are_for(tmp_path: Path) -> None:
    made = CertificateFolder.make(tmp_path, [wanted("edge-1", "10.0.0.2", "edge.lan"), wanted("pi-1")], days=30)
    edge, device = (Node(NodeFiles.within(tmp_path / "nodes" / name)) for name in ("edge-1", "pi-1"))
    assert edge.identity == Identity("edge", "edge-1") and device.identity == Identity("device", "pi-1")
    assert {"10.0.0.2", "edge.lan", "edge-1", "localhost", "127.0.0.1"} <= set(edge.shown().hosts)
    assert device.shown().hosts == ()
    for node, usages in ((edge, 2), (device, 1)):
        certificate = x509.load_pem_x509_certificate(node.shown().certificate)
        assert len(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == usages
        assert certificate.public_key().public_numbers().curve.name == "secp256r1"  # type: ignore[union-attr]
    (first, _) = made.issued()
    assert timedelta(days=29) < first.until - datetime.now(timezone.utc) <= timedelta(days=30)


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    made = CertificateFolder.make(tmp_path, [wanted("pi-1")], authority_days=10, days=400)
    (issued,) = made.issued()
    assert issued.until - datetime.now(timezone.utc) <= timedelta(days=10)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Wanted(Identity("edge", "e")), "has no address: say where others find it, as in --edge e=10.0.0.1,e.lan"),
        (Wanted(Identity("device", "d"), ("10.0.0.1",)), "nobody dials a device: leave out =10.0.0.1"),
        (Wanted(Identity("device", "a/b")), "is no name for a node"),
        (Wanted(Identity("device", "..")), "is no name for a node"),
        (Wanted(Identity("device", " ")), "is no name for a node"),
        (Wanted(Identity("device", "x" * 101)), "longer than 100"),
        (Wanted(Identity("fed", "f"), ("10.0.0.300",)), "'10.0.0.300' of federation server 'f' is no host"),
        (Wanted(Identity("fed", "f"), ("10.0.0.1:7300",)), "without a port"),
        (Wanted(Identity("fed", "f"), ("",)), "is no host"),
        (wanted("pi-1"), "'pi-1' is given twice"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(bad: Wanted, why: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=why):
        CertificateFolder.make(tmp_path / "certs", [wanted("pi-1"), bad])
    assert not (tmp_path / "certs").exists()


def test_there_is_one_authority_in_a_folder(tmp_path: Path) -> None:
    Certificates(tmp_path)
    with pytest.raises(SettingsError, match="holds an authority already: add nodes with `sfl certs add`"):
        Certificates(tmp_path)
    with pytest.raises(SettingsError, match=r"holds no authority .* make one with `sfl certs make --out"):
        CertificateFolder.open(tmp_path / "elsewhere")


def test_what_was_broken_off_is_made_anew(tmp_path: Path) -> None:
    Certificates(tmp_path)
    (tmp_path / "authority" / "ca.pem").unlink()  # it is written last
    again = Certificates(tmp_path)
    assert [issued.identity.name for issued in again.book.issued()] == sorted(ROLES)
    assert again.node("pi-1").identity.name == "pi-1"


def test_a_renewed_certificate_replaces_the_earlier_one_which_stays_valid(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    before = certificates.node("edge-1").shown()
    certificates.book.renew("edge-1")
    after = certificates.node("edge-1").shown()
    assert after.certificate != before.certificate and after.key != before.key
    assert set(after.hosts) == set(before.hosts)
    states = [issued.state for issued in CertificateFolder.open(tmp_path).issued() if issued.identity.name == "edge-1"]
    assert states == ["replaced", "valid"]
    certificates.book.renew("edge-1", ("10.9.9.9",))
    assert "10.9.9.9" in certificates.node("edge-1").shown().hosts
    with pytest.raises(SettingsError, match="there is no node 'pi-7'"):
        certificates.book.renew("pi-7")


def test_revoking_takes_all_of_a_nodes_certificates_and_frees_its_name(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    book = certificates.book
    book.renew("pi-1")
    with pytest.raises(SettingsError, match="the name 'pi-1' is that of device 'pi-1'"):
        book.add([wanted("pi-1")])
    assert len(book.revoke("pi-1")) == 2
    assert book.revoke("pi-1") == []
    assert {issued.state for issued in book.issued() if issued.identity.name == "pi-1"} == {"revoked"}
    lists = {path.read_bytes() for path in tmp_path.rglob("revoked.crl")}
    assert len(lists) == 1, "every node's folder has the new list"
    with pytest.raises(OwnCertificateError, match="it is revoked: only a new one"):
        certificates.node("pi-1")
    with pytest.raises(SettingsError, match="is revoked: make a new one"):
        book.renew("pi-1")
    book.revoke("pi-2")
    book.add([wanted("pi-1")])
    assert certificates.node("pi-1").identity.name == "pi-1"
    revoked = [issued.identity.name for issued in book.issued() if issued.state == "revoked"]
    assert revoked == ["pi-1", "pi-1", "pi-2"]


def test_what_was_revoked_stays_so_when_the_power_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = Certificates(tmp_path)
    on_disk: list[tuple[int, bool]] = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        on_disk.append((os.fstat(descriptor).st_ino, path.is_dir() and not (path / ".revoked.crl.tmp").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    certificates.book.revoke("pi-1")
    folders = [path.parent for path in tmp_path.rglob("revoked.crl")]
    assert len(folders) == 1 + len(ROLES)
    assert {folder.stat().st_ino for folder in folders} == {inode for inode, renamed in on_disk if renamed}
