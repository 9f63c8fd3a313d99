"""Real daemons with certificates: a whole run over TLS, base weights included, and what strangers are told."""

from __future__ import annotations

from pathlib import Path

from sfl.cluster.plan import Plan
from sfl.connection_settings import TlsSettings
from sfl.identity.folder import CertificateFolder, Wanted
from sfl.identity.identity import Identity
from sfl.settings import FedSettings, StrategySettings
from tests.daemons.processes import Daemons
from tests.daemons.runs import device_settings, edge_settings
from tests.flows import write_texts
from tests.tiny import save_tiny_model

STEPS = 8


def test_a_run_over_tls_and_strangers_who_get_nothing(tmp_path: Path) -> None:
    CertificateFolder.make(
        tmp_path / "certs",
        [
            Wanted(Identity("fed", "fed"), ("127.0.0.1",)),
            Wanted(Identity("edge", "edge"), ("127.0.0.1",)),
            Wanted(Identity("device", "device-1")),
        ],
    )

    def tls(name: str) -> TlsSettings:
        return TlsSettings(folder=tmp_path / "certs" / "nodes" / name)

    model = save_tiny_model(tmp_path / "model", "bert")
    device = device_settings("device-1", model, write_texts(tmp_path / "texts.txt", 120), steps=STEPS, tls=tls("device-1"))
    strategy = StrategySettings(name="fedavg", local_steps=STEPS)
    fed = FedSettings(devices=1, strategy=strategy, adapters=tmp_path / "adapters", tls=tls("fed"))
    edge = edge_settings("edge", device, cache=tmp_path / "edge-cache", tls=tls("edge"))
    plan = Plan(tmp_path / "run", fed, (edge,), (device,)).with_addresses()
    (served,) = plan.devices
    provided = served.model_dump(mode="json", exclude_none=True, exclude={"model", "task", "lora"}) | {
        "cache": str(tmp_path / "device-cache")  # of its half of the model, which its edge sends
    }
    with Daemons(tmp_path / "run", forked=True) as daemons:
        daemons.start("fed", plan.fed)
        daemons.start("edge", plan.edges[0])
        stranger = daemons.start("device", served.model_copy(update={"name": "stranger", "tls": TlsSettings()}))
        daemons.start("device", provided)
        assert daemons["device-1"].wait() == 0, daemons["device-1"].log
        assert stranger.wait() == 1  # that server may be another one later, so it is tried again
        assert "the federation server at 127.0.0.1:" in stranger.log and "wants TLS: give this node a certificate" in stranger.log
        assert {name: daemons[name].stop() for name in ("edge", "fed")} == {"edge": 0, "fed": 0}
        assert [event["bytes"] > 0 for event in daemons["device-1"].events("provision")] == [True]
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["v0", "v1"]
