"""A stranger, a revoked node, or one that speaks under another's name gets nothing from any service."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from sfl.adapters.state import device_half, edge_half
from sfl.errors import RefusedError, UnknownMemberError, UnreachableError
from sfl.identity.node import Node
from sfl.v1 import federation_pb2 as pb
from sfl.v1 import provision_pb2
from sfl.v1.federation_pb2_grpc import FederationStub
from sfl.v1.provision_pb2_grpc import ProvisioningStub
from sfl.v1.split_pb2 import DeviceMessage
from sfl.v1.split_pb2_grpc import SplitTrainingStub
from sfl.watching.health import Health, require_serving
from sfl.wire import guard as guard_module
from sfl.wire.adapters import to_tensors
from sfl.wire.federation import FederationClient
from sfl.wire.frames import Traffic, frames
from sfl.wire.split import open_to_wire
from tests.edge_server.made import eventually
from tests.fed_server.made import LAYERS, adapter
from tests.fed_server.test_service import join_request, update
from tests.identity.made import Certificates, behind, dialled, refused
from tests.identity.services import edge_server, federation_server, linked

PROPOSAL = pb.ProposalHeader(edge="edge-1", blocks="model.layers", head=["score"], num_layers=LAYERS)
WITHIN_S = 5.0  # in which the open calls of a revoked node must have ended


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "certs")


def half(name: str, side: Any) -> Any:
    """The frames of one half of an update of `name`."""
    part = (device_half if side == pb.DEVICE else edge_half)(adapter(1), 1)
    return frames(pb.AdapterMessage(update=update(name, side)), to_tensors(part), Traffic())


def drained(replies: Any) -> list[Any]:
    return list(replies)


# What a device may ask the federation server for, here all under the name of pi-2.
FEDERATION_CALLS: dict[str, Callable[[FederationStub], Any]] = {
    "Join": lambda stub: stub.Join(join_request("pi-2"), timeout=5),
    "Check": lambda stub: stub.Check(join_request("pi-2"), timeout=5),
    "Watch": lambda stub: drained(stub.Watch(pb.WatchRequest(name="pi-2"), timeout=5)),
    "Submit": lambda stub: stub.Submit(half("pi-2", pb.DEVICE), timeout=5),
    "Submit the other half": lambda stub: stub.Submit(half("pi-2", pb.EDGE), timeout=5),
    "Propose": lambda stub: stub.Propose(frames(pb.AdapterMessage(proposal=PROPOSAL), [], Traffic()), timeout=5),
    "Fetch": lambda stub: drained(stub.Fetch(pb.FetchRequest(name="pi-2"), timeout=5)),
    "Leave": lambda stub: stub.Leave(pb.LeaveRequest(name="pi-2"), timeout=5),
    "Report": lambda stub: stub.Report(pb.ReportRequest(name="pi-2"), timeout=5),
    "Status": lambda stub: stub.Status(pb.StatusRequest(), timeout=5),
}
HALF = provision_pb2.Half(source="c" * 64, cut=2, precision="int8")


def edge_calls(request: Any) -> dict[str, Callable[[grpc.Channel], Any]]:
    """What a device may ask an edge server for, under the name that `request` has."""
    name, opening = request.device, DeviceMessage(open=open_to_wire(request))
    return {
        "Train": lambda channel: drained(SplitTrainingStub(channel).Train(iter([opening]), timeout=5)),
        "Describe": lambda channel: ProvisioningStub(channel).Describe(provision_pb2.DescribeRequest(device=name), timeout=5),
        "Pack": lambda channel: drained(
            ProvisioningStub(channel).Pack(provision_pb2.PackRequest(device=name, half=HALF), timeout=5)
        ),
        "Read": lambda channel: drained(
            ProvisioningStub(channel).Read(provision_pb2.ReadRequest(device=name, half=HALF, file="x", length=1), timeout=5)
        ),
    }


def test_a_device_gets_nothing_under_another_name(certificates: Certificates, tmp_path: Path) -> None:
    pi_1, pi_2 = certificates.node("pi-1"), certificates.node("pi-2")
    with federation_server(tmp_path / "fed", certificates) as (address, fed, guard):
        with dialled(address, pi_1) as channel:
            for name, call in FEDERATION_CALLS.items():
                status, why = refused(lambda call=call: call(FederationStub(channel)))
                assert status == "PERMISSION_DENIED" and "device 'pi-1'" in why, name
        assert fed.joined == 0 and fed.version is None and guard.refused == len(FEDERATION_CALLS)
        with dialled(address, pi_2) as channel:  # whose name it is
            FEDERATION_CALLS["Join"](FederationStub(channel))
        assert fed.joined == 1
    with edge_server(tmp_path, certificates) as (address, halves, guard):
        calls = edge_calls(halves.request("pi-2"))
        with dialled(address, pi_1) as channel:
            for name, call in calls.items():
                status, why = refused(lambda call=call: call(channel))
                assert status == "PERMISSION_DENIED" and "cannot speak as 'pi-2'" in why, name
        assert halves.engine.devices() == [] and guard.refused == len(calls)
        with dialled(address, pi_2) as channel:
            assert calls["Describe"](channel).source == "c" * 64
            assert [message.WhichOneof("body") for message in calls["Train"](channel)] == ["opened"]


def test_a_revoked_node_gets_nothing(certificates: Certificates, tmp_path: Path) -> None:
    nodes = {name: certificates.node(name) for name in ("pi-2", "edge-1", "anna")}  # before they know
    for name in nodes:
        certificates.revoke(name)
    certificates.book.renew("edge-2")
    with federation_server(tmp_path / "fed", certificates) as (address, fed, _):
        for name, node in nodes.items():
            with raw(address, node) as channel:
                for call in FEDERATION_CALLS.values():
                    status, why = refused(lambda call=call: call(FederationStub(channel)))
                    assert status == "PERMISSION_DENIED" and f"'{name}' is revoked" in why
        assert fed.joined == 0


def raw(address: str, node: Node) -> grpc.Channel:
    """Without a look at what is there: it would find out that it is revoked itself."""
    shown = node.shown()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(shown.ca, shown.key, shown.certificate))


def test_an_operator_may_look_and_no_more_and_only_operators_may(certificates: Certificates, tmp_path: Path) -> None:
    with federation_server(tmp_path / "fed", certificates) as (address, fed, _):
        with dialled(address, certificates.node("anna")) as channel:
            stub = FederationStub(channel)
            assert stub.Status(pb.StatusRequest(), timeout=5).expected == 2
            assert refused(lambda: stub.Join(join_request("anna"), timeout=5))[0] == "PERMISSION_DENIED"
        for name in ("pi-1", "edge-1", "fed"):
            with dialled(address, certificates.node(name)) as channel:
                status, why = refused(lambda: FederationStub(channel).Status(pb.StatusRequest(), timeout=5))
                assert status == "PERMISSION_DENIED" and "is for operators only" in why
        assert fed.joined == 0


def test_a_node_revoked_in_the_middle_is_out_within_seconds_and_others_go_on(certificates: Certificates, tmp_path: Path) -> None:
    nodes = {name: certificates.node(name) for name in ("pi-1", "pi-2")}
    with (
        federation_server(tmp_path / "fed", certificates) as (fed_address, fed, _),
        edge_server(tmp_path, certificates) as (edge_address, halves, _),
    ):
        watches = {name: FederationClient(fed_address, name, 5, 5, node=node) for name, node in nodes.items()}
        links = {name: linked(edge_address, halves.request(name), node) for name, node in nodes.items()}
        try:
            for name in nodes:
                watches[name].join(join_request(name))
                links[name].step(1, 0, halves.batch(1))
            certificates.revoke("pi-1")
            started = time.monotonic()
            with pytest.raises(RefusedError, match="the certificate of device 'pi-1' is revoked") as raised:
                while time.monotonic() - started < WITHIN_S:  # its watch is a stream that nobody writes to
                    assert watches["pi-1"].finished is False
                    time.sleep(0.05)
            assert raised.value.number == 801
            time.sleep(2 * guard_module.LOOK_S)
            with pytest.raises(RefusedError, match="the certificate of device 'pi-1' is revoked"):
                links["pi-1"].step(2, 0, halves.batch(2))
            assert halves.engine.resume(halves.request("pi-1")).last_step == 1  # type: ignore[union-attr]
            assert links["pi-2"].step(2, 0, halves.batch(2)).step == 2
            assert watches["pi-2"].finished is False
            assert fed.joined == 2  # it was a member, and counts as one that went away
        finally:
            for end in (*(link.hang_up for link in links.values()), *(watch.close for watch in watches.values())):
                end()


def test_an_expired_certificate_ends_open_calls_until_a_renewed_one_is_shown(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later_s = 0.0  # by the server's clock
    clock = SimpleNamespace(time=lambda: time.time() + later_s, monotonic=time.monotonic)
    monkeypatch.setattr(guard_module, "time", clock)
    monkeypatch.setattr(guard_module, "LOOK_S", 0.1)
    certificates.book.renew("pi-1", days=60)
    with federation_server(tmp_path / "fed", certificates) as (address, _, guard):
        watch = FederationClient(address, "pi-1", 5, 20, node=certificates.node("pi-1"))
        try:
            watch.join(join_request("pi-1"))
            time.sleep(0.3)
            assert guard.refused == 0
            later_s = 61 * 86400.0
            eventually(lambda: guard.refused > 0)  # its watch was ended, which is no failure yet: the client tries again
            assert watch.finished is False
            certificates.book.renew("pi-1")
            time.sleep(1.5)  # it has tried again
            ended = guard.refused
            time.sleep(1.5)
            assert watch.finished is False and guard.refused == ended
        finally:
            watch.close()


def test_an_edge_submits_only_for_devices_that_have_a_session_there(certificates: Certificates, tmp_path: Path) -> None:
    nodes = {name: certificates.node(name) for name in ("pi-1", "edge-1", "edge-2")}
    with federation_server(tmp_path / "fed", certificates, devices=1) as (address, fed, _):
        pi_1, edge_1, edge_2 = (FederationClient(address, name, 5, 10, node=node) for name, node in nodes.items())
        try:
            for client, request in (
                (pi_1, join_request("pi-1")),
                (edge_1, join_request("edge-1", pb.EDGE)),
                (edge_2, join_request("edge-2", pb.EDGE)),
            ):
                client.join(request)
            assert edge_1.propose(PROPOSAL, adapter(0))
            pi_1.submit(update("pi-1", pb.DEVICE), device_half(adapter(1), 1))
            other = edge_half(adapter(1), 1)
            # Nobody has said yet whose the device is: the edge is to come again, and does.
            with dialled(address, nodes["edge-1"]) as channel:
                status, why = refused(lambda: FederationStub(channel).Submit(half("pi-1", pb.EDGE), timeout=5))
                assert status == "UNAVAILABLE" and "'pi-1' has not said yet which edge server" in why
            with pytest.raises(UnknownMemberError, match="'pi-1' has not said yet"):
                edge_1.submit(update("pi-1", pb.EDGE), other)
            pi_1.served_by("edge-1")
            with pytest.raises(RefusedError, match="edge server 'edge-2' cannot submit for device 'pi-1'") as raised:
                edge_2.submit(update("pi-1", pb.EDGE), other)
            assert raised.value.number == 804
            edge_1.submit(update("pi-1", pb.EDGE), other)
            assert fed.submissions == 1
            pi_1.served_by("edge-2")  # it moves, and what it did before still counts
            for submission, edge in (("2", edge_1), ("3", edge_2)):
                edge.submit(update("pi-1", pb.EDGE, submission=submission), other)
        finally:
            for client in (pi_1, edge_1, edge_2):
                client.close()


def test_a_device_learns_its_edge_servers_name(certificates: Certificates, tmp_path: Path) -> None:
    heard: list[str] = []
    with edge_server(tmp_path, certificates) as (address, halves, _):
        link = linked(address, halves.request("pi-1"), certificates.node("pi-1"), heard.append)
        link.hang_up()
    assert heard == ["edge-1"]


def test_an_unheard_of_call_is_answered_as_such(certificates: Certificates, tmp_path: Path) -> None:
    with (
        federation_server(tmp_path / "fed", certificates) as (address, _, _),
        dialled(address, certificates.node("pi-1")) as channel,
    ):
        assert refused(lambda: channel.unary_unary("/sfl.v1.Federation/Nothing")(b"", timeout=5))[0] == "UNIMPLEMENTED"


def test_a_certificate_of_the_authority_that_names_no_node_gets_nothing(certificates: Certificates, tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    from sfl.identity import authority
    from sfl.identity.identity import Identity

    made = certificates.book._authority
    key, _ = made.issue(Identity("device", "pi-1"))
    builder = authority._builder(authority._name("pi-1"), made.certificate.subject, key, 10)
    usage = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(usage, False).add_extension(x509.SubjectAlternativeName([x509.DNSName("pi-1")]), False)
    certificate = builder.sign(made.key, hashes.SHA256())
    credentials = grpc.ssl_channel_credentials(
        certificates.files("pi-1").ca.read_bytes(), authority.pem_of(key), authority.pem_of(certificate)
    )
    with federation_server(tmp_path / "fed", certificates) as (address, fed, _):
        with grpc.secure_channel(address, credentials) as channel:
            status, why = refused(lambda: FederationStub(channel).Join(join_request("pi-1"), timeout=5))
        assert status == "PERMISSION_DENIED" and "was not made by `sfl certs`" in why and fed.joined == 0


def test_without_tls_nobody_is_asked(tmp_path: Path) -> None:
    with federation_server(tmp_path / "fed", None) as (address, fed, _), dialled(address, None) as channel:
        FederationStub(channel).Join(join_request("anybody"), timeout=5)
        assert fed.joined == 1
        assert not isinstance(FederationStub(channel).Status(pb.StatusRequest(), timeout=5), UnreachableError)


def test_every_node_may_ask_how_a_server_is_and_no_stranger(certificates: Certificates) -> None:
    def add(server: Any) -> None:
        health.append(Health(server))

    health: list[Health] = []
    with behind(certificates.guard("edge-1"), certificates.node("edge-1"), add) as address:
        for name in ("pi-1", "anna", "edge-1"):
            with (
                dialled(address, certificates.node(name)) as channel,
                pytest.raises(RefusedError, match="has no service 'nothing'"),
            ):
                require_serving(channel, "the edge server", "nothing", 5)
        shown = certificates.node("pi-1").shown()
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(shown.ca)) as channel, pytest.raises(UnreachableError):
            require_serving(channel, "the edge server", "", 5)
