"""Who may watch, where nodes have certificates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfl.cli.main import app
from sfl.errors import OwnCertificateError, PeerIdentityError, PlaintextError, RefusedError
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.service import FederationService
from sfl.v1 import federation_pb2 as pb
from sfl.v1.federation_pb2_grpc import FederationStub, add_FederationServicer_to_server
from sfl.watching.health import Health
from tests.fed_server.made import federation
from tests.fed_server.test_service import join_request
from tests.identity.made import Certificates, behind, dialled, refused


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture
def fed(tmp_path: Path) -> Federation:
    return federation(tmp_path, 2)


@pytest.fixture
def address(certificates: Certificates, fed: Federation) -> Iterator[str]:
    def add(server: object) -> None:
        add_FederationServicer_to_server(FederationService(fed), server)

    with behind(certificates.guard("fed", serves=fed.serves), certificates.node("fed"), add, Health) as made:
        yield made


def folder(certificates: Certificates, name: str) -> str:
    return str(certificates.folder / "nodes" / name)


def sfl(*arguments: str) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, arguments)
    return result.output, result.exception


def test_an_operator_sees_the_federation_and_nobody_else_does(address: str, certificates: Certificates) -> None:
    shown, error = sfl("status", "--federation", address, "--tls.folder", folder(certificates, "anna"))
    assert error is None
    assert "waiting for devices: 0 of 2 have joined" in shown
    for name in ("pi-1", "edge-1"):
        _, error = sfl("status", "--federation", address, "--tls.folder", folder(certificates, name))
        assert isinstance(error, RefusedError)
        assert error.code == "SFL-804"


def test_without_a_certificate_nothing_is_told(address: str, tmp_path: Path) -> None:
    assert isinstance(sfl("status", "--federation", address)[1], PeerIdentityError)
    error = sfl("health", address)[1]
    assert isinstance(error, PeerIdentityError) and str(error).startswith(f"the server at {address} wants TLS: ")
    assert isinstance(sfl("status", "--federation", "fed.example:7300")[1], PlaintextError)
    assert isinstance(sfl("status", "--federation", address, "--tls.folder", str(tmp_path))[1], OwnCertificateError)


def test_every_node_may_ask_whether_a_server_serves(
    address: str, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("anna", "pi-1", "edge-1", "fed"):
        assert sfl("health", address, "--tls.folder", folder(certificates, name)) == ("serving\n", None)
    monkeypatch.setenv("SFL_TLS__FOLDER", folder(certificates, "fed"))
    assert sfl("health", address) == ("serving\n", None)


def test_members_report_and_ask_for_themselves_alone(address: str, certificates: Certificates, fed: Federation) -> None:
    with dialled(address, certificates.node("pi-1")) as channel:
        stub = FederationStub(channel)
        stub.Join(join_request("pi-1"), timeout=10)
        stub.Report(pb.ReportRequest(name="pi-1", activity="training", steps=3), timeout=10)
        for call in (
            lambda: stub.Report(pb.ReportRequest(name="pi-2", activity="training"), timeout=10),
            lambda: stub.Check(join_request("pi-2"), timeout=10),
            lambda: stub.Status(pb.StatusRequest(), timeout=10),
        ):
            assert refused(call)[0] == "PERMISSION_DENIED"
        assert not stub.Check(join_request("pi-1"), timeout=10).refusal
    with dialled(address, certificates.node("anna")) as channel:
        (member,) = FederationStub(channel).Status(pb.StatusRequest(), timeout=10).members
    assert (member.name, member.report.steps) == ("pi-1", 3)
