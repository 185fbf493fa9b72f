"""Our strategies in FLamby itself, from the checkout that FLAMBY_CHECKOUT names."""

from __future__ import annotations

import contextlib
import importlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin import DualCopy
from fedsq_plugin.data.flamby.backbones import factory
from fedsq_plugin.data.flamby.catalogue import CATALOGUE
from fedsq_plugin.data.flamby.package import FlambyPackage
from fedsq_plugin.errors import ConfigError, FedSQError, GateError
from fedsq_plugin.hosts.flamby import benchmark
from fedsq_plugin.hosts.flamby.configuration import Configuration
from fedsq_plugin.hosts.flamby.hook import register
from fedsq_plugin.hosts.flamby.privacy import Privacy

from . import standins
from .task import equal, made, model, run

pytestmark = standins.needs_flamby
# One centre: opacus takes seconds to find the noise of each.
PRIVATE_OPTIONS = {"dp_target_epsilon": 5.0, "dp_target_delta": 1e-2, "dp_max_grad_norm": 1.0}
PRIVATE: dict[str, Any] = {"centres": 1, **PRIVATE_OPTIONS, "seed": 3}
SGD = {"learning_rate": 0.05, "optimizer_class": "torch.optim.SGD"}


def heart_like(folder: Path) -> None:
    """Files in the layout of the UCI's, random: 14 columns, the last one the diagnosis."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in ("cleveland", "hungarian", "switzerland", "va"):
        rows = rng.normal(size=(24, 14)).round(2)
        rows[:, 2], rows[:, 6] = rng.permutation(np.arange(24) % 4) + 1, rng.permutation(np.arange(24) % 3)
        rows[:, 13] = rows[:, 0] > 0
        np.savetxt(folder / f"processed.{name}.data", rows, delimiter=",", fmt="%g")


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`flamby.strategies` of a copy of the checkout, with random Heart data in its own layout."""
    folder = tmp_path_factory.mktemp("flamby")
    heart_like(folder / "heart")
    standins.locate(standins.copied(folder), "fed_heart_disease", folder / "heart")
    standins.forget_flamby()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("MPLBACKEND", "agg")
        register()
        yield importlib.import_module("flamby.strategies")
    standins.forget_flamby()


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.SGD, {}), (torch.optim.Adam, {}), (torch.optim.Adam, PRIVATE)],
    ids=["SGD", "Adam", "private"],
)
def test_fedavg_is_flambys_bit_for_bit(strategies: Any, optimizer: type, options: dict[str, Any]) -> None:
    theirs = run(cls=strategies.FedAvg, optimizer=optimizer, **options)
    ours = run(cls=strategies.PluginFedAvg, optimizer=optimizer, **options)
    assert not equal(ours[0], model())
    assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_fedprox_is_flambys_bit_for_bit(strategies: Any) -> None:
    assert equal(run(cls=strategies.FedProx, mu=0.5)[0], run(cls=strategies.PluginFedProx, fedprox_mu=0.5)[0])


def test_fedsq_is_flambys_fedavg_on_a_dualcopy(strategies: Any) -> None:
    begun = DualCopy(model())
    theirs = run(cls=strategies.FedAvg, net=begun)[0]
    assert equal(theirs, run(cls=strategies.FedSQ)[0])


def test_noise_without_a_seed_is_not_repeated(strategies: Any) -> None:
    unseeded = {**PRIVATE, "seed": None}
    assert not equal(run(cls=strategies.FedSQ, **unseeded)[0], run(cls=strategies.FedSQ, **unseeded)[0])


@pytest.mark.parametrize(("seed", "different"), [(None, 3), (3, 1)])
def test_without_a_seed_every_client_has_noise_of_its_own(
    strategies: Any, monkeypatch: pytest.MonkeyPatch, seed: int | None, different: int
) -> None:
    seeds: list[int] = []

    def optimizer(
        self: Privacy, model: nn.Module, cls: Any, rate: float, loader: Any, rounds: int, seed: int, device: Any
    ) -> Any:
        seeds.append(seed)
        return cls(model.parameters(), lr=rate)

    monkeypatch.setattr(Privacy, "optimizer", optimizer)
    made(cls=strategies.FedSQ, **{**PRIVATE, "centres": 3, "seed": seed})
    assert len(seeds) == 3 and len(set(seeds)) == different


def test_a_budget_that_cannot_be_kept_is_one_line(strategies: Any) -> None:
    with pytest.raises(ConfigError, match=r"differential privacy: .*budget"):
        made(cls=strategies.FedSQ, **{**PRIVATE, "dp_target_epsilon": 1e-3, "dp_target_delta": 1e-5})


def test_fedsq_trains_with_differential_privacy(strategies: Any) -> None:
    found = run(cls=strategies.FedSQ, **PRIVATE)
    assert equal(found[0].structural, model())
    assert not equal(found[0].quantitative, model())


def test_gradients_of_samples_under_gates_are_those_of_autograd(strategies: Any) -> None:
    opacus = importlib.import_module("opacus")
    dual, x, y = DualCopy(model()), torch.randn(5, 6), torch.ones(5, 1)
    with torch.no_grad():
        for p in dual.parameters():
            p.add_(torch.randn_like(p))
    nn.BCELoss()(dual(x), y).backward()
    expected = [p.grad.clone() for p in dual.parameters() if p.grad is not None]
    opacus.GradSampleModule(dual)
    nn.BCELoss()(dual(x), y).backward()
    found = [p.grad_sample.mean(0) for p in dual.parameters()]  # type: ignore[attr-defined]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_opacus_refusal_of_batchnorm_is_one_line(strategies: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid())
    with pytest.raises(ConfigError, match=r"differential privacy: .*BatchNorm") as error:
        made(net=net, cls=strategies.PluginFedAvg, **PRIVATE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvg", {}),
        ("FedProx", {"mu": 0.1}),
        ("Scaffold", {}),
        ("FedAdam", {}),
        ("FedYogi", {}),
        ("FedAdagrad", {}),
        ("Cyclic", {"deterministic_cycle": True}),
        ("FedAvgFineTuning", {"num_fine_tuning_steps": 2}),
    ],
)
def test_flambys_own_strategies_train_a_dualcopy_and_leave_its_gates(
    strategies: Any, name: str, options: dict[str, Any]
) -> None:
    cls: Callable[..., Any] = getattr(strategies, name)
    assert cls.__module__.startswith("flamby.")
    begun = DualCopy(model())
    for found in run(cls=cls, net=begun, rounds=3, **options):
        assert equal(found.structural, model())
        assert not equal(found.quantitative, model())
        assert [k for k, _ in found.named_parameters()] == [k for k, _ in model().named_parameters()]


def test_what_flamby_exchanges_of_a_dualcopy_is_the_plain_model(strategies: Any) -> None:
    sizes: list[int] = []

    def count(sent: list[Any]) -> None:
        sizes.append(sum(value.nbytes for value in sent))

    for cls, net in ((strategies.FedAvg, DualCopy(model())), (strategies.FedSQ, model())):
        run(cls=cls, net=net, rounds=1, bits_counting_function=count)
    assert set(sizes) == {sum(p.numel() * 4 for p in model().parameters())}


def test_the_compliance_check_of_flamby_takes_what_we_send(strategies: Any) -> None:
    check = strategies.check_exchange_compliance
    run(cls=strategies.FedSQ, bits_counting_function=lambda sent: check(sent, 10_000))
    with pytest.raises(ValueError, match="cannot send more than 10 bytes"):
        run(cls=strategies.FedSQ, bits_counting_function=lambda sent: check(sent, 10))


def test_logs_have_flambys_names(strategies: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = {}
    for cls in (strategies.FedAvg, strategies.FedSQ):
        folder = tmp_path / cls.__name__
        run(cls=cls, log=True, log_period=2, logdir=str(folder), log_basename="base")
        names[cls.__name__] = set()
        for one in folder.glob("base-*"):
            events = EventAccumulator(str(one)).Reload().Tags()
            names[cls.__name__] |= {*events["scalars"], *events["histograms"]}
    assert names["FedSQ"] == names["FedAvg"] >= {"client0/train/Loss", "client2/fc.weight"}
    assert "client 2: loss " in capsys.readouterr().out


@pytest.fixture
def config(strategies: Any, tmp_path: Path) -> Path:
    rows = {"FedAvg": SGD, "PluginFedAvg": SGD, "FedSQ": SGD, "FedSQ+FedMR": {**SGD, "structural_copy": "ema"}}
    file = tmp_path / "config.json"
    content = {"dataset": "fed_heart_disease", "results_file": str(tmp_path / "results.csv"), "strategies": rows}
    file.write_text(json.dumps(content))
    return file


def bench(
    config: Path, *arguments: str, backbone: str = "mlp", seeds: tuple[int, ...] = (0, 1), only: tuple[str, ...] = ()
) -> Any:
    benchmark.fed_benchmark(config, ["--debug", *arguments], backbone, None, seeds, only=only)
    return pd.read_csv(config.with_name("results.csv"))


def test_flambys_benchmark_runs_our_rows_and_finds_them_again(config: Path) -> None:
    first = bench(config)
    done = first.groupby(["Method", "seed"]).size()
    methods = ("FedAvg100", "PluginFedAvg100", "FedSQ100", "FedSQ+FedMR100")
    assert all(done[method, seed] == 5 for method in methods for seed in (0, 1))
    metrics = first.set_index(["Method", "seed", "Test"])["Metric"]
    pd.testing.assert_series_equal(metrics["FedAvg100"], metrics["PluginFedAvg100"])
    pd.testing.assert_frame_equal(bench(config), first)
    # What a run that was cut off left undone is done, and comes out the same.
    first[:-3].to_csv(config.with_name("results.csv"), index=False)
    again = bench(config).set_index(["Method", "seed", "Test"])["Metric"]
    pd.testing.assert_series_equal(again.sort_index(), metrics.sort_index())
    with pytest.raises(ConfigError, match=r"results.csv has results with --backbone mlp --debug: name"):
        bench(config, backbone="mlp_bn")
    with pytest.raises(ConfigError, match=r"results.csv has results with --backbone mlp --debug: name"):
        benchmark.fed_benchmark(config, [], "mlp", None, [0])


def test_one_strategy_alone(config: Path) -> None:
    found = bench(config, "--strategy", "FedSQ", "-lr", "0.1", seeds=(0,))
    assert set(found["Method"]) == {"FedSQ100"} and set(found["learning_rate"]) == {0.1}


def test_joined_rows_may_be_the_one_strategy(config: Path) -> None:
    found = bench(config, "-s", "FedProx+FedMR", seeds=(0,))
    assert set(found["Method"]) == {"FedProx+FedMR100"}


def test_only_some_of_a_configuration_with_their_options(config: Path) -> None:
    found = bench(config, seeds=(0,), only=("FedSQ+FedMR",))
    assert {name for name in found["Method"] if name.startswith("Fed")} == {"FedSQ+FedMR100"}
    assert set(found["structural_copy"].dropna()) == {"ema"}
    with pytest.raises(ConfigError, match=r"no strategy 'FedMR'; did you mean 'FedSQ\+FedMR'"):
        bench(config, only=("FedMR",))


def test_a_baseline_alone_asks_for_no_strategy(config: Path) -> None:
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "strategies": {"FedSQ": {}}}))
    found = bench(config, "-scb", "Pooled", seeds=(0,), backbone="baseline")
    assert set(found["Method"]) == {"Pooled Training"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--strategy", "FedSQ+FedMR"), "would leave out structural_copy, because .* use --only FedSQ.FedMR"),
        (("--strategy", "FedProx"), "you should provide a value for mu"),
        (("--strategy", "FedSq2"), "unknown strategy 'FedSq2'; did you mean 'FedSQ'"),
        (("-s", "FedSQ", "-slr", "1.0"), "server_learning_rate"),
        (("-s", "fed_avg"), "'fed_avg' is no strategy; did you mean 'FedAvg'"),
        (("-s", "FedAdam+FedYogi"), "FedAdam and FedYogi"),
        (("-slr", "0.1"), "--server_learning_rate is for one strategy"),
        (("-mu", "0.1"), "--mu is for one strategy"),
        (("-opt", "torch.optim.Adam"), "--optimizer-class is for one strategy"),
        (("-d",), "--deterministic is for one strategy"),
        (("-dpe", "1.0"), "needs dp_target_epsilon, dp_target_delta and dp_max_grad_norm together"),
        (("-scb", "Local", "--nlocal", "9"), "--nlocal 9: the centres are 0 to 3"),
        (("-lr", "0.1"), "--learning_rate is for one strategy: give --strategy as well"),
    ],
)
def test_wrong_arguments_are_one_line(config: Path, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        bench(config, *arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "fed_hearts"}, "unknown dataset 'fed_hearts'; did you mean 'fed_heart_disease'?"),
        ({"strategies": {"FedSq2": {}}}, "unknown strategy 'FedSq2'; did you mean 'FedSQ'?"),
        ({"strategies": {"FedSQ": {"fedprox_mu": 1}}}, "FedSQ has no 'fedprox_mu'"),
        ({"strategies": []}, "'strategies' is missing or wrong"),
        ({"strategies": {"FedAvg": {"optimizer_class": "SGD"}}}, "optimizer_class is 'SGD', not as 'torch.op"),
        ({"strategies": {"FedSQ": None}}, "the options of FedSQ are no object, as {}"),
        ({"strategies": {"FedProx": {}}}, "you should provide a value for mu"),
        ({"strategies": {"FedSQ": {"optimizer_class": "torch.optim.SDG"}}}, "has no attribute 'SDG'"),
        ({"strategies": {"FedSQ": {"optimizer_class": "torch.float32"}}}, "is no class of torch.optim"),
        ({"strategies": {"PluginFedProx": {"dp_target_epsilon": 1.0}}}, "PluginFedProx: differential priv"),
        ({"strategies": {"PluginFedProx": {**PRIVATE_OPTIONS}}}, "PluginFedProx: FedProx cannot train with"),
        ({"dataset": "fed_kits19"}, "flamby/fed_kits19: the data are not there; get them by: git clone"),
        ({"strategies": {"FedAvg": SGD, "FedSQ": {"structural_rounds": 0}}}, "FedSQ: structural_rounds is 0"),
        ({"strategies": {"FedAvg": SGD, "FedRep": SGD}}, "FedRep treats the head apart"),
    ],
)
def test_a_wrong_configuration_is_one_line(config: Path, change: dict[str, Any], said: str) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ConfigError) as error:
        bench(config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_gated_is_said_before_any_other_strategy_runs(config: Path) -> None:
    with pytest.raises(FedSQError, match=r"FedSQ: FLamby's own for .* without a gate; use the model mlp"):
        bench(config, backbone="baseline")
    assert not config.with_name("results.csv").exists()
    with pytest.raises(ConfigError, match="fed_heart_disease can have baseline, mlp, mlp_bn"):
        bench(config, backbone="resnet18")


@pytest.mark.parametrize("arguments", [("--strategy", "FedAvg"), ("-scb", "Pooled")])
def test_a_typo_is_one_line_though_another_strategy_is_asked_for(config: Path, arguments: tuple[str, ...]) -> None:
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "strategies": {"FedAvg": {}, "FedSW": {}}}))
    with pytest.raises(ConfigError, match="unknown strategy 'FedSW'; did you mean 'FedSQ'"):
        bench(config, *arguments)


def test_what_opacus_refuses_is_said_before_any_strategy_runs(config: Path) -> None:
    content = json.loads(config.read_text())
    rows = {"FedAvg": SGD, "PluginFedAvg": {**SGD, **PRIVATE_OPTIONS}}
    config.write_text(json.dumps({**content, "strategies": rows}))
    with pytest.raises(ConfigError, match=r"PluginFedAvg: FedAvg: differential privacy: .*BatchNorm"):
        bench(config, backbone="mlp_bn")
    assert not config.with_name("results.csv").exists()


def test_batches_that_do_not_fit_are_said_before_any_strategy_runs(config: Path) -> None:
    content = json.loads(config.read_text())
    swapped = {**SGD, "batch": {"inputs": 1, "labels": 0}}
    config.write_text(json.dumps({**content, "strategies": {"FedAvg": SGD, "PluginFedAvg": swapped}}))
    with pytest.raises(
        ConfigError, match=r"PluginFedAvg: silo \d: the model does not run on a batch of the shape 3x1: "
    ):
        bench(config)
    assert not config.with_name("results.csv").exists()


def test_a_row_that_is_not_asked_for_may_be_one_that_cannot_run(config: Path) -> None:
    found = bench(config, "--strategy", "FedAvg", backbone="baseline", seeds=(0,))
    assert set(found["Method"]) == {"FedAvg100"}


def test_an_unaccepted_licence_is_one_line(config: Path) -> None:
    config.write_text(config.read_text().replace("fed_heart_disease", "fed_tcga_brca"))
    with pytest.raises(ConfigError, match="its data terms are not accepted yet"):
        bench(config)


SHAPES = {
    **{"fed_heart_disease": (1, 13), "fed_synthetic": (1, 10), "fed_isic2019": (1, 3, 64, 64)},
    **{"fed_ixi": (1, 1, 16, 16, 16), "fed_kits19": (1, 1, *standins.PATCH), "fed_camelyon16": (1, 9, 2048)},
}
"""Of a batch of one."""


@pytest.mark.parametrize("name", sorted(p.name for p in Path("recipes/flamby").glob("*.json")))
def test_recipes_are_accepted(strategies: Any, name: str) -> None:
    file = Path("recipes/flamby", name)
    found = Configuration.read(file)
    backbone = "mlp" if found.about.features else "resnet18" if found.about.colour_images else "baseline"
    net = factory(found.about, backbone, None, FlambyPackage(found.about.key).baseline)()
    inputs = torch.randn(SHAPES[found.about.name])
    asked = benchmark._parsed([])
    found.check(strategies, net, inputs, backbone, asked)
    if found.about.ungated:
        assert tuple(found.strategies["FedSQ"]["gate_accept"]) == found.about.ungated
        bare = replace(found, strategies={"FedAvg": {}, "FedSQ": {}})
        with pytest.raises(GateError, match=r"FedSQ: cannot gate .* by name: gate_accept: \['attention_V"):
            bare.check(strategies, net, inputs, backbone, asked)
        with pytest.raises(ConfigError, match="FedSQ: the model does not run on a sample"):
            found.check(strategies, net, inputs[..., :768], backbone, asked)


def test_the_solver_for_benchopt_drives_rounds_by_itself(strategies: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for BenchOpt and its template: it makes the strategy, evaluates client 0, and calls
    perform_round."""

    class Template:
        def __init__(self, strategy: Any, **parameters: Any) -> None:
            self.strategy = strategy
            vars(self).update(parameters)

    benchopt, utils = ModuleType("benchopt"), ModuleType("benchmark_utils")
    template = ModuleType("benchmark_utils.template_flamby_strategy")
    benchopt.safe_import_context = contextlib.nullcontext  # type: ignore[attr-defined]
    utils.CustomSPC = dict  # type: ignore[attr-defined]
    template.FLambySolver = Template  # type: ignore[attr-defined]
    for module in (benchopt, utils, template):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    solver = runpy.run_path("recipes/flamby/benchopt/solvers/flamby_fedsq.py")["Solver"](
        structural_copy="ema", gate_accept=[]
    )
    data = [TensorDataset(torch.randn(2, 13), torch.zeros(2, 1))]
    linear = nn.Sequential(nn.Linear(13, 1), nn.Sigmoid())
    relu = nn.Sequential(nn.Linear(13, 4), nn.ReLU(), nn.Linear(4, 1))
    drawn = torch.get_rng_state()
    skipped, reason = solver.skip(train_datasets=data, collate_fn=None, model=linear, loss=None)
    assert skipped and "has no gate" in reason
    assert solver.skip(train_datasets=data, collate_fn=None, model=relu, loss=None) == (False, None)
    assert torch.equal(drawn, torch.get_rng_state())
    solver.set_strategy_specific_args()
    strategy = made(cls=solver.strategy, rounds=-100, **solver.strategy_specific_args)
    before = [p.detach().clone() for p in strategy.models_list[0].model.parameters()]
    strategy.perform_round()
    after = strategy.models_list[0].model
    assert isinstance(after, DualCopy)
    assert not any(torch.equal(a, b) for a, b in zip(before, after.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dataset", "shape", "labels"), [("fed_ixi", (1, 16, 16, 16), (2, 16, 16, 16)), ("fed_isic2019", (3, 64, 64), None)]
)
def test_fedsq_on_networks_for_images(
    strategies: Any, dataset: str, shape: tuple[int, ...], labels: tuple[int, ...] | None
) -> None:
    package = importlib.import_module(f"flamby.datasets.{dataset}")
    x = torch.randn(4, *shape)
    y = torch.randint(8, (4,)) if labels is None else torch.randint(2, (4, *labels)).float()
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    name = "resnet18" if dataset == "fed_isic2019" else "baseline"
    net = factory(CATALOGUE[f"flamby/{dataset}"], name, None, package.Baseline)()
    strategy = strategies.FedSQ([loader], net, package.BaselineLoss(), torch.optim.SGD, 0.01, 2, 1)
    trained = strategy.run()[0]
    assert equal(trained.structural, net) and not equal(trained.quantitative, net)
