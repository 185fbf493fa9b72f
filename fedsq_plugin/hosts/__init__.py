"""The hosts: FedML and FLamby. They translate; the mathematics is in the core."""

from __future__ import annotations


def register() -> None:
    """Turn the plugin on in FedML, and in FLamby where it is installed. Idempotent; their files are left as
    they are.

    From then on `federated_optimizer` knows our algorithms, `fedml.model.create` our backbones and
    `fedml.data.load` our data sets; `flamby.strategies` knows our algorithms, and its benchmark their names.
    """
    from .fedml.hook import register as register_in_fedml
    from .flamby.hook import register as register_in_flamby

    register_in_flamby()
    register_in_fedml()
