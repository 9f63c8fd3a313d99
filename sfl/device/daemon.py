"""The device as a process: from its settings to its last step."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from sfl.device.checkpoints import FOLDER, CheckpointFiles
from sfl.device.edge_link import GrpcEdgeLink
from sfl.device.link_meter import LinkMeter
from sfl.device.prepare import PreparedDevice
from sfl.device.run import DeviceRun, Progress
from sfl.device.run_plan import FederationLink, FinishedFederation
from sfl.device.run_state import RunState
from sfl.device.stop import Stopped, StopSignal
from sfl.device.trainer import DeviceTrainer, WentBack
from sfl.errors import FinishedError, RefusedError, SessionLostError, SflError, WaitedError
from sfl.model.local_adapter import values_in
from sfl.model.seeds import dropout_seed
from sfl.phases import phase
from sfl.settings import DeviceSettings
from sfl.state_file import Document
from sfl.telemetry import counted, log, peak_rss_mb
from sfl.v1.federation_pb2 import UploadPolicy
from sfl.watching.watch import Watch
from sfl.wire.federation import FederationClient
from sfl.wire.own import node_of

if TYPE_CHECKING:
    from sfl.profiling.recorder import Recorder

_LOOK_S = 30.0  # between two looks at the edge while a version is waited for


def run(settings: DeviceSettings, recorder: Recorder | None = None) -> None:
    """Take part in one federated run, or go on with it; SIGTERM and SIGINT end this process in order and not the run.

    Raises the `SflError` that ends it early; what was submitted until then counts, and a later process goes on from the last
    checkpoint. A `recorder` that is recording is told what to look at.
    """
    with Watch(settings) as watch, StopSignal() as stop:
        try:
            _run(settings, watch, stop, recorder)
        except Stopped:
            log.info("%s was told to stop; start it again with the same settings to go on", settings.name)


def _run(settings: DeviceSettings, watch: Watch, stop: StopSignal, recorder: Recorder | None) -> None:
    metrics = watch.metrics
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(dropout_seed(settings.seed, settings.name, "device"))
    node = node_of(settings, "device")
    device = PreparedDevice.of(settings)
    uplink = LinkMeter()
    with ExitStack() as opened:
        checkpoints = CheckpointFiles(settings.out / FOLDER, settings.give_up_s)
        opened.callback(checkpoints.close)
        begun = bool(checkpoints.document)
        kept = kept_in(checkpoints)
        if kept:
            watch.goes_on(kept["run"]["bytes_sent"], kept["run"]["bytes_received"])
        federation = FederationClient(
            settings.federation, settings.name, settings.wait_s, settings.give_up_s, uplink, node, lambda: stop.told
        )
        opened.callback(federation.close)
        watch.traffic("federation", federation.traffic)
        takes_part = _join(federation, device, kept)
        if checkpoints.done:
            log.info("the earlier run of %s was done: another one begins", settings.name)
        if takes_part:
            watch.report_to(federation, settings.report_s)
            opened.push(lambda kind, error, trace: watch.last_report(error))
            with phase("join"):
                agreement = federation.agreement(settings.join_wait_s)
            labels, policy = list(agreement.labels), agreement.policy
            checkpoints.require({"federation": federation.federation, **device.identity(labels, policy)})
        else:
            labels, policy = kept["identity"]["labels"], UploadPolicy.FromString(bytes.fromhex(kept["policy"]))
        with phase("tokenise"):
            plan = device.plan(labels)
        with phase("load"):
            half, slots = device.load_half()
        if takes_part:
            with phase("round"):
                federation.version(0, settings.join_wait_s)  # from then on there is one
        if kept:
            version, state = kept["version"], values_in(checkpoints.newest()[1])
        else:
            version, state = federation.fetch_newest(device.cut)
        adapter = device.adapter(slots, state, version, policy)
        link = GrpcEdgeLink(
            settings.edge,
            device.session_request(version, policy),
            settings.wait_s,
            settings.give_up_s,
            node,
            federation.served_by if takes_part else lambda edge: None,
            lambda: checkpoints.held,
            lambda: stop.told,
        )
        opened.callback(link.hang_up)
        watch.traffic("edge", link.traffic)
        rank = device.rank or device.lora.rank
        metrics.write("start", name=settings.name, cut=device.cut, rank=rank, steps=settings.steps, **device.sizes())
        if recorder is not None:
            recorder.observe(half, adapter, link.traffic, count_in_step=2)
        trainer = DeviceTrainer(half, adapter, link, settings.task, settings.micro_batch, bool(settings.tight_memory))
        traffic = (link.traffic, federation.traffic)
        around: FederationLink = federation if takes_part else FinishedFederation()
        training = DeviceRun(plan, trainer, policy, around, metrics, traffic, uplink, checkpoints=checkpoints)
        try:
            open_session(training, link, checkpoints.session, anew=begun and not kept)
            watch.ready()
            _train(training, trainer, link, federation, stop, policy.periodic.round_timeout_s + settings.give_up_s)
            link.close()
        except Stopped:
            log.info("%s stopped at step %d; start it again with the same settings to go on", settings.name, training.steps)
            return
        with stop.held():
            if takes_part:
                federation.leave()
            metrics.write("end", **training.totals(), peak_rss_mb=round(peak_rss_mb(), 1))
            checkpoints.clear()  # last: without them the next start is another run
            steps = counted(training.steps, "step", "steps")
            log.info("%s is done: %s, %s", settings.name, steps, counted(training.submissions, "submission", "submissions"))


def kept_in(checkpoints: CheckpointFiles) -> Document:
    """What an earlier process has left, if it has done a step. If not it may have been wrong settings that kept it from that,
    and nothing is lost by beginning anew."""
    if checkpoints.document and not checkpoints.document["run"]["steps"]:
        checkpoints.begin_anew()
    return checkpoints.document


def _join(federation: FederationClient, device: PreparedDevice, kept: Document) -> bool:
    """Join; False where the federation has finished in the meantime and does not need this device, which has its test to do."""
    try:
        federation.join(device.join_request())
    except RefusedError as error:
        if error.number != FinishedError.number or not kept or not RunState.restored(kept["run"], {}).sent(device.settings.steps):
            raise
        log.info("the federation has finished; what is left to do is the test")
        return False
    return True


def open_session(training: DeviceRun, link: GrpcEdgeLink, session: str | None, anew: bool = False) -> None:
    """Begin, perhaps `anew`, or go on in this session of an earlier process, as far as the edge knows it."""
    if session is None:
        training.begin(anew)
        return
    try:
        training.resume(link.resume(session))
    except SessionLostError as error:
        log.warning("%s", error)
        training.resume(None)


def _train(
    training: DeviceRun,
    trainer: DeviceTrainer,
    link: GrpcEdgeLink,
    federation: FederationClient,
    stop: StopSignal,
    version_wait_s: float,
) -> None:
    """To the end of the run. Raises `Stopped` between two steps, with device and edge at a checkpoint if they come that far."""
    waits_since = math.inf
    with stop.held():  # once for all steps: between two of them nothing is kept that came since the last checkpoint
        for done in training:
            if stop.told:
                return _pause(training, link)
            if done is not Progress.WAITING:
                waits_since = math.inf
                continue
            # The others' round may take all of its time, and the federation a while to answer.
            waits_since = min(waits_since, time.monotonic())
            left = waits_since + version_wait_s - time.monotonic()
            try:
                with phase("round"), stop.let_go():
                    federation.version(trainer.adapter.version + 1, min(left, _LOOK_S))
            except WaitedError as error:
                if left <= _LOOK_S:
                    raise WaitedError(f"{error} after {version_wait_s:g} s in all") from error
            except Stopped:
                return _pause(training, link)


def _pause(training: DeviceRun, link: GrpcEdgeLink) -> None:
    """Have device and edge keep where they are. It is not waited for: without it they are at the checkpoint before."""
    try:
        link.pause(training.checkpoint(must=False))
    except (WentBack, SflError) as error:
        log.warning("%s", error)
