"""What a user's own trainer gives as weights: taken as tensors, or refused by silo and key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation.state import State, fingerprint
from fedsq_plugin.hosts.fedml.weights import take_weights

from .conftest import MakeArgs, final, network, silos, simulate

Give = Callable[[State], Any]

TAKEN: dict[str, Give] = {
    "numpy arrays": lambda state: {key: value.numpy() for key, value in state.items()},
    "arrays that lie backwards in memory": lambda state: {
        key: value.numpy()[::-1].copy()[::-1] if value.dim() else value.numpy() for key, value in state.items()
    },
    "arrays of the other byte order": lambda state: {
        key: value.numpy().astype(value.numpy().dtype.newbyteorder()) for key, value in state.items()
    },
    "arrays of float64 without more digits": lambda state: {
        key: value.double().numpy() for key, value in state.items()
    },
    "Python's lists and numbers": lambda state: {key: value.tolist() for key, value in state.items()},
    "tensors with gradients": lambda state: {
        key: value.requires_grad_() if value.is_floating_point() else value for key, value in state.items()
    },
    "a plain dict of tensors": dict,
    "float64 tensors without more digits": lambda state: {key: value.double() for key, value in state.items()},
}


def own_trainer(give: Give, model: nn.Module) -> Any:
    from fedml.core import ClientTrainer

    class Trainer(ClientTrainer):  # type: ignore[misc]
        def get_model_params(self) -> Any:
            return give(OrderedDict((k, v.detach()) for k, v in self.model.state_dict().items()))

        def set_model_params(self, parameters: Any) -> None:
            self.model.load_state_dict(parameters)

        def train(self, train_data: Any, device: Any, args: Any) -> None:
            optimizer = torch.optim.SGD(self.model.train().parameters(), args.learning_rate)
            for x, labels in train_data:
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(x), labels).backward()
                optimizer.step()

    return Trainer(model, None)


def run(fedml: Any, make_args: MakeArgs, give: Give, **options: Any) -> Any:
    model = network()
    return simulate(fedml, make_args(**options), silos(), model, client_trainer=own_trainer(give, model))


def test_weights_of_every_form_are_as_good_as_tensors(fedml: Any, make_args: MakeArgs) -> None:
    expected = fingerprint(final(run(fedml, make_args, lambda state: state)))
    for name, give in TAKEN.items():
        assert fingerprint(final(run(fedml, make_args, give))) == expected, name


def _with(key: str, change: Callable[[Tensor], Any]) -> Give:
    return lambda state: {**state, key: change(state[key])}


@pytest.mark.parametrize(
    ("give", "line"),
    [
        (
            _with("0.weight", lambda value: value.double().numpy() / 3),
            "0.weight as a numpy ndarray of float64: it is float64, and the model's is float32, in which it is not "
            "the same; give it as float32",
        ),
        (_with("0.bias", lambda value: value.numpy().astype(str)), "0.bias as a numpy ndarray of <U32: it must be"),
        (_with("0.bias", lambda value: None), "0.bias as None: it must be a tensor or an array"),
        (_with("0.bias", lambda value: [[1.0], [1.0, 2.0]]), "0.bias as a list: "),
        (_with("0.bias", lambda value: value.to(torch.complex64)), "it is complex64, and the model's is float32"),
        (_with("0.bias", lambda value: value.to("meta")), "it must be a plain tensor that has values"),
        (_with("0.bias", lambda value: value.to_sparse()), "it must be a plain tensor that has values"),
        (_with("1.num_batches_tracked", lambda value: 2.5), "float64, and the model's is int64, in which"),
        (lambda state: list(state.values()), "gave a list; it must give a dict of tensors or arrays by the keys"),
        (lambda state: None, "gave None; it must give a dict"),
        (lambda state: dict(enumerate(state.values())), "gave the key 0; keys are those of"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_silo_and_key(
    give: Give, line: str, fedml: Any, make_args: MakeArgs
) -> None:
    with pytest.raises(UpdateError, match=r"^silo 0: get_model_params of your client_trainer gave") as refusal:
        run(fedml, make_args, give)
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_aggregator_may_hold_arrays(fedml: Any, make_args: MakeArgs) -> None:
    """It averages in float64, as numpy does by itself with such weights."""
    from fedml.core import ServerAggregator

    class Aggregator(ServerAggregator):  # type: ignore[misc]
        def get_model_params(self) -> Any:
            return {key: value.numpy() for key, value in self.model.state_dict().items()}

        def set_model_params(self, parameters: Any) -> None:
            self.model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in parameters.items()})

        def aggregate(self, updates: Any) -> Any:
            weights = np.array([samples for samples, _ in updates], dtype=np.float64)
            arrays = {key: np.stack([state[key].numpy() for _, state in updates]) for key in updates[0][1]}
            return {key: np.tensordot(weights / weights.sum(), value, 1) for key, value in arrays.items()}

        def test(self, test_data: Any, device: Any, args: Any) -> None:
            pass

    models = network(), network()
    args = make_args(federated_optimizer="FedAvg")
    parts = {"client_trainer": own_trainer(TAKEN["numpy arrays"], models[0])}
    ours = simulate(fedml, args, silos(), models[0], **parts)
    parts["client_trainer"] = own_trainer(TAKEN["numpy arrays"], models[1])
    theirs = simulate(fedml, args, silos(), models[1], **parts, server_aggregator=Aggregator(models[1], args))
    assert theirs.records[-1].notes == []
    for key, value in final(ours).items():
        if value.is_floating_point():  # a mean of counters is a fraction
            torch.testing.assert_close(final(theirs)[key], value)


def test_an_aggregator_derived_from_ours_may_give_a_mean_in_float64(fedml: Any, make_args: MakeArgs) -> None:
    from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator
    from fedsq_plugin.hosts.fedml.arguments import config_of
    from fedsq_plugin.run.plan import plan_of

    class Arrays(FedSQAggregator):
        def on_after_aggregation(self, result: Any) -> Any:
            return {key: value.double().numpy() for key, value in super().on_after_aggregation(result).items()}

    args, model = make_args(), network()
    plan = plan_of(config_of(args), model)
    derived = simulate(fedml, args, silos(), model, server_aggregator=Arrays(model, args, plan))
    assert fingerprint(final(derived)) == fingerprint(final(simulate(fedml, make_args(), silos(), network())))


LIKE = {"float": torch.zeros(1), "int": torch.zeros(1, dtype=torch.int64), "half": torch.zeros(1, dtype=torch.half)}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("float", np.array([float("nan")], dtype=np.float64), torch.tensor([float("nan")])),
        ("float", np.array([float("-inf")], dtype=np.float64), torch.tensor([float("-inf")])),
        ("float", np.array([2**24], dtype=np.int64), torch.tensor([2.0**24])),
        ("float", np.array([2**24 + 1], dtype=np.int64), None),
        ("float", np.array([1e300]), None),
        ("float", [1e300], None),
        ("float", [0.1], torch.tensor([0.1])),
        ("half", [65504.0], torch.tensor([65504.0], dtype=torch.half)),
        ("int", [2**53 + 1], torch.tensor([2**53 + 1])),
        ("int", np.array([2.0**63]), None),
        ("int", [float("nan")], None),
        ("int", np.array([7.0], dtype=np.float32), torch.tensor([7])),
        ("unknown", np.array([0.1]), torch.tensor([0.1], dtype=torch.float64)),
    ],
)
def test_dtypes_change_where_nothing_is_lost(key: str, value: Any, expected: Tensor | None) -> None:
    if expected is None:
        with pytest.raises(UpdateError, match=f"who gave {key} as"):
            take_weights({key: value}, LIKE, "who")
        return
    found = take_weights({key: value}, LIKE, "who")[key]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
