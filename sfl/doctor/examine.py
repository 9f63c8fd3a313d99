"""What is looked at for each kind of daemon, and in which order: first this machine, then the way to each server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfl.cache.cache import HalfCache, default_folder
from sfl.cache.key import HalfKey
from sfl.data.load import load_splits
from sfl.data.split import Splits
from sfl.device.provision import agreed
from sfl.doctor.finding import Finding, broke, passed, see_page, skipped, warned
from sfl.doctor.kernels import check_precisions
from sfl.doctor.packages import NOT_ON_A_DEVICE, check_packages
from sfl.doctor.peers import WAIT_S, Server, check_clock, check_way, timed
from sfl.doctor.processor import check_processor
from sfl.doctor.room import check_device_disks, check_disk, check_memory, check_plan
from sfl.errors import ModelDiffersError, NotProvidedError, SflError, error_code
from sfl.identity.node import Node
from sfl.planning.apart import ChosenCut
from sfl.settings import DaemonSettings, DeviceSettings, EdgeSettings, FedSettings
from sfl.v1 import federation_pb2
from sfl.wire.adapters import lora_to_wire
from sfl.wire.channel import check_listen
from sfl.wire.federation import FederationClient
from sfl.wire.own import node_of
from sfl.wire.provision import Description, ProvisioningClient

_RENEW_DAYS = 30.0

Role = Literal["device", "edge", "fed"]
EDGE, FEDERATION = "the edge server", "the federation server"


def examine(role: Role, settings: DaemonSettings | None) -> Iterator[Finding]:
    """All checks for a daemon with these settings; without settings those of the machine alone."""
    if role == "fed" and not isinstance(settings, FedSettings):
        yield from check_packages(())
        yield from check_disk("out", Path())
    elif isinstance(settings, FedSettings):
        yield from _examine_fed(settings)
    elif isinstance(settings, EdgeSettings):
        yield from _examine_edge(settings)
    elif isinstance(settings, DeviceSettings):
        yield from _examine_device(settings)
    else:
        yield from check_packages(("train",), NOT_ON_A_DEVICE)
        yield from check_processor()
        yield from check_precisions()
        yield check_memory()
        yield from check_disk("out", Path())


def _examine_fed(settings: FedSettings) -> Iterator[Finding]:
    yield from check_packages(("dp",) if settings.privacy.epsilon else ())
    yield from check_disk("out", settings.out)
    if settings.adapters is not None:
        yield from check_disk("adapters", settings.adapters)
    own = _Own.of(settings, "fed")
    yield own.finding
    yield _listen(settings.listen)


def _examine_edge(settings: EdgeSettings) -> Iterator[Finding]:
    yield from _examine_worker(settings)
    yield from check_disk("out", settings.out)
    yield check_memory()
    if settings.provide:
        yield from check_disk("cache", settings.cache or default_folder("edge"), settings.cache_limit_mb, must=False)
    yield _listen(settings.listen)
    own = _Own.of(settings, "edge")
    yield own.finding
    request: federation_pb2.JoinRequest | None = None
    try:
        request = _edge_request(settings)
        yield passed("model", f"{settings.model}, fingerprint {request.model_fingerprint[:12]}")
    except SflError as error:
        yield broke("model", error)
    yield from _examine_federation(settings.federation, settings.name, own, request)


def _examine_device(settings: DeviceSettings) -> Iterator[Finding]:
    yield from _examine_worker(settings)
    own = _Own.of(settings, "device")
    yield own.finding
    described: list[Description] = []
    yield from _examine_edge_server(settings, own, described)
    description = described[0] if described else None
    if description is not None and settings.model is None:
        try:
            settings = agreed(settings, description)
        except SflError as error:
            yield broke("settings", error)
    splits: Splits | None = None
    try:
        splits = load_splits(settings.data, settings.task)
        yield passed("data", _counted(splits))
    except SflError as error:
        yield broke("data", error)
    model = settings.model or (description.config if description is not None else None)
    chosen: ChosenCut | None = None
    if model is None:
        yield skipped("memory", "the edge server has not told which model it is about")
    else:
        lowest = 1 if description is None else description.lowest_cut
        finding, chosen = check_plan(settings, model, lowest)
        yield finding
        if settings.cut == "auto":
            settings = settings.model_copy(update={"cut": lowest if chosen is None else chosen.cut})
    yield from check_device_disks(settings, chosen, _provided(settings, description))
    request: federation_pb2.JoinRequest | None = None
    if splits is not None:
        try:
            request = _device_request(settings, splits, description)
            if request is not None:
                yield _model(request, description)
        except SflError as error:
            yield broke("model", error)
    yield from _examine_federation(settings.federation, settings.name, own, request)


def _examine_worker(settings: DeviceSettings | EdgeSettings) -> Iterator[Finding]:
    may_lack = NOT_ON_A_DEVICE if isinstance(settings, DeviceSettings) else ()
    yield from check_packages(("train", "quant") if settings.precision == "nf4" else ("train",), may_lack)
    yield from check_processor(settings.compute_format if settings.run_on == "cpu" else None)
    yield from check_precisions(settings.precision, settings.run_on)


def _examine_edge_server(settings: DeviceSettings, own: _Own, described: list[Description]) -> Iterator[Finding]:
    """The way to the edge server, and what it describes, which is appended."""
    if own.broken:
        yield skipped("edge server", "not tried without a certificate")
        return
    server = Server(EDGE, settings.edge, "edge", own.node)
    way = list(check_way(server))
    yield from way
    if any(each.state == "failed" for each in way):
        return
    name = server.name("rights")
    try:
        client = ProvisioningClient(settings.edge, settings.name, WAIT_S, own.node)
        try:
            description, ahead = timed(client.describe, lambda reply: reply.time)
        finally:
            client.close()
    except NotProvidedError as error:
        yield broke(name, error) if settings.model is None else passed(name, "it provides no model; this device has its own")
    except SflError as error:
        yield broke(name, error)
    else:
        described.append(description)
        yield passed(name, f"{description.edge} trains {description.base_model}, {description.task}, and told so")
        yield check_clock(server, ahead)


def _examine_federation(address: str, name: str, own: _Own, request: federation_pb2.JoinRequest | None) -> Iterator[Finding]:
    if own.broken:
        yield skipped("federation server", "not tried without a certificate")
        return
    server = Server(FEDERATION, address, "fed", own.node)
    way = list(check_way(server))
    yield from way
    if any(each.state == "failed" for each in way):
        return
    joining = server.name("joining")
    if request is None:
        yield skipped(joining, "what this daemon would join with is not known, for the reasons above")
        return
    try:
        client = FederationClient(address, name, WAIT_S, WAIT_S, node=own.node)
        try:
            reply, ahead = timed(lambda: client.check(request), lambda reply: reply.time)
        finally:
            client.close()
    except SflError as error:
        yield broke(server.name("rights"), error)
        return
    yield passed(server.name("rights"), f"'{name}' may join")
    yield check_clock(server, ahead)
    if reply.refusal:
        code = error_code(reply.error)
        yield Finding("failed", joining, reply.refusal, see_page(code), code)
    else:
        yield passed(joining, "this daemon goes with those that have joined")


@dataclass(frozen=True)
class _Own:
    """This daemon's own certificate."""

    finding: Finding
    node: Node | None

    @property
    def broken(self) -> bool:
        """Whether it should have one and has none that works."""
        return self.finding.state == "failed"

    @classmethod
    def of(cls, settings: DaemonSettings, role: Role) -> _Own:
        try:
            node = node_of(settings, role)
        except SflError as error:
            return cls(broke("certificate", error), None)
        if node is not None:
            days = (node.shown().until - time.time()) / 86400
            line = f"of {node.identity}, valid for {days:.0f} more days"
            if days < _RENEW_DAYS:
                return cls(warned("certificate", line, f"renew it where it was made: sfl certs renew {node.identity.name}"), node)
            return cls(passed("certificate", line), node)
        if settings.tls.plaintext:
            advice = "make certificates with `sfl certs make`, and name this node's folder with tls.folder"
            return cls(warned("certificate", "none, as tls.plaintext says", advice), None)
        return cls(passed("certificate", "none is needed within this machine"), None)


def _listen(address: str) -> Finding:
    try:
        check_listen(address)
    except SflError as error:
        advice = "no matter if it is this very daemon that listens there already; otherwise choose another `listen`"
        return warned("listen", str(error), advice)
    return passed("listen", f"{address} is free")


def _counted(splits: Splits) -> str:
    sizes = f"{len(splits.train)} examples to train on, {len(splits.validation)} to validate, {len(splits.test)} to test"
    return f"{sizes}; labels {', '.join(splits.labels) or 'none'}"


def _model(request: federation_pb2.JoinRequest, description: Description | None) -> Finding:
    mine = request.model_fingerprint
    if description is None:
        return passed("model", f"{request.base_model}, fingerprint {mine[:12]}")
    if mine != description.fingerprint:
        code = error_code(ModelDiffersError.number)
        theirs = f"{description.fingerprint[:12]} of {description.base_model} at edge server {description.edge}"
        why = f"fingerprint {mine[:12]} of {request.base_model} here, {theirs}"
        return Finding("failed", "model", why, f"give both the same files; {see_page(code)}", code)
    return passed("model", f"{request.base_model}, fingerprint {mine[:12]}, that of edge server {description.edge}")


def _device_request(
    settings: DeviceSettings, splits: Splits, description: Description | None
) -> federation_pb2.JoinRequest | None:
    """What the device would join with; None where the edge server has not told which model it provides."""
    if settings.model is not None:
        from sfl.device.prepare import PreparedDevice

        return PreparedDevice.of(settings, splits).join_request()
    if description is None:
        return None
    rank = settings.rank or description.lora.rank
    return federation_pb2.JoinRequest(
        name=settings.name,
        role=federation_pb2.DEVICE,
        task=settings.task,
        base_model=description.base_model,
        model_fingerprint=description.fingerprint,
        lora=lora_to_wire(description.lora),
        cut=int(settings.cut),
        examples=len(splits.train),
        labels=splits.labels if settings.task == "classification" else (),
        columns=splits.columns,
        max_length=settings.max_length,
        rank=0 if rank == description.lora.rank else rank,
    )


def _provided(settings: DeviceSettings, description: Description | None) -> Path | None:
    """Where the half that the edge server provides is kept once it was fetched."""
    if description is None or settings.model is not None or settings.cut == "auto":
        return None
    cache = HalfCache(settings.cache or default_folder("device"), settings.cache_limit_mb)
    return cache.model(HalfKey(description.source, settings.cut, settings.precision))


def _edge_request(settings: EdgeSettings) -> federation_pb2.JoinRequest:
    from sfl.model.fingerprint import model_fingerprint
    from sfl.model.load import load_config
    from sfl.model.lora import resolve_targets

    config = load_config(settings.model)
    return federation_pb2.JoinRequest(
        name=settings.name,
        role=federation_pb2.EDGE,
        task=settings.task,
        base_model=settings.model,
        model_fingerprint=model_fingerprint(settings.model),
        lora=lora_to_wire(resolve_targets(config, settings.lora.spec())),
        cut=settings.lowest_cut,
    )
