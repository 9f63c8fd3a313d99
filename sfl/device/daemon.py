"""The device as a process: from its settings to its last step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sfl.device.edge_link import GrpcEdgeLink
from sfl.device.link_meter import LinkMeter
from sfl.device.prepare import PreparedDevice
from sfl.device.run import DeviceRun, Progress
from sfl.device.trainer import DeviceTrainer
from sfl.model.seeds import dropout_seed
from sfl.phases import phase
from sfl.settings import DeviceSettings
from sfl.telemetry import MetricsWriter, counted, log, peak_rss_mb
from sfl.v1.federation_pb2 import UploadPolicy
from sfl.wire.federation import FederationClient

if TYPE_CHECKING:
    from sfl.profiling.recorder import Recorder


def run(settings: DeviceSettings, recorder: Recorder | None = None) -> None:
    """Take part in one federated run. Raises the `SflError` that ends it early; what was submitted until then counts.

    A `recorder` that is recording is told what to look at.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(dropout_seed(settings.seed, settings.name, "device"))
    device = PreparedDevice.of(settings)
    uplink = LinkMeter()
    federation = FederationClient(settings.federation, settings.name, settings.wait_s, settings.give_up_s, uplink)
    try:
        federation.join(device.join_request())
        agreement = federation.agreement(settings.join_wait_s)
        with phase("tokenise"):
            plan = device.plan(agreement.labels)
        with phase("load"):
            half, slots = device.load_half()
        federation.version(0, settings.join_wait_s)  # from then on there is one
        version, state = federation.fetch_newest(device.cut)
        adapter = device.adapter(slots, state, version, agreement.policy)
        request = device.session_request(version, agreement.policy)
        link = GrpcEdgeLink(settings.edge, request, settings.wait_s, settings.give_up_s)
        try:
            with MetricsWriter(settings.out / "metrics.jsonl") as metrics:
                rank = device.rank or device.lora.rank
                metrics.write("start", name=settings.name, cut=device.cut, rank=rank, steps=settings.steps, **device.sizes())
                if recorder is not None:
                    recorder.observe(half, adapter, link.traffic, count_in_step=2)
                trainer = DeviceTrainer(half, adapter, link, settings.task, settings.micro_batch, bool(settings.tight_memory))
                traffic = (link.traffic, federation.traffic)
                training = DeviceRun(plan, trainer, agreement.policy, federation, metrics, traffic, uplink)
                _train(training, trainer, agreement.policy, federation, settings.give_up_s)
                link.close()
                federation.leave()
                metrics.write("end", **training.totals(), peak_rss_mb=round(peak_rss_mb(), 1))
                submissions = counted(training.submissions, "submission", "submissions")
                log.info("%s is done: %s, %s", settings.name, counted(training.steps, "step", "steps"), submissions)
        finally:
            link.hang_up()
    finally:
        federation.close()


def _train(
    training: DeviceRun, trainer: DeviceTrainer, policy: UploadPolicy, federation: FederationClient, give_up_s: float
) -> None:
    for progress in training:
        if progress is Progress.WAITING:  # the others' round may take all of its time, and the federation a while to answer
            federation.version(trainer.adapter.version + 1, policy.periodic.round_timeout_s + give_up_s)
