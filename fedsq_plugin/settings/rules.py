"""Rules between options, which are each valid by themselves."""

from __future__ import annotations

from collections.abc import Collection

from ..federation.options import Rule


def _silos(
    client_num_per_round: int, client_num_in_total: int, dataset: str = "", brings_silos: Collection[str] = ()
) -> str | None:
    if client_num_per_round <= client_num_in_total or dataset in brings_silos:
        return None
    return f"client_num_per_round is {client_num_per_round}, more than client_num_in_total {client_num_in_total}"


def _weights(warm_start_file: str | None, warm_start: str) -> str | None:
    if warm_start == "file" and not warm_start_file:
        return "warm_start is 'file': warm_start_file must name the weights"
    if warm_start != "file" and warm_start_file:
        return f"warm_start_file is given but warm_start is '{warm_start}'; set warm_start: file"
    return None


def _gates(keep_gates: bool, augmentation: tuple[str, ...]) -> str | None:
    if keep_gates and augmentation:
        return "keep_gates is for images that come again; it does not go with augmentation"
    return None


def _tls(tls_cert: str | None, tls_key: str | None, tls_ca: str | None) -> str | None:
    given = {"tls_cert": tls_cert, "tls_key": tls_key, "tls_ca": tls_ca}
    missing = [key for key, path in given.items() if not path]
    if 0 < len(missing) < len(given):
        return f"tls_cert, tls_key and tls_ca go together: {' and '.join(missing)} is missing"
    return None


def _tls_backend(tls_cert: str | None, backend: str) -> str | None:
    # In one process there is nothing to encrypt; elsewhere nobody shall believe that it is.
    if tls_cert and backend not in ("sp", "GRPC"):
        return f"tls_cert is given, but only backend GRPC has TLS, and backend is {backend}"
    return None


def _nesterov(nesterov: bool, momentum: float, client_optimizer: str) -> str | None:
    if nesterov and (momentum == 0 or client_optimizer != "sgd"):
        return "nesterov needs client_optimizer sgd and a momentum above 0"
    return None


def _resume(resume: bool, checkpoint_dir: str | None) -> str | None:
    if resume and checkpoint_dir is None:
        return "resume needs checkpoint_dir, the folder of the run's checkpoints (or: fedsq run --resume DIR)"
    return None


RULES: tuple[Rule, ...] = (_silos, _weights, _gates, _tls, _tls_backend, _nesterov, _resume)
"""The first parameter of a rule is the option to mend."""
