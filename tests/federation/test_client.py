"""The silo's side: what it receives, its training, its answer, what stays with it, and its own model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError, UpdateError
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.local import BatchError, Phase, local_update
from fedsq_plugin.federation.messages import Announcement, Assignment
from fedsq_plugin.federation.record import RoundRecord
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.federation.round import Round
from fedsq_plugin.federation.seeding import derive
from fedsq_plugin.federation.state import State, fingerprint, state_of
from fedsq_plugin.federation.training import LocalTraining, OptimizerTraining
from tests.algorithms.task import OPTIONS, Federation, changed, corners, mlp, silos

TRAINING = LocalTraining(learning_rate=0.1)
DATA = silos()


def client(name: str, options: Any = OPTIONS) -> Client:
    chosen = algorithm(name)
    return Client(chosen.view.make(mlp(), options), chosen, options, TRAINING, seed=3)


def test_round_of_a_silo_is_a_local_update_with_its_own_seed() -> None:
    found, expected = client("FedAvg"), mlp()
    found.train(2, DATA[2], 5)
    seed = derive("local", 3, 5, 2)
    local_update(expected, DATA[2], TRAINING, [Phase(2, frozenset(Role))], found.roles, round=5, seed=seed)
    assert fingerprint(state_of(found.model)) == fingerprint(state_of(expected))


def test_objective_is_the_algorithms() -> None:
    avg, prox = client("FedAvg"), client("FedProx", changed(fedprox_mu=1.0))
    for found in (avg, prox):
        found.train(0, DATA[0], 0)
    assert fingerprint(state_of(avg.model)) != fingerprint(state_of(prox.model))


def test_silo_goes_on_with_its_own_head() -> None:
    found = client("FedRep")
    found.train(0, DATA[0], 0)
    head = found.model.state_dict()["3.weight"].clone()
    found.train(1, DATA[1], 0)
    found.model.load_state_dict(state_of(mlp()))
    found.states.load(0, found.model)
    assert torch.equal(found.model.state_dict()["3.weight"], head)


def test_head_of_one_silo_does_not_reach_the_next() -> None:
    alone, after = client("FedRep"), client("FedRep")
    after.train(0, DATA[0], 0)
    body = {key: value for key, value in state_of(mlp()).items() if not key.startswith("3.")}
    after.model.load_state_dict(body, strict=False)  # what travels
    for found in (alone, after):
        found.train(1, DATA[1], 0)
    assert fingerprint(state_of(alone.model)) == fingerprint(state_of(after.model))


def test_statistics_of_one_silo_do_not_reach_the_next() -> None:
    alone, after = client("FedBN"), client("FedBN")
    after.train(0, DATA[0], 0)
    travelling = {key: value for key, value in state_of(mlp()).items() if not key.startswith("1.")}
    after.model.load_state_dict(travelling, strict=False)
    for found in (alone, after):
        found.train(1, DATA[1], 0)
    assert fingerprint(state_of(alone.model)) == fingerprint(state_of(after.model))


def test_nothing_stays_where_everything_travels() -> None:
    found = client("FedAvg")
    found.train(0, DATA[0], 0)
    assert found.states.tensors() == {}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("FedRep", ["3.weight", "3.bias"]),
        ("FedBABU", ["3.weight", "3.bias"]),
        ("FedBN", ["1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]),
    ],
)
def test_what_stays(name: str, keys: list[str]) -> None:
    found = client(name)
    found.train(4, DATA[0], 0)
    assert list(found.states.tensors()) == [f"4/{key}" for key in keys]


# The silo's own model


@pytest.mark.parametrize("name", ["FedRep", "FedBN"])
def test_own_model_is_the_global_one_with_the_own_part(name: str) -> None:
    found = Federation(name).repeat(2)
    found.own(1)
    kept = found.client.states.tensors()
    expected = {**found.state, **{k[2:]: v for k, v in kept.items() if k.startswith("1/")}}
    assert fingerprint(state_of(found.client.model)) == fingerprint(expected)


def test_own_model_of_a_silo_that_never_trained_has_the_warm_starts_part() -> None:
    found = Federation("FedRep")
    found.round([0, 1])
    found.own(2)
    assert torch.equal(found.client.model.state_dict()["3.weight"], mlp().state_dict()["3.weight"])


@pytest.mark.parametrize("name", ["FedAvg", "FedRep", "FedBN", "FedBABU", "FedSQ"])
def test_own_model_leaves_nothing_behind(name: str) -> None:
    found, other = (Federation(name).repeat(1) for _ in range(2))
    for silo in range(3):
        found.own(silo, epochs=2)
    assert fingerprint(found.client.states.tensors()) == fingerprint(other.client.states.tensors())
    found.repeat(1), other.repeat(1)
    assert fingerprint(found.state) == fingerprint(other.state)


def differs(name: str, head_only: bool) -> set[str]:
    found = Federation(name).repeat(1)
    found.own(0)
    before = state_of(found.client.model)
    found.own(0, epochs=2, head_only=head_only)
    return {key for key, value in state_of(found.client.model).items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize("name", ["FedAvg", "FedRep", "FedBABU", "FedBN", "FedSQ"])
def test_fine_tuning_of_the_head_moves_nothing_else(name: str) -> None:
    assert differs(name, head_only=True) == {"3.weight", "3.bias"}


@pytest.mark.parametrize("name", ["FedAvg", "FedBABU", "FrozenBN"])
def test_fine_tuning_of_all_moves_all(name: str) -> None:
    # A bias before a batch normalisation has no gradient.
    assert differs(name, head_only=False) >= set(state_of(mlp())) - {"0.bias"}


def test_fine_tuning_has_its_own_seed_and_the_rounds_rate() -> None:
    found, expected = client("FedAvg"), mlp()
    losses: list[torch.Tensor] = []
    found.personalise(2, DATA[2], 3, head_only=False, on_step=losses.append)
    assert len(losses) == 3 * len(list(DATA[2]))
    seed = derive("finetune", 3, 2)
    local_update(expected, DATA[2], TRAINING, [Phase(3, frozenset(Role))], found.roles, round=4, seed=seed)
    assert fingerprint(state_of(found.model)) == fingerprint(state_of(expected))


def test_fine_tuning_is_the_same_for_every_algorithm() -> None:
    found = []
    for name in ("FedAvg", "FedProx"):
        one = client(name, changed(fedprox_mu=1.0))
        one.personalise(0, DATA[0], 2, head_only=False)
        found.append(fingerprint(state_of(one.model)))
    assert found[0] == found[1]


def test_without_epochs_nothing_is_trained() -> None:
    found = client("FedAvg")
    found.personalise(0, [], 0, head_only=True)
    assert fingerprint(state_of(found.model)) == fingerprint(state_of(mlp()))


def test_kept_optimizers_are_each_silos_own_and_need_a_constant_rate() -> None:
    training = OptimizerTraining(optimizer=torch.optim.Adam, learning_rate=0.01)
    one = Client(mlp(), algorithm("FedAvg"), OPTIONS, training, seed=0, keep_optimizers=True)
    begun, batches = state_of(one.model), silos()[0]
    results = []
    for silo, round in ((0, 0), (1, 0), (0, 1)):
        one.model.load_state_dict(begun)
        one.train(silo, batches, round)
        results.append(state_of(one.model))
    anew = Client(mlp(), algorithm("FedAvg"), OPTIONS, training, seed=0)
    anew.train(1, batches, 0)
    assert fingerprint(results[1]) == fingerprint(state_of(anew.model))
    anew.model.load_state_dict(begun)
    anew.train(0, batches, 1)
    assert fingerprint(results[2]) != fingerprint(state_of(anew.model))
    with pytest.raises(ConfigError, match="constant"):
        schedule = LocalTraining(lr_schedule="cosine")
        Client(mlp(), algorithm("FedAvg"), OPTIONS, schedule, seed=0, keep_optimizers=True)


def test_forgotten_optimizers_begin_anew_and_are_one_silos() -> None:
    training = OptimizerTraining(optimizer=torch.optim.Adam, learning_rate=0.01)

    def trained(forget: int | None) -> State:
        one = Client(mlp(), algorithm("FedAvg"), OPTIONS, training, seed=0, keep_optimizers=True)
        begun = state_of(one.model)
        for round in range(2):
            one.model.load_state_dict(begun)
            if round and forget is not None:
                one.forget_optimizers(forget)
            one.train(0, DATA[0], round)
        return state_of(one.model)

    anew = Client(mlp(), algorithm("FedAvg"), OPTIONS, training, seed=0)
    anew.train(0, DATA[0], 1)
    assert fingerprint(trained(forget=0)) == fingerprint(state_of(anew.model))
    assert fingerprint(trained(forget=1)) == fingerprint(trained(forget=None))
    assert fingerprint(trained(forget=0)) != fingerprint(trained(forget=None))


# What it receives


def moved() -> State:
    """Other weights than the warm start's."""
    found = state_of(mlp())
    found["0.weight"] = found["0.weight"] + 1
    return found


def dual(found: Client) -> DualCopy:
    assert isinstance(found.model, DualCopy)
    return found.model


def follow(found: Client, fingerprint: str | None, structural: State | None = None) -> None:
    """Receive the weights that the silo has, and the announcement of a structural copy."""
    found.receive(Assignment(state_of(found.model), Announcement(fingerprint, structural)))


def test_weights_are_loaded_and_the_rest_of_the_model_stays() -> None:
    found = client("FedRep")
    body = {key: value for key, value in moved().items() if not key.startswith("3.")}
    found.model.load_state_dict({"3.bias": torch.tensor([7.0, 8.0])}, strict=False)
    found.receive(Assignment(State(body)))
    assert torch.equal(found.model.state_dict()["0.weight"], moved()["0.weight"])
    assert found.model.state_dict()["3.bias"].tolist() == [7.0, 8.0]


def test_whole_model_is_where_the_silos_own_parts_begin() -> None:
    found, given = client("FedRep"), moved()
    given["3.bias"] = torch.tensor([7.0, 8.0])
    found.receive(Assignment(given))
    found.states.load(0, found.model)
    assert found.model.state_dict()["3.bias"].tolist() == [7.0, 8.0]


def test_received_weights_are_not_shared_with_the_model() -> None:
    found, given = client("FedAvg"), moved()
    before = fingerprint(given)
    found.receive(Assignment(given))
    found.train(0, DATA[0], 0)
    assert fingerprint(given) == before


def test_weights_that_came_are_its_structural_copy() -> None:
    found = client("FedSQ")
    found.receive(Assignment(moved(), Announcement(fingerprint(moved()))))
    assert fingerprint(dual(found).structural.state_dict()) == fingerprint(moved())
    assert found.structural_fingerprint == fingerprint(moved())


def test_state_that_came_with_the_announcement_is_its_structural_copy() -> None:
    found = client("FedSQ")
    follow(found, fingerprint(moved()), moved())
    assert fingerprint(dual(found).structural.state_dict()) == fingerprint(moved())
    assert fingerprint(dual(found).quantitative.state_dict()) == fingerprint(state_of(mlp()))


@pytest.mark.parametrize("given", [None, state_of(mlp())], ids=["weights", "state"])
def test_another_structural_copy_than_the_servers_is_refused(given: State | None) -> None:
    expected, own = fingerprint(moved()), fingerprint(state_of(mlp()))
    message = f"the structural copy is {own[:12]}…, the server announced {expected[:12]}…"
    with pytest.raises(UpdateError, match=message):
        follow(client("FedSQ"), expected, given)


def test_without_an_announcement_the_structural_copy_stays() -> None:
    found = client("FedSQ")
    found.receive(Assignment(moved()))
    assert fingerprint(dual(found).structural.state_dict()) == fingerprint(state_of(mlp()))


def test_without_a_fingerprint_the_copy_is_given_up() -> None:
    found = client("FedSQ")
    follow(found, fingerprint(moved()), moved())
    follow(found, None)
    assert dual(found).unfrozen
    assert found.structural_fingerprint is None


def test_structural_copy_does_not_share_the_announced_tensors() -> None:
    found, given = client("FedSQ"), moved()
    follow(found, fingerprint(given), given)
    given["0.weight"].zero_()
    assert fingerprint(dual(found).structural.state_dict()) == fingerprint(moved())


def test_second_silo_of_a_process_keeps_the_copy_that_the_first_was_told_of() -> None:
    found = client("FedSQ")
    follow(found, fingerprint(moved()), moved())
    found.train(0, DATA[0], 0)
    found.receive(Assignment(state_of(mlp()), Announcement(fingerprint(moved()), moved())))
    assert fingerprint(dual(found).structural.state_dict()) == fingerprint(moved())


def test_unfrozen_silo_trains_as_fedavg_does() -> None:
    def trained(name: str, told: Announcement | None = None) -> str:
        found = client(name)
        found.receive(Assignment(moved(), told))
        found.train(0, [corners(16, seed=3)], 0)
        return fingerprint(state_of(found.model))

    assert trained("FedSQ", Announcement(None)) == trained("FedAvg")
    assert trained("FedSQ") != trained("FedAvg")  # under the warm start's gates


# Its answer


@pytest.mark.parametrize(
    ("name", "round", "keys"),
    [
        ("FedAvg", 0, list(state_of(mlp()))),
        ("FedSQ", 0, list(state_of(mlp()))),
        ("FedRep", 0, [key for key in state_of(mlp()) if not key.startswith("3.")]),
        ("FedBN", 0, [key for key in state_of(mlp()) if not key.startswith("1.")]),
        ("FedNCM", 0, ["fedsq:sums:class sums"]),
        ("FedNCM", 1, list(state_of(mlp()))),
    ],
)
def test_answer_is_what_travels_and_the_sums(name: str, round: int, keys: list[str]) -> None:
    found = client(name)
    result = found.train(0, DATA[0], round)
    answer = found.answer(round, result.sums)
    assert list(answer) == keys
    assert all(torch.equal(answer[key], value) for key, value in state_of(found.model).items() if key in answer)


def test_answer_is_not_shared_with_the_model() -> None:
    found = client("FedAvg")
    found.train(0, DATA[0], 0)
    answer = found.answer(0, {})
    before = fingerprint(answer)
    found.train(1, DATA[1], 0)
    assert fingerprint(answer) == before


def test_resumed_client_has_the_servers_model_its_gates_and_the_silos_parts() -> None:
    whole = Federation("FedSQ+FedRep", options=changed(structural_copy="ema")).repeat(3)
    found = Federation("FedSQ+FedRep", options=changed(structural_copy="ema")).client
    found.resume(whole.own_server.state, whole.client.states.tensors())
    assert fingerprint(state_of(found.model)) == fingerprint(whole.state)
    structural = whole.own_server.state.structural
    assert structural is not None
    assert fingerprint(dual(found).structural.state_dict()) == fingerprint(structural)
    assert fingerprint(found.states.tensors()) == fingerprint(whole.client.states.tensors())


# What it cannot train on


class Counting(nn.Sequential):
    """Counts its forwards in its extra state."""

    count = 3

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        found: Tensor = super().forward(x)
        return found

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ", "FedBN", "FedMR"])
def test_extra_state_stays_with_the_model_and_is_the_same_for_every_silo(name: str) -> None:
    found = Federation(name, Counting(*mlp())).repeat(2)
    expected = Federation(name).repeat(2)
    assert fingerprint(found.state) == fingerprint(expected.state)
    found.client.receive(Assignment(found.own_server.travelling(found.state)))
    trained = found.client.model
    assert (trained.quantitative if isinstance(trained, DualCopy) else trained).count == 3


def test_batch_of_one_sample_names_the_silo() -> None:
    x, labels = corners(9, seed=0)
    with pytest.raises(BatchError, match=r"^silo 7: the model does not train on a batch of the shape 1x2: .*drop_last"):
        client("FedAvg").train(7, [(x[:8], labels[:8]), (x[8:], labels[8:])], 0)


def test_batches_that_can_be_passed_only_once_are_refused() -> None:
    found = client("FedAvg")
    with pytest.raises(ConfigError, match=r"^silo 7: the training data are a list_iterator"):
        found.train(7, iter(DATA[0]), 0)
    assert fingerprint(state_of(found.model)) == fingerprint(state_of(mlp()))


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ", "FedRep", "FedMR", "FedNCM"])
def test_silo_without_a_batch_is_left_out_and_noted(name: str) -> None:
    def run(data: dict[int, Any], silos: list[int]) -> tuple[State, list[str]]:
        found = Federation(name, data=list(data.values()))
        found.samples = {silo: 100 + silo for silo in data}  # what an idle silo says of itself
        for number in range(2):
            record = RoundRecord(number + 1)
            current = Round(found.server, silos, found.samples, record)
            for silo, assignment in current.assignments.items():
                current.take(silo, found.silos.train(silo, number, assignment))
            current.close()
        return found.state, record.notes

    idle: dict[int, Any] = {0: DATA[0], 1: [], 2: DATA[2]}
    (state, notes), (expected, none) = run(idle, [0, 1, 2]), run({**idle, 1: DATA[1]}, [0, 2])
    if name != "FedMR":  # which recombines the model that the idle silo began with
        assert fingerprint(state) == fingerprint(expected)
    assert [note.partition(":")[2].partition(" and")[0] for note in notes] == [" silo 1 has no batch to train on"]
    assert none == []


def test_round_in_which_no_silo_has_a_batch_is_one_line() -> None:
    with pytest.raises(UpdateError, match=r"no update is left to aggregate: round 1: silo 0 has no batch .*silo 1 has"):
        Federation("FedAvg", data=[[], []]).repeat(1)


def test_round_of_no_epochs_is_no_idle_one() -> None:
    assert Federation("FedAvg", options=changed(epochs=0)).repeat(1).answers[0][0].keys() == state_of(mlp()).keys()


class Moving(nn.Sequential):
    """Counts its steps in an attribute on which its outputs depend."""

    def __init__(self) -> None:
        super().__init__(*mlp().children())
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        out: Tensor = super().forward(x)
        return out / (1 + self.steps)


def test_what_a_model_holds_beside_its_state_does_not_reach_the_next_silo() -> None:
    model = Moving()
    alone, after = (Client(copy.deepcopy(model), algorithm("FedAvg"), OPTIONS, TRAINING, seed=3) for _ in range(2))
    after.train(0, DATA[0], 0)
    for found in (alone, after):
        found.receive(Assignment(state_of(model)))
        found.train(1, DATA[1], 0)
    assert fingerprint(state_of(alone.model)) == fingerprint(state_of(after.model))


class Growing(Moving):
    """Keeps what it has seen, in a buffer that travels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean()[None]])
        return super().forward(x)


class Appearing(Moving):
    """Fills a buffer that is None at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        self.late = torch.zeros(3)
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Growing, r"entry 'seen' turns from \(0,\) torch.float32 into \(\d+,\) torch.float32"),
        (Appearing, "entry 'late' comes into being"),
    ],
)
def test_state_that_changes_its_form_is_refused_by_key(model: type[nn.Module], said: str) -> None:
    found = Client(model(), algorithm("FedAvg"), OPTIONS, TRAINING, seed=3)
    with pytest.raises(ConfigError, match=f"{said} while the model trains.*persistent=False"):
        found.train(0, DATA[0], 0)


def test_data_that_cannot_be_read_name_the_silo() -> None:
    class Broken(list[Any]):
        def __iter__(self) -> Any:
            yield from super().__iter__()
            raise OSError("no such sample")

    found = client("FedAvg")
    with pytest.raises(ConfigError, match=r"^silo 2: the data cannot be read \(OSError: no such sample\)"):
        found.train(2, Broken(DATA[2]), 0)
