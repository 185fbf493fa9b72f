"""ReLU-isation at the warm start, through FedML's real `sp`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError, GateError
from fedsq_plugin.federation.state import fingerprint
from fedsq_plugin.hosts.fedml.dataset import from_tuple

from .conftest import MakeArgs

GELUNET = {
    **{"model": "gelunet", "comm_round": 1, "threads": 1, "warm_start": "public", "warm_start_public": 0.3},
    **{"warm_start_epochs": 3, "warm_start_learning_rate": 0.02, "relu_ise": True},
    **{"relu_ise_learn_epochs": 1, "relu_ise_harden_epochs": 2},
}


def started(fedml: Any, args: Any) -> Any:
    """A runner, ready to run."""
    device = fedml.device.get_device(args)
    dataset, classes = fedml.data.load(args)
    return fedml.FedMLRunner(args, device, dataset, fedml.model.create(args, classes)), dataset


def test_fedsq_runs_on_a_gelu_network(fedml: Any, make_args: MakeArgs, tmp_path: Path) -> None:
    args = make_args(**GELUNET, warm_start_cache_dir=str(tmp_path / "cache"))
    runner, _ = started(fedml, args)
    done, model = runner.reluised, runner.runner.aggregator.model
    assert isinstance(model, DualCopy)
    kinds = {type(module) for module in model.modules()}
    assert nn.ReLU in kinds and nn.GELU not in kinds
    assert [len(done.history), sorted(done.target)] == [4, sorted(done.learned)]
    # λ* = √(2/π)/ε = 0.79788/0.01 for GELU.
    assert all(value == pytest.approx(79.788, abs=1e-3) for value in done.target.values())
    assert done.history[-1] == pytest.approx(done.target)
    records: list[Any] = []
    runner.runner.on_round = records.append
    runner.run()
    assert records[0].metrics.accuracy > 0.5


def test_the_second_time_it_comes_from_the_cache(
    fedml: Any, make_args: MakeArgs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    with caplog.at_level("INFO", logger="fedsq_plugin"):
        for _ in range(2):
            args = make_args(**GELUNET, warm_start_cache_dir=str(tmp_path / "cache"))
            runner, _ = started(fedml, args)
            found.append((runner.reluised, fingerprint(runner.runner.aggregator.model.state_dict())))
    assert found[0] == found[1]
    lines = [r.getMessage() for r in caplog.records if "ReLU-isation" in r.getMessage()]
    assert ["(read from the cache)" in line for line in lines] == [False, True]


def test_what_it_is_measured_on_is_held_by_nobody(fedml: Any, make_args: MakeArgs, tmp_path: Path) -> None:
    args = make_args(**GELUNET, warm_start_cache_dir=str(tmp_path / "cache"))
    dataset, _ = fedml.data.load(args)
    data = from_tuple(dataset, args.dataset)
    parts = [set(batches.dataset.indices) for batches in data.train.values()]
    parts += [set(data.public.dataset.indices), set(data.validation.dataset.indices)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1348  # 1,797 digits less a quarter, 449
    assert len(data.validation.dataset) == 404 // 5  # of 0.3 · 1348 = 404 public samples


def test_a_smooth_network_without_it_is_refused_with_the_way_out(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(model="gelunet", comm_round=1)
    with pytest.raises(GateError, match=r"GELU has no fixed linear gate; .*relu_ise: true"):
        started(fedml, args)


def test_a_network_without_smooth_activations_is_refused(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(**{**GELUNET, "model": "resnet18", "small_images": True, "warm_start": "none"})
    with pytest.raises(ConfigError, match=r"no nn\.GELU, nn\.SiLU or nn\.Hardswish"):
        started(fedml, args)


def test_a_gated_name_of_a_smooth_network_says_what_to_use(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(model="dualcopy_gelunet", comm_round=1)
    with pytest.raises(ConfigError, match=r"use model: gelunet with .*relu_ise: true"):
        started(fedml, args)


def test_a_data_set_of_fedmls_has_no_public_split(fedml: Any, make_args: MakeArgs) -> None:
    from fedsq_plugin.run.warm_start import refuse_warm_start
    from fedsq_plugin.settings.config import parse

    args = make_args(**{**GELUNET, "dataset": "cifar10", "warm_start": "none"})
    config, found = parse(vars(args))
    assert config is not None, found
    with pytest.raises(ConfigError, match=r"relu_ise: cifar10 has no public split"):
        refuse_warm_start(config)
