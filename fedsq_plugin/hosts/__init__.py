"""The hosts: FedML and FLamby. They translate; the mathematics is in the core."""

from __future__ import annotations


def register() -> None:
    """Turn the plugin on in FedML. Idempotent; FedML's files are left as they are.

    From then on `federated_optimizer` knows our algorithms, `fedml.model.create` our backbones and
    `fedml.data.load` our data sets.
    """
    from .fedml.hook import register as register_in_fedml

    register_in_fedml()
