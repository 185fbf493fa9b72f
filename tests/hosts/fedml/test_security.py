"""FedML's attacks, defences and privacy under our aggregator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsq_plugin.errors import ConfigError, UpdateError
from fedsq_plugin.federation.state import State, fingerprint

from .conftest import SECURITY, MakeArgs, final, network, silos, simulate

BYZANTINE = {"enable_attack": True, "attack_type": "byzantine"}
DEFENDED, PRIVATE = {"enable_defense": True}, {"enable_dp": True, "epsilon": 0.9, "delta": 0.1}


@pytest.mark.parametrize("name", SECURITY)
def test_fedmls_security_is_in_force_with_batch_normalisation(
    name: str, fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    sizes = (16, 16, 24, 24, 40)[: SECURITY[name].get("client_num_in_total", 3)]
    np.random.seed(0)
    plain = simulate(
        fedml, make_args(comm_round=1, **{k: v for k, v in SECURITY[name].items() if "client" in k}), silos(sizes)
    )
    secured = simulate(fedml, make_args(comm_round=1, **SECURITY[name]), silos(sizes))
    state = final(secured)
    assert fingerprint(state) != fingerprint(final(plain))
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in network().state_dict().items()}
    assert (state["1.running_var"] >= 0).all()
    assert int(state["1.num_batches_tracked"]) == int(final(plain)["1.num_batches_tracked"])


@pytest.mark.parametrize("name", ["norm clipping", "krum", "central privacy", "local privacy"])
def test_mask_of_infinities_changes_nothing_of_fedmls_security(
    name: str, fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    def run(masked: bool) -> State:
        model = network()
        if masked:
            model[1].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        np.random.seed(0)
        sizes = (16, 16, 24, 24, 40)[: SECURITY[name].get("client_num_in_total", 3)]
        return final(simulate(fedml, make_args(comm_round=2, **SECURITY[name]), silos(sizes), model))

    masked = run(True)
    assert masked.pop("1.mask").tolist() == [0.0, -torch.inf]
    assert fingerprint(masked) == fingerprint(run(False))


def test_norm_clipping_bounds_the_update(fedml: Any, make_args: MakeArgs, unsecured: Any) -> None:
    before = network().state_dict()
    run = simulate(fedml, make_args(comm_round=1, **SECURITY["norm clipping"]))
    trained = [k for k, v in network().named_parameters()]
    moved = torch.cat([(final(run)[k] - before[k]).flatten() for k in trained]).norm()
    assert 0 < float(moved) <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({**DEFENDED, "defense_type": "weak_dp", "stddev": 1.0}, "weak_dp: FedML 0.9.6 knows it and never"),
        ({**PRIVATE, "dp_solution_type": "nbafl", "C": 1.0}, "nbafl: FedML 0.9.6 knows it and never"),
        ({**DEFENDED, "defense_type": "krun"}, "defense_type is 'krun'.*krum"),
        ({**DEFENDED}, "enable_defense is true, and defense_type is 'None'"),
        ({**BYZANTINE, "attack_type": "byzantin"}, "attack_type is 'byzantin'.*byzantine"),
        ({**BYZANTINE}, "FedMLAttacker cannot start: the option byzantine_client_num is missing"),
        ({**DEFENDED, "defense_type": "krum"}, "FedMLDefender cannot start: .*byzantine_client_num is miss"),
        (
            {**PRIVATE, "dp_solution_type": "cdp", "mechanism_type": "gaussian", "sensitivity": 1.0} | {"epsilon": 2.0},
            "FedMLDifferentialPrivacy cannot start: Epsilon cannot be greater than 1",
        ),
        ({**PRIVATE, "dp_solution_type": "cdp", "enable_rdp_accountant": True}, "FedML 0.9.6's accountant"),
    ],
)
def test_security_options_that_would_do_nothing_or_end_in_a_trace(
    options: dict[str, Any], line: str, fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    with pytest.raises(ConfigError, match=line):
        simulate(fedml, make_args(comm_round=1, **options))


def test_a_defence_that_fails_by_itself_is_an_error_of_the_round(
    fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    """FedML's coordinate-wise median miscounts where a model has BatchNorm."""
    args = make_args(comm_round=1, enable_defense=True, defense_type="wise_median")
    with pytest.raises(UpdateError, match="round 1: aggregating 3 updates failed: RuntimeError: shape"):
        simulate(fedml, args)


def test_an_update_that_a_defence_gives_no_weight_is_left_out() -> None:
    from fedsq_plugin.hosts.fedml.adapters import weighted_mean

    states = [{"a": torch.tensor([value])} for value in (1.0, 100.0)]
    assert weighted_mean(None, [(0.5, states[0]), (0.0, states[1])])["a"].tolist() == [1.0]


@pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 24, 24)])
def test_what_fedmls_rfa_makes_of_silos_of_one_size_is_said(
    sizes: tuple[int, ...], fedml: Any, make_args: MakeArgs, unsecured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps one weight per count, so that the last silos have none, whatever they send."""
    results = []
    for seed in (0, 1):  # of the last silo's data alone
        data = silos(sizes)
        data[5][2] = silos(sizes, seed=seed)[5][2]
        results.append(final(simulate(fedml, make_args(comm_round=1, **SECURITY["rfa"]), data)))
    floats = [key for key, value in results[0].items() if value.is_floating_point()]
    assert all(torch.equal(results[0][key], results[1][key]) for key in floats)
    assert "defense_type rfa: FedML 0.9.6's own weighs silos by the set of their sample" in caplog.text


def test_privacy_of_one_run_does_not_reach_the_next(fedml: Any, make_args: MakeArgs, unsecured: Any) -> None:
    first = fingerprint(final(simulate(fedml, make_args(comm_round=1))))
    simulate(fedml, make_args(comm_round=1, **SECURITY["central privacy"]))
    assert fingerprint(final(simulate(fedml, make_args(comm_round=1)))) == first


def test_a_defence_with_too_few_updates_left_is_an_error_of_the_round(
    fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    data = silos((16, 16, 24, 24, 40))
    data[5][1].dataset.tensors[0][0, 0] = float("nan")
    with pytest.raises(UpdateError, match="round 1: aggregating 4 updates failed: byzantine_client_num"):
        simulate(fedml, make_args(comm_round=1, **SECURITY["krum"]), data)
