"""FedAvg and FedProx: synchronous rounds, weights by the size of the devices' data."""

from __future__ import annotations

from sfl.fed_server.strategies.base import Rounds


class FedAvg(Rounds):
    """theta <- theta + sum over k of |D_k| / |D| * delta theta_k, every `local_steps` steps of each device.

    With the deltas taken from one common theta that is the average of the devices' adapters (equations 1 and 2 of the GSFS
    paper).
    """


class FedProx(FedAvg):
    """FedAvg of devices that minimise loss + mu / 2 * ||theta_k - theta||^2, theta being the version they began with
    (Li et al. 2020). The policy carries mu, and both halves add mu (theta_k - theta) to their gradient."""
