"""What the doctor says of the way to the servers, and of joining: over real connections."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sfl.cache.cache import HalfCache
from sfl.cli.main import app
from sfl.doctor import examine as examine_module
from sfl.doctor import peers, room
from sfl.doctor.examine import examine
from sfl.doctor.finding import Finding
from sfl.doctor.peers import Server, check_clock, check_way
from sfl.edge_server.provisioning import ProvisioningService
from sfl.errors import SettingsError
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.members import Member
from sfl.fed_server.service import FederationService
from sfl.planning.apart import ChosenCut
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings
from sfl.telemetry import MetricsWriter
from sfl.v1.federation_pb2_grpc import add_FederationServicer_to_server
from sfl.v1.provision_pb2_grpc import add_ProvisioningServicer_to_server
from sfl.watching.health import Health
from sfl.wire.provision import Description
from tests.fed_server.made import federation
from tests.flows import write_texts
from tests.identity.made import Certificates, behind
from tests.provision.made import DESCRIPTION, OTHER


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has been looked at elsewhere; no planner is started."""
    monkeypatch.setattr(examine_module, "check_precisions", lambda *given: iter(()))
    monkeypatch.setattr(examine_module, "check_packages", lambda *given: iter(()))
    monkeypatch.setattr(room, "choose_cut_apart", lambda model, request, memory, cut: ChosenCut(cut or 2, 1.0))
    monkeypatch.setattr(peers, "WAIT_S", 1.0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certs"))


def provides(folder: Path, description: Description = DESCRIPTION) -> Callable[[Any], None]:
    async def pack(*given: Any) -> None:
        raise AssertionError("the doctor has nothing packed")

    def add(server: Any) -> None:
        cache = HalfCache(folder / "edge-cache", 100)
        add_ProvisioningServicer_to_server(ProvisioningService(description, cache, pack, MetricsWriter(None)), server)

    return add


def federates(fed: Federation) -> Callable[[Any], None]:
    return lambda server: add_FederationServicer_to_server(FederationService(fed), server)


@contextlib.contextmanager
def servers(folder: Path, description: Description = DESCRIPTION, devices: int = 2) -> Iterator[tuple[str, str, Federation]]:
    """The addresses of an edge server that provides and of a federation server, and the latter's federation."""
    fed = federation(folder / "versions", devices)
    with behind(None, None, provides(folder, description), Health) as edge, behind(None, None, federates(fed), Health) as address:
        yield edge, address, fed


def device(folder: Path, edge: str, address: str, **changes: Any) -> DeviceSettings:
    data = write_texts(folder / "texts.txt", 60)
    return DeviceSettings.model_validate(
        {
            "name": "pi-1",
            "edge": edge,
            "federation": address,
            "cut": 2,
            "out": str(folder / "out"),
            "cache": str(folder / "cache"),
            "data": {"path": str(data)},
            **changes,
        }
    )


def found(settings: Any, role: Any = "device") -> dict[str, Finding]:
    """The last finding of each name."""
    return {finding.name: finding for finding in examine(role, settings)}


def states(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.state for name, finding in findings.items()}


def test_all_is_well(tmp_path: Path) -> None:
    with servers(tmp_path) as (edge, address, fed):
        looked = found(device(tmp_path, edge, address))
        passed = {name for name, finding in looked.items() if finding.state == "passed"}
        steps = ("name", "route", "TLS", "service", "rights", "clock")
        assert passed >= {f"{server} server: {step}" for server in ("edge", "federation") for step in steps}
        assert passed >= {"disk of out", "certificate", "memory", "data", "model", "federation server: joining"}
        assert looked.keys() - passed <= {"processor", "disk of cache"}, "which depend on the machine"
        assert "labels Benign, C&C, DDoS" in looked["data"].found
        assert fed.joined == 0, "it has only asked"


def test_without_grpcs_health_package_the_rest_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the image of a device."""
    with servers(tmp_path) as (edge, address, _):
        monkeypatch.setitem(sys.modules, "sfl.watching.health", None)
        looked = states(found(device(tmp_path, edge, address)))
    assert {looked[f"{server} server: service"] for server in ("edge", "federation")} == {"skipped"}
    assert {looked[f"{server} server: rights"] for server in ("edge", "federation")} == {"passed"}
    assert looked["federation server: joining"] == "passed"


def test_joining_is_refused_for_the_reason_and_with_the_number_that_the_server_gives(tmp_path: Path) -> None:
    with servers(tmp_path) as (edge, address, fed):
        lora = DESCRIPTION.lora
        other = Member("edge", "edge", DESCRIPTION.task, "other", OTHER, lora, 1)
        fed.join(other)
        finding = found(device(tmp_path, edge, address))["federation server: joining"]
        assert (finding.state, finding.error) == ("failed", "SFL-602")
        assert "has another base model than edge server 'edge'" in finding.found
        assert finding.advice == "sfl errors SFL-602 says more"


def test_settings_against_the_edges(tmp_path: Path) -> None:
    with servers(tmp_path) as (edge, address, _):
        looked = found(device(tmp_path, edge, address, lora={"rank": 16}))
        assert (looked["settings"].state, looked["settings"].error) == ("failed", "SFL-106")


def test_data_that_cannot_be_read_leave_the_rest_to_be_looked_at(tmp_path: Path) -> None:
    with servers(tmp_path) as (edge, address, _):
        looked = found(device(tmp_path, edge, address, data={"path": str(tmp_path / "none.log")}))
        assert (looked["data"].state, looked["data"].error) == ("failed", "SFL-201")
        assert looked["edge server: rights"].state == "passed"
        assert looked["federation server: joining"].state == "skipped"


def test_an_edge_server_that_provides_nothing(tmp_path: Path) -> None:
    fed = federation(tmp_path / "versions", 1)
    with behind(None, None, Health) as edge, behind(None, None, federates(fed), Health) as address:
        looked = found(device(tmp_path, edge, address))
        assert (looked["edge server: rights"].state, looked["edge server: rights"].error) == ("failed", "SFL-607")
        assert looked["memory"].state == looked["federation server: joining"].state == "skipped"


def test_servers_that_are_not_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and says nothing
        quiet = f"127.0.0.1:{silent.getsockname()[1]}"
        looked = found(device(tmp_path, "no-such-host.invalid:7301", quiet, tls={"plaintext": True}))
    assert looked["certificate"].state == "warned"
    assert looked["edge server: name"].state == "failed"
    assert "'no-such-host.invalid' is not known" in looked["edge server: name"].found
    assert states(looked)["edge server: route"] == states(looked)["edge server: service"] == "skipped"
    assert states(looked)["federation server: route"] == "passed"
    assert (looked["federation server: service"].state, looked["federation server: service"].error) == ("failed", "SFL-700")


def test_without_a_certificate_nothing_outside_is_tried(tmp_path: Path) -> None:
    looked = found(device(tmp_path, "edge.example:7301", "fed.example:7300"))
    assert (looked["certificate"].state, looked["certificate"].error) == ("failed", "SFL-803")
    assert states(looked)["edge server"] == states(looked)["federation server"] == "skipped"


def test_a_port_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    way = list(check_way(Server("the edge server", address, "edge", None)))
    assert [each.state for each in way] == ["passed", "failed", "skipped", "skipped"]
    assert way[1].found == f"{address} refuses connections"
    assert "is the edge server running there" in way[1].advice


@pytest.mark.parametrize(
    ("ahead", "state", "says"),
    [
        (0.4, "passed", "ahead of this machine's by 0.4 s"),
        (-1.5, "passed", "behind this machine's by 1.5 s"),
        (40.0, "warned", "by 40.0 s"),
        (-4000.0, "failed", "by 4000.0 s"),
        (-1.7e9, "skipped", "did not tell its time"),
        (float("nan"), "skipped", "did not tell its time"),
    ],
)
def test_clocks(ahead: float, state: str, says: str) -> None:
    finding = check_clock(Server("the edge server", "127.0.0.1:1", "edge", None), ahead)
    assert finding.state == state
    assert says in finding.found


def test_a_clock_that_is_behind_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfl.edge_server import provisioning

    real = provisioning.time.time
    with servers(tmp_path) as (edge, address, _):
        monkeypatch.setattr(provisioning, "time", _Shifted(provisioning.time, real, -90.0))
        looked = found(device(tmp_path, edge, address))
    assert looked["edge server: clock"].state == "warned"
    assert "behind this machine's by 9" in looked["edge server: clock"].found


class _Shifted:
    """A module `time` whose clock is off."""

    def __init__(self, module: Any, real: Callable[[], float], by_s: float) -> None:
        self._module, self._real, self._by_s = module, real, by_s

    def time(self) -> float:
        return self._real() + self._by_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def tls(certificates: Certificates, name: str) -> dict[str, Any]:
    return {"tls": {"folder": str(certificates.folder / "nodes" / name)}}


def test_with_certificates(tmp_path: Path, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> None:
    fed = federation(tmp_path / "versions", 1)
    edge_guard, fed_guard = certificates.guard("edge-1"), certificates.guard("fed")
    with (
        behind(edge_guard, certificates.node("edge-1"), provides(tmp_path), Health) as edge,
        behind(fed_guard, certificates.node("fed"), federates(fed), Health) as address,
    ):
        looked = found(device(tmp_path, edge, address, **tls(certificates, "pi-1")))
        assert not [finding for finding in looked.values() if finding.state == "failed"]
        assert looked["certificate"].found.startswith("of device 'pi-1', valid for 36")
        assert looked["edge server: TLS"].found == "both certificates are accepted"

        swapped = found(device(tmp_path, address, edge, **tls(certificates, "pi-1")))
        assert (swapped["edge server: TLS"].state, swapped["edge server: TLS"].error) == ("failed", "SFL-802")
        assert "is federation server 'fed', and not the edge server" in swapped["edge server: TLS"].found

        named = found(device(tmp_path, edge, address, **tls(certificates, "pi-2")))
        assert (named["certificate"].state, named["certificate"].error) == ("failed", "SFL-801")
        assert states(named)["edge server"] == states(named)["federation server"] == "skipped"

        without = found(device(tmp_path, edge, address))
        assert (without["edge server: TLS"].state, without["edge server: TLS"].error) == ("failed", "SFL-802")

        strangers = Certificates(tmp_path_factory.mktemp("strangers"))
        stranger = found(device(tmp_path, edge, address, **tls(strangers, "pi-1")))
        assert stranger["edge server: TLS"].state == stranger["federation server: TLS"].state == "failed"


def test_a_certificate_that_is_about_to_expire(tmp_path: Path) -> None:
    soon = Certificates(tmp_path / "certs", days=12)
    settings = FedSettings.model_validate({"devices": 1, "out": tmp_path, "listen": "127.0.0.1:0", **tls(soon, "fed")})
    finding = found(settings, "fed")["certificate"]
    assert finding.state == "warned"
    assert finding.advice.endswith("sfl certs renew fed")


def test_a_federation_server(tmp_path: Path) -> None:
    looked = found(FedSettings(devices=1, out=tmp_path / "out", adapters=tmp_path / "adapters", listen="127.0.0.1:0"), "fed")
    assert states(looked) == dict.fromkeys(("disk of out", "disk of adapters", "certificate", "listen"), "passed")


def test_an_edge_server_with_a_model_that_is_not_there(tmp_path: Path) -> None:
    fed = federation(tmp_path / "versions", 1)
    with behind(None, None, federates(fed), Health) as address:
        settings = EdgeSettings(model=str(tmp_path / "none"), out=tmp_path, federation=address, listen="127.0.0.1:0")
        looked = found(settings, "edge")
    assert (looked["model"].state, looked["model"].error) == ("failed", "SFL-301")
    assert looked["federation server: joining"].state == "skipped"


def test_two_models_with_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfl.device.prepare import PreparedDevice
    from sfl.v1.federation_pb2 import JoinRequest

    request = JoinRequest(name="pi-1", base_model="model", model_fingerprint=OTHER)
    prepared = type("Prepared", (), {"join_request": lambda self: request})()
    monkeypatch.setattr(PreparedDevice, "of", lambda settings, splits: prepared)
    with servers(tmp_path, replace(DESCRIPTION, base_model="model")) as (edge, address, _):
        looked = found(device(tmp_path, edge, address, model="model"))
    assert (looked["model"].state, looked["model"].error) == ("failed", "SFL-602")


def test_the_command(tmp_path: Path) -> None:
    with servers(tmp_path) as (edge, address, _):
        settings = device(tmp_path, edge, address)
        flags = ["--name", "pi-1", "--edge", edge, "--federation", address, "--cut", "2", "--out", str(tmp_path / "out")]
        flags += ["--data.path", str(settings.data.path), "--cache", str(tmp_path / "cache")]
        good = CliRunner().invoke(app, ["doctor", *flags])
        assert good.exit_code == 0, good.output
        assert good.output.splitlines()[-1].split(", ")[0].endswith(" passed")
        bad = CliRunner().invoke(app, ["doctor", *flags, "--data.path", str(tmp_path / "none"), "--json"])
        assert bad.exit_code == 1
        assert [each["error"] for each in json.loads(bad.output) if each["state"] == "failed"] == ["SFL-201"]


def test_wrong_settings_are_a_line_and_the_machine_is_looked_at_all_the_same(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--config", str(tmp_path / "none.toml"), "--json"])
    assert result.exit_code == 1
    looked = json.loads(result.output)
    assert [each["error"] for each in looked if each["state"] == "failed"] == ["SFL-101"]
    assert any(each["name"] == "memory" for each in looked)
    assert isinstance(CliRunner().invoke(app, ["doctor", "toaster"]).exception, SettingsError)
