"""The whole table of who may call what."""

from __future__ import annotations

from typing import Any

import pytest

from sfl.errors import RightsError, UnknownMemberError
from sfl.identity.identity import ROLES, Identity
from sfl.identity.rights import _RULES, refusal
from sfl.v1 import federation_pb2, provision_pb2, split_pb2
from sfl.v1.federation_pb2 import DEVICE, EDGE, AdapterMessage, JoinRequest, ProposalHeader, UpdateHeader
from sfl.v1.split_pb2 import DeviceMessage, Open

PI, EDGE_1, FED, ANNA = (
    Identity("device", "pi-1"),
    Identity("edge", "edge-1"),
    Identity("fed", "fed"),
    Identity("operator", "anna"),
)
EVERYBODY = (PI, EDGE_1, FED, ANNA)


def serves(device: str, edge: str) -> bool | None:
    """pi-1 has a session with edge-1, pi-2 with edge-2, and pi-3 has said nothing yet."""
    return {"pi-1": edge == "edge-1", "pi-2": edge == "edge-2"}.get(device)


def update(half: Any, device: str) -> AdapterMessage:
    return AdapterMessage(update=UpdateHeader(submission="s/1", device=device, half=half))


def proposal(edge: str) -> AdapterMessage:
    return AdapterMessage(proposal=ProposalHeader(edge=edge))


FEDERATION, TRAIN = "/sfl.v1.Federation/", "/sfl.v1.SplitTraining/Train"
# A call, what is sent, and who alone may send it.
ALLOWED: list[tuple[str, Any, tuple[Identity, ...]]] = [
    (FEDERATION + "Join", JoinRequest(name="pi-1", role=DEVICE), (PI,)),
    (FEDERATION + "Join", JoinRequest(name="edge-1", role=EDGE), (EDGE_1,)),
    (FEDERATION + "Join", JoinRequest(name="pi-1", role=EDGE), ()),
    (FEDERATION + "Join", JoinRequest(name="edge-1", role=DEVICE), ()),
    (FEDERATION + "Join", JoinRequest(name="pi-1"), ()),
    (FEDERATION + "Join", JoinRequest(name="pi-2", role=DEVICE), ()),
    (FEDERATION + "Check", JoinRequest(name="pi-1", role=DEVICE), (PI,)),
    (FEDERATION + "Check", JoinRequest(name="pi-2", role=DEVICE), ()),
    (FEDERATION + "Watch", federation_pb2.WatchRequest(name="pi-1"), (PI,)),
    (FEDERATION + "Watch", federation_pb2.WatchRequest(name="edge-1"), (EDGE_1,)),
    (FEDERATION + "Watch", federation_pb2.WatchRequest(name="anna"), ()),
    (FEDERATION + "Watch", federation_pb2.WatchRequest(), ()),
    (FEDERATION + "Propose", proposal("edge-1"), (EDGE_1,)),
    (FEDERATION + "Propose", proposal("edge-2"), ()),
    (FEDERATION + "Propose", update(EDGE, "pi-1"), ()),
    (FEDERATION + "Submit", update(DEVICE, "pi-1"), (PI,)),
    (FEDERATION + "Submit", update(DEVICE, "pi-2"), ()),
    (FEDERATION + "Submit", update(EDGE, "pi-1"), (EDGE_1,)),
    (FEDERATION + "Submit", update(EDGE, "pi-2"), ()),
    (FEDERATION + "Submit", proposal("edge-1"), ()),
    (FEDERATION + "Fetch", federation_pb2.FetchRequest(name="pi-1"), (PI,)),
    (FEDERATION + "Fetch", federation_pb2.FetchRequest(name="edge-1"), (EDGE_1,)),
    (FEDERATION + "Fetch", federation_pb2.FetchRequest(name="edge-2"), ()),
    (FEDERATION + "Leave", federation_pb2.LeaveRequest(name="pi-1"), (PI,)),
    (FEDERATION + "Leave", federation_pb2.LeaveRequest(name="edge-1"), ()),
    (FEDERATION + "Report", federation_pb2.ReportRequest(name="pi-1"), (PI,)),
    (FEDERATION + "Report", federation_pb2.ReportRequest(name="edge-1"), (EDGE_1,)),
    (FEDERATION + "Report", federation_pb2.ReportRequest(name="pi-2"), ()),
    (FEDERATION + "Status", federation_pb2.StatusRequest(), (ANNA,)),
    (TRAIN, DeviceMessage(open=Open(device="pi-1")), (PI,)),
    (TRAIN, DeviceMessage(open=Open(device="pi-2")), ()),
    (TRAIN, DeviceMessage(open=Open(device="edge-1")), ()),
    (TRAIN, DeviceMessage(step=split_pb2.Step(step=1)), (PI,)),  # the stream's session is what its opening named
    ("/sfl.v1.Provisioning/Describe", provision_pb2.DescribeRequest(device="pi-1"), (PI,)),
    ("/sfl.v1.Provisioning/Describe", provision_pb2.DescribeRequest(device="pi-2"), ()),
    ("/sfl.v1.Provisioning/Pack", provision_pb2.PackRequest(device="pi-1"), (PI,)),
    ("/sfl.v1.Provisioning/Pack", provision_pb2.PackRequest(device="edge-1"), ()),
    ("/sfl.v1.Provisioning/Read", provision_pb2.ReadRequest(device="pi-1"), (PI,)),
    ("/sfl.v1.Provisioning/Read", provision_pb2.ReadRequest(device="pi-2"), ()),
    ("/grpc.health.v1.Health/Check", object(), EVERYBODY),
    ("/grpc.health.v1.Health/Watch", object(), EVERYBODY),
    ("/sfl.v1.Federation/Unheard", object(), ()),
    ("", object(), ()),
]


@pytest.mark.parametrize(("method", "request_", "allowed"), ALLOWED, ids=lambda value: value if isinstance(value, str) else "")
def test_who_may_call_what(method: str, request_: Any, allowed: tuple[Identity, ...]) -> None:
    for who in EVERYBODY:
        error = refusal(method, who, request_, serves)
        assert (error is None) == (who in allowed), f"{who}: {error}"
        assert error is None or isinstance(error, RightsError)


def test_an_edge_is_asked_to_come_again_while_a_device_has_not_said_whose_it_is() -> None:
    error = refusal(FEDERATION + "Submit", EDGE_1, update(EDGE, "pi-3"), serves)
    assert isinstance(error, UnknownMemberError)
    assert "has not said yet" in str(error)


def test_every_call_of_every_service_is_in_the_table() -> None:
    services = [
        descriptor
        for module in (federation_pb2, split_pb2, provision_pb2)
        for descriptor in module.DESCRIPTOR.services_by_name.values()
    ]
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert methods == {method for method in _RULES if method.startswith("/sfl.")}
    assert methods <= {method for method, *_ in ALLOWED}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["pi-1", "a b", "ä/ö", "100%", "../x"])
def test_an_identity_is_its_uri_and_back(role: Any, name: str) -> None:
    identity = Identity(role, name)
    assert Identity.from_uri(identity.uri) == identity
    assert identity.uri.isascii() and identity.uri.count("/") == 3


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "sfl://",
        "sfl://device",
        "sfl://device/",
        "sfl://king/pi-1",
        "device/pi-1",
        "sfl://device/a/b",
        "sfl://device/a%2f",
        "sfl://device/a b",
    ],
)
def test_other_uris_are_no_identity(uri: str) -> None:
    assert Identity.from_uri(uri) is None
