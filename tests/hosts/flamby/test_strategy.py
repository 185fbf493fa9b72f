"""Our algorithms as FLamby's strategies, without FLamby."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedsq_plugin import DualCopy
from fedsq_plugin.algorithms import algorithm, algorithms
from fedsq_plugin.errors import ConfigError, FedSQError, GateError, UpdateError
from fedsq_plugin.federation.messages import update_of
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.state import State, fingerprint
from fedsq_plugin.hosts import flamby
from fedsq_plugin.hosts.flamby.batches import EndlessBatches, Updates
from fedsq_plugin.hosts.flamby.privacy import Privacy
from fedsq_plugin.hosts.flamby.strategy import Strategy, strategy_class
from fedsq_plugin.models.mlp import MLP

from .task import ROUNDS, SIZES, UPDATES, equal, loaders, made, model, naive_fedavg, normalised, on_classes, run

OPTIONS: dict[str, Any] = {"FrozenEarly": {"frozen_modules": ["conv"]}}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fedavg_is_flambys_bit_for_bit(optimizer: type) -> None:
    found = list(run("FedAvg", optimizer=optimizer)[0].parameters())
    expected = naive_fedavg(optimizer, model())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", list(algorithms()))
def test_every_algorithm_trains_and_gives_one_model_per_client(name: str) -> None:
    head = {"head": "fc"} if algorithm(name).needs_head else {}
    strategy = on_classes(name, **head, **OPTIONS.get(name, {}))
    found = strategy.run()
    assert len(found) == len(SIZES)
    assert all(module is client.model for module, client in zip(found, strategy.models_list, strict=True))
    assert not equal(found[0], normalised())
    assert isinstance(found[0], DualCopy) == (name == "FedSQ")


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ", "FedMR", "FedAdam", "FedSQ+FedMR"])
def test_clients_of_a_global_algorithm_end_with_the_servers_model_buffers_included(name: str) -> None:
    strategy = on_classes(name)
    found = strategy.run()
    assert all(equal(found[0], other) for other in found[1:])
    state = strategy.server.state.model
    assert all(torch.equal(value, state[key]) for key, value in found[0].state_dict().items())
    assert not torch.equal(found[0].state_dict()["bn.running_mean"], torch.zeros(8))


def test_running_statistics_are_the_sample_weighted_mean() -> None:
    strategy = on_classes("FedAvg", rounds=1)
    sent: list[torch.Tensor] = []
    for client in strategy.models_list:
        train = client.train

        def kept(*arguments: object, train: object = train) -> object:
            answer = train(*arguments)  # type: ignore[operator]
            sent.append(answer["bn.running_var"].clone())
            return answer

        client.train = kept  # type: ignore[assignment]
    found = strategy.run()[0].state_dict()
    expected = sum(value * size for value, size in zip(sent, SIZES, strict=True)) / sum(SIZES)
    assert torch.allclose(found["bn.running_var"], expected, atol=1e-6)  # type: ignore[arg-type]
    assert found["bn.num_batches_tracked"].item() == UPDATES


def test_buffers_keep_leaves_them_as_the_server_has_them() -> None:
    found = on_classes("FedAvg", buffers="keep").run()[0].state_dict()
    assert torch.equal(found["bn.running_mean"], torch.zeros(8))
    assert not torch.equal(found["fc.weight"], normalised().state_dict()["fc.weight"])


def test_fedbn_leaves_every_client_its_normalisation() -> None:
    one, other, _ = on_classes("FedBN").run()
    assert not torch.equal(one.state_dict()["bn.weight"], other.state_dict()["bn.weight"])
    assert torch.equal(one.state_dict()["fc.weight"], other.state_dict()["fc.weight"])


def test_fedmr_gives_clients_models_of_their_own_within_a_round() -> None:
    strategy = made("FedMR")
    strategy.perform_round()
    slots = strategy.server.state.slots
    assert len(slots) == len(SIZES)
    begun = [a.state["fc.weight"] for a in strategy.server.assign(range(len(SIZES)))]
    assert not torch.equal(begun[0], begun[1]) or not torch.equal(begun[0], begun[2])


def test_fedmr_repeats_under_the_seed_of_the_process() -> None:
    assert equal(run("FedMR")[0], run("FedMR")[0])
    assert not equal(run("FedMR", seed=5)[0], run("FedMR", seed=6)[0])


def test_fedsq_trains_under_the_gates_of_the_model_it_was_given() -> None:
    begun = model()
    strategy = made("FedSQ", begun)
    found = strategy.run()
    assert equal(begun, model())
    for module in found:
        assert isinstance(module, DualCopy)
        assert equal(module.structural, begun)
        assert not equal(module.quantitative, begun)


def test_fedsq_on_its_first_step_is_fedavg() -> None:
    """Both copies are equal then, so the gradient is too."""
    torch.manual_seed(0)
    results = []
    for name in ("FedAvg", "FedSQ"):
        strategy = made(name, rounds=1)
        strategy.models_list[0].updates = 1
        strategy.models_list[1].updates = strategy.models_list[2].updates = 1
        torch.manual_seed(3)
        results.append(strategy.run()[0])
    assert equal(*results)


def test_a_structural_copy_that_follows_is_taken_over_by_every_client() -> None:
    strategy = made("FedSQ", structural_copy="refresh", structural_rounds=1)
    for _ in range(2):
        strategy.perform_round()
    for client in strategy.models_list:
        assert isinstance(client.model, DualCopy)
        assert not equal(client.model.structural, model())


def test_kept_gates_change_nothing() -> None:
    kept, anew = run("FedSQ", keep_gates=True)[0], run("FedSQ")[0]
    assert all(torch.allclose(a, b) for a, b in zip(kept.parameters(), anew.parameters(), strict=True))


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ"])
def test_the_bits_counter_is_given_the_plain_models_state(name: str) -> None:
    sizes: list[int] = []
    on_classes(name, bits_counting_function=lambda sent: sizes.append(sum(v.nbytes for v in sent))).run()
    plain = sum(v.numel() * v.element_size() for v in normalised().state_dict().values())
    assert sizes == [plain] * len(SIZES) * ROUNDS


def test_the_counter_may_stop_a_run() -> None:
    def refuse(sent: list[object]) -> None:
        raise ValueError("too much")

    with pytest.raises(ValueError, match="too much"):
        made("FedSQ", bits_counting_function=refuse).run()


def test_without_a_round_every_client_has_the_model_as_given() -> None:
    assert equal(run("FedAvg", rounds=0)[2], model())


def test_fine_tuning_makes_the_models_the_clients_own() -> None:
    one, other, _ = run("FedAvg", num_fine_tuning_steps=2)
    assert not equal(one, other)
    assert equal(*run("FedAvg", num_fine_tuning_steps=0)[:2])


def test_fedncm_takes_its_head_from_all_data_once() -> None:
    strategy = on_classes("FedNCM", head="fc", rounds=1)
    seen: list[int] = []
    handle = None
    for client in strategy.models_list:
        handle = client.model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    strategy.run()
    assert handle is not None
    assert sum(seen) == sum(SIZES)


def test_options_are_named_parameters_with_the_recipes_defaults() -> None:
    prox = inspect.signature(strategy_class("FedProx")).parameters
    assert prox["fedprox_mu"].default == 0.01
    assert "options" not in prox and "fedprox_mu" not in inspect.signature(strategy_class("FedAvg")).parameters
    assert list(prox)[:7] == [
        *("training_dataloaders", "model", "loss", "optimizer_class", "learning_rate"),
        *("num_updates", "nrounds"),
    ]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("FedProx", {"fedprox_nu": 1}, "FedProx has no option 'fedprox_nu'; did you mean 'fedprox_mu'?"),
        ("FedProx", {"fedprox_mu": -1}, "fedprox_mu is -1"),
        ("FedSQ", {"structural_copy": "thawed"}, "structural_copy is 'thawed'"),
        ("FedRep", {}, "set head to the module path of the model's last layer (linear layers: features.0"),
        ("FedRep", {"head": "fx"}, "head 'fx' is no module of the model"),
        ("FedBN", {}, "the model has none: use another algorithm"),
        ("FrozenEarly", {}, "set frozen_modules"),
        ("FrozenEarly", {"frozen_modules": ["conv9"]}, "the model has no 'conv9'"),
        ("FedAvg", {"dp_target_epsilon": 1.0}, "needs dp_target_epsilon, dp_target_delta and"),
        (
            "FedProx",
            {"dp_target_epsilon": 1.0, "dp_target_delta": 0.1, "dp_max_grad_norm": 1.0},
            "FedProx cannot train with differential privacy",
        ),
        (
            "FedAvg",
            {**{"dp_target_epsilon": 1.0, "dp_target_delta": 0.1, "dp_max_grad_norm": 1.0}, "num_fine_tuning_steps": 3},
            "set num_fine_tuning_steps to 0",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        made(name, **options)
    assert "\n" not in str(error.value)


def test_a_model_without_gates_is_an_error_and_no_silent_fedavg() -> None:
    linear = nn.Sequential(nn.Linear(6, 1), nn.Sigmoid())
    with pytest.raises(GateError):
        made("FedSQ", linear).run()


def test_a_dualcopy_is_refused_by_a_plain_algorithm() -> None:
    net = MLP(6, 1)
    with pytest.raises(ConfigError, match="the model is a DualCopy"):
        made("FedAvg", DualCopy(net))


def test_a_centre_without_data_is_named() -> None:
    data = [*loaders(), None]
    with pytest.raises(ConfigError, match=re.escape("training_dataloaders[3] has no samples")):
        strategy_class("FedAvg")(data, model(), nn.BCELoss(), torch.optim.SGD, 0.1, 1, 1)


def test_loaders_without_a_number_of_samples_are_refused() -> None:
    data = [*loaders()[:1], list(loaders()[1])]
    with pytest.raises(ConfigError, match=re.escape("training_dataloaders[1] is a list without the number of its")):
        strategy_class("FedAvg")(data, model(), nn.BCELoss(), torch.optim.SGD, 0.1, 1, 1)


def test_batches_go_on_where_they_stopped_and_begin_anew_at_the_end() -> None:
    class Loader(list[tuple[int, int]]):
        dataset = range(3)

    batches = EndlessBatches(Loader([(0, 0), (1, 1), (2, 2)]))
    two = Updates(batches, 2)
    assert [list(two), list(two)] == [[(0, 0), (1, 1)], [(2, 2), (0, 0)]]
    assert len(batches) == 3


def test_two_strategies_of_one_model_do_not_share_it() -> None:
    net = model()
    before = copy.deepcopy(net)
    made("FedAvg", net).run()
    assert equal(net, before)


def test_a_class_by_name() -> None:
    cls = flamby.strategy_class("FedSQ+FedMR")
    assert (cls.algorithm, cls.__name__) == (algorithm("FedSQ+FedMR"), "FedSQ+FedMR")
    assert issubclass(cls, Strategy)
    with pytest.raises(ConfigError, match=r"unknown algorithm 'FedSq'; did you mean 'FedSQ'\?"):
        flamby.strategy_class("FedSq")


# Updates that are refused

ALL = [*algorithms(), "FedSQ+FedMR", "FedSQ+FedRep", "FedSQ+FrozenBN"]


def prepared(name: str, **options: Any) -> Strategy:
    """An algorithm on a model that suits all of them."""
    head = {"head": "fc"} if algorithm(name).needs_head else {}
    return on_classes(name, **head, **OPTIONS.get(name, {}), **options)


class Broken:
    """Lets a client's data, and so its update, be NaN until it is mended; notes what every client answers."""

    def __init__(self, strategy: Strategy, number: int = 1) -> None:
        self._inputs = strategy.training_dataloaders_with_memory[number].loader.dataset.tensors[0]
        self._good = self._inputs.clone()
        self._inputs.fill_(float("nan"))
        self.answers: list[State] = []
        for client in strategy.models_list:
            client.train = functools.partial(self._noted, client.train)  # type: ignore[method-assign]

    def _noted(self, train: Callable[..., State], *given: Any) -> State:
        self.answers.append(train(*given))
        return self.answers[-1]

    def mend(self) -> None:
        self._inputs.copy_(self._good)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def first_key(answer: State) -> str:
    """The first entry with a NaN, as the server's template orders them."""
    return next(key for key, value in answer.items() if value.isnan().any()).removeprefix("fedsq:sums:")


@pytest.mark.parametrize("name", ALL)
def test_a_nan_is_refused_by_name_and_the_round_is_that_of_the_others(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = prepared(name)
    before = strategy.server
    others = Server(before.algorithm, before.options, before.state.model, before.roles, before.seed, before.mean)
    broken = Broken(strategy)
    strategy.perform_round()
    (line,) = lines(caplog)
    key = first_key(broken.answers[1])
    assert line == f"round 1: the update of silo 1 is refused: {key} has NaN or infinite values"
    gathering = others.begin([0, 1, 2])
    for silo in (0, 2):
        gathering.add(update_of(silo, SIZES[silo], broken.answers[silo]))
    gathering.finish()
    assert fingerprint(strategy.server.state.tensors()) == fingerprint(others.state.tensors())
    for client in strategy.models_list:
        assert all(value.isfinite().all() for value in client.model.state_dict().values())


@pytest.mark.parametrize("name", ALL)
def test_a_nan_ends_the_run_where_it_is_said_so(name: str) -> None:
    strategy = prepared(name, nonfinite="fail")
    broken = Broken(strategy)
    with pytest.raises(UpdateError) as error:
        strategy.run()
    reason = f"{first_key(broken.answers[1])} has NaN or infinite values"
    assert str(error.value) == f"round 1: the update of silo 1 is refused: {reason} (nonfinite: fail)"


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ", "FedMR", "FedAdam", "FedRep"])
def test_an_update_that_does_not_fit_is_refused_by_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    strategy = prepared(name)
    for number, change in ((0, lambda answer: answer.pop("conv.bias")), (2, widened)):
        client = strategy.models_list[number]
        client.train = functools.partial(changed, client.train, change)  # type: ignore[method-assign]
    strategy.perform_round()
    assert lines(caplog) == [
        "round 1: the update of silo 0 is refused: it lacks conv.bias",
        "round 1: the update of silo 2 is refused: conv.bias has shape (1, 8) instead of (8,)",
    ]


def changed(train: Callable[..., State], change: Callable[[State], object], *given: Any) -> State:
    answer = train(*given)
    change(answer)
    return answer


def widened(answer: State) -> None:
    answer["conv.bias"] = answer["conv.bias"][None]


def test_the_mean_of_the_others_is_weighted_by_their_samples() -> None:
    strategy = prepared("FedAvg")
    broken = Broken(strategy)
    strategy.perform_round()
    one, _, other = broken.answers
    for key, value in strategy.server.state.model.items():
        expected = (SIZES[0] * one[key] + SIZES[2] * other[key]) / (SIZES[0] + SIZES[2])
        torch.testing.assert_close(value, expected.to(value.dtype))


def test_without_an_update_that_is_left_the_run_ends() -> None:
    strategy = prepared("FedSQ")
    for number in range(len(SIZES)):
        Broken(strategy, number)
    with pytest.raises(UpdateError, match=r"no update is left to aggregate: round 1: the update of silo 0 .*silo 2"):
        strategy.run()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)])
@pytest.mark.parametrize("name", ["FedAvg", "FedSQ", "FedMR", "FedBN", "FedRep"])
def test_a_refused_client_trains_on_with_a_fresh_optimizer(
    name: str, optimizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Moments with a NaN in them would give NaN for ever."""
    strategy = prepared(name, optimizer=optimizer)
    broken = Broken(strategy)
    strategy.perform_round()
    assert len(lines(caplog)) == 1
    broken.mend()
    for _ in range(2):
        strategy.perform_round()
    assert len(lines(caplog)) == 1
    for answer in broken.answers[3:]:
        assert all(value.isfinite().all() for value in answer.values())


def test_the_optimizer_of_differential_privacy_forgets_its_moments_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Opacus ties one optimizer to the model; here Adam stands in for it."""

    def optimizer(self: Privacy, model: nn.Module, cls: Any, rate: float, *_: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), rate)

    monkeypatch.setattr(Privacy, "optimizer", optimizer)
    private = {"dp_target_epsilon": 5.0, "dp_target_delta": 1e-2, "dp_max_grad_norm": 1.0}
    strategy = prepared("FedAvg", **private)
    broken = Broken(strategy)
    strategy.perform_round()
    broken.mend()
    strategy.perform_round()
    assert [line for line in lines(caplog) if "refused" in line] == [
        "round 1: the update of silo 1 is refused: conv.weight has NaN or infinite values"
    ]


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ"])
def test_centre_whose_loader_gives_no_batch_is_left_out_and_noted(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The others end as if it were not there."""

    def run_with(more: list[Any]) -> dict[str, Any]:
        torch.manual_seed(2)
        data = [*loaders(2)[:2], *more]
        loss, sgd = nn.CrossEntropyLoss(), torch.optim.SGD
        strategy = strategy_class(name)(data, normalised(), loss, sgd, 0.05, UPDATES, 1)
        torch.manual_seed(3)
        strategy.run()
        return strategy.server.state.model

    few = torch.utils.data.DataLoader(loaders(2)[2].dataset, batch_size=50, drop_last=True)
    with_idle, alone = run_with([few]), run_with([])
    assert fingerprint(with_idle) == fingerprint(alone)
    assert "round 1: silo 2 has no batch to train on and is left out of the mean" in caplog.text


def test_last_batch_of_one_names_the_centre() -> None:
    data = [torch.utils.data.DataLoader(loader.dataset, batch_size=29) for loader in loaders(2)[1:2]]
    strategy = strategy_class("FedAvg")(data, normalised(), nn.CrossEntropyLoss(), torch.optim.SGD, 0.05, UPDATES, 1)
    with pytest.raises(FedSQError, match=r"silo 0: the model does not train on a batch of the shape 1x6: .*drop_last"):
        strategy.run()
