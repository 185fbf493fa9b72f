"""FedML's own attacks, defences and privacy: when they are on, and what of them cannot be had."""

from __future__ import annotations

import re
from typing import Any

from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy
from fedml.core.security.attack.label_flipping_attack import LabelFlippingAttack
from fedml.core.security.fedml_attacker import FedMLAttacker
from fedml.core.security.fedml_defender import FedMLDefender

from ...errors import ConfigError, nearest
from ...federation.algorithm import AVERAGE
from ...federation.local import trains
from ...federation.server import Server
from ...run.plan import Plan

_ONE_WEIGHT = (
    "weighs silos by the set of their sample counts: silos with equal counts share one weight, "
    "and as many of the last ones are left out"
)
_BY_SIZE = "drops the silos with the most and the fewest samples, whatever they sent"
LESS_THAN_ITS_NAME = {
    **dict.fromkeys(("rfa", "geo_median"), _ONE_WEIGHT),
    **dict.fromkeys(("trimmed_mean", "slsgd"), _BY_SIZE),
}
"""What FedML 0.9.6's defences do that their names do not say."""

KINDS = {
    "enable_attack": ("attack_type", ("byzantine", "label_flipping", "model_replacement", "dlg")),
    "enable_defense": (
        "defense_type",
        (
            *("norm_diff_clipping", "krum", "multikrum", "trimmed_mean", "rfa", "geo_median", "wise_median"),
            *("cclip", "slsgd", "crfl", "foolsgold", "3sigma", "3sigma_geo", "3sigma_foolsgold"),
            "anomaly_detection",
        ),
    ),
    "enable_dp": ("dp_solution_type", ("cdp", "ldp")),
}
"""What FedML 0.9.6 can do, by the option that turns it on."""

WITHOUT_EFFECT = ("weak_dp", "robust_learning_rate", "nbafl", "dp_clip")
"""What FedML 0.9.6 takes and never calls: the run would be the unprotected one."""


def check_options(args: Any) -> None:
    """Raise ConfigError where FedML's security options would do nothing, or end in a trace."""
    for switch, (key, known) in KINDS.items():
        if not getattr(args, switch, False):
            continue
        kind = str(getattr(args, key, None)).strip()
        if kind in WITHOUT_EFFECT:
            raise ConfigError(f"{key} {kind}: FedML 0.9.6 knows it and never calls it; use one of {', '.join(known)}")
        if kind not in known:
            raise ConfigError(f"{switch} is true, and {key} is '{kind}'{nearest(kind, known)}")
    if getattr(args, "enable_dp", False) and getattr(args, "enable_rdp_accountant", False):
        raise ConfigError("enable_rdp_accountant: FedML 0.9.6's accountant cannot start; set it to false")
    for part in (FedMLAttacker, FedMLDefender, FedMLDifferentialPrivacy):
        try:
            part.get_instance().init(args)
        except Exception as error:
            missing = re.search(r"no attribute '(\w+)'", str(error))
            said = f"the option {missing[1]} is missing" if missing else str(error)
            raise ConfigError(f"FedML's {part.__name__} cannot start: {said}") from None


def security_enabled() -> bool:
    """Whether FedML's attack, defence or privacy code is on in this process."""
    parts = (FedMLAttacker, FedMLDefender, FedMLDifferentialPrivacy)
    return any(part.get_instance().is_enabled for part in parts)


def check_security(server: Server, plan: Plan) -> None:
    """Raise ConfigError where an algorithm does not go with what is on; warn of what protects less than it seems."""
    name, parts = plan.algorithm.name, plan.algorithm.phases.parts
    sums = any(not trains(parts(plan.options, n)) for n in range(plan.config.comm_round))
    if security_enabled() and (server.separate or sums):
        raise ConfigError(
            f"{name} does not send one model per silo to one average, which is what FedML's attack, "
            "defence and privacy options work on; turn off enable_attack, enable_defense and enable_dp"
        )
    privacy, defender = FedMLDifferentialPrivacy.get_instance(), FedMLDefender.get_instance()
    if privacy.is_global_dp_enabled() and plan.algorithm.server is not AVERAGE:
        raise ConfigError(
            f"{name}: FedML's central privacy adds noise to the model after the server's step, whose memory "
            "would stay without it; use an algorithm whose server rule is 'average', or turn off enable_dp"
        )
    if defender.is_enabled and defender.defense_type in LESS_THAN_ITS_NAME:
        kind = defender.defense_type
        plan.note(f"defense_type {kind}: FedML 0.9.6's own {LESS_THAN_ITS_NAME[kind]}")


def label_flipping() -> LabelFlippingAttack | None:
    """FedML's attack on the silos' data, where it is on."""
    attacker = FedMLAttacker.get_instance()
    found = attacker.attacker if attacker.is_enabled else None
    return found if isinstance(found, LabelFlippingAttack) else None
