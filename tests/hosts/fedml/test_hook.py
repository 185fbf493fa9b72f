"""What `register()` changes in FedML, and what it leaves alone."""

from __future__ import annotations

import copy
import logging
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import fedsq_plugin
from fedsq_plugin import DualCopy, models
from fedsq_plugin.errors import ConfigError, GateError, WeightsError
from fedsq_plugin.federation.state import fingerprint
from fedsq_plugin.hosts.fedml import hook
from fedsq_plugin.hosts.fedml.simulation import Simulation

from .conftest import MakeArgs, final, network, silos, simulate
from .naive import eight


def test_registering_twice_changes_nothing(fedml: Any) -> None:
    before = (fedml.FedMLRunner.__init__, fedml.model.create, fedml.data.load)
    fedsq_plugin.register()
    assert before == (fedml.FedMLRunner.__init__, fedml.model.create, fedml.data.load)


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "FedNova"])
def test_fedmls_own_optimizers_stay_fedmls(name: str, fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(federated_optimizer=name, mu=0.0, gmf=0.0, momentum=0.0, dampening=0.0)
    runner = fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())
    assert type(runner.runner).__name__ == "SimulatorSingleProcess"
    assert type(runner.runner.fl_trainer).__module__.startswith("fedml.")


def test_our_rows_run_in_our_simulation(fedml: Any, make_args: MakeArgs) -> None:
    runner = fedml.FedMLRunner(make_args(), torch.device("cpu"), silos(), network())
    assert isinstance(runner.runner, Simulation)


def test_an_algorithm_flow_is_left_alone(fedml: Any, make_args: MakeArgs) -> None:
    flow = object()
    assert fedml.FedMLRunner(make_args(), "cpu", silos(), network(), algorithm_flow=flow).runner is flow


def test_an_unknown_optimizer_is_an_error_with_the_nearest_name(fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match=r"federated_optimizer 'FedSq' is unknown; did you mean 'FedSQ'"):
        fedml.FedMLRunner(make_args(federated_optimizer="FedSq"), "cpu", silos(), network())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"backend": "NCCL"}, "comes without its NCCL simulation; use backend: MPI"),
        ({"training_type": "cross_silo", "scenario": "hierarchical"}, "use scenario: horizontal"),
        ({"training_type": "cross_silo", "backend": "TRPC"}, "TRPC ends before the training does"),
        ({"training_type": "cross_silo", "backend": "MQTT_S3"}, "a broker and a store"),
        ({"training_type": "cross_silo"}, "backend sp, common_args.training_type cross_silo: .* not run"),
    ],
)
def test_a_road_that_cannot_be_gone_is_one_clear_line(
    options: dict[str, str], line: str, fedml: Any, make_args: MakeArgs
) -> None:
    args = make_args()
    for key, value in options.items():
        setattr(args, key, value)
    with pytest.raises(ConfigError, match=line):
        fedml.FedMLRunner(args, "cpu", silos(), network())


@pytest.mark.parametrize("options", [{"backend": "NCCL"}, {"training_type": "cross_silo", "scenario": "hierarchical"}])
def test_a_road_that_fedml_cannot_go_ends_before_its_start(
    options: dict[str, str], fedml: Any, make_args: MakeArgs
) -> None:
    with pytest.raises(ConfigError, match=r"FedML 0\.9\.6 (comes without|ends a hierarchical)"):
        make_args(**options)


def test_a_gpu_that_is_not_there_is_an_error(fedml: Any, make_args: MakeArgs) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; run on one without to see the refusal")
    args = make_args(using_gpu=True)
    with pytest.raises(ConfigError, match="using_gpu is true, but no GPU"):
        fedml.FedMLRunner(args, fedml.device.get_device(args), silos(), network())


def test_homomorphic_encryption_is_refused(fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match="enable_fhe"):
        fedml.FedMLRunner(make_args(enable_fhe=True), "cpu", silos(), network())


@pytest.fixture
def init(make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fedml: Any) -> Any:
    """`fedml.init` on a recipe with some text added to it."""

    def make(added: str, **overrides: Any) -> Any:
        path = Path(make_args(**overrides).yaml_paths[0])
        path.write_text(path.read_text() + added)
        return fedml.init()

    return make


def test_unknown_keys_in_our_families_are_errors(fedml: Any, init: Any) -> None:
    args = init("fedsq_args: {small_image: true}\n")
    with pytest.raises(ConfigError, match="small_image is unknown; did you mean 'small_images'"):
        fedml.FedMLRunner(args, "cpu", silos(), network())


TWICE = "more_args:\n  a: 1\n  a: 2\n"


def test_fedmls_own_recipe_may_have_a_key_twice(fedml: Any, init: Any) -> None:
    """It runs without the plugin, so it runs under the launcher."""
    args = init(TWICE, federated_optimizer="FedAvg")
    assert args.a == 2
    fedml.FedMLRunner(args, "cpu", silos(), network())


@pytest.mark.parametrize(("added", "name"), [(TWICE, "FedSQ"), (TWICE + "fedsq_args: {threads: 1}\n", "FedAvg")])
def test_a_key_twice_is_an_error_where_something_of_ours_runs(added: str, name: str, fedml: Any, init: Any) -> None:
    with pytest.raises(ConfigError, match=r"^a stands twice, again at line \d+, column 3$"):
        fedml.FedMLRunner(init(added, federated_optimizer=name), "cpu", silos(), network())


def test_a_misspelt_family_of_ours_is_an_error_under_fedmls_own_optimizer(fedml: Any, init: Any) -> None:
    args = init("fedsq_arg: {threads: 1}\n", federated_optimizer="FedAvg")
    with pytest.raises(ConfigError, match="family fedsq_arg is unknown; did you mean 'fedsq_args'"):
        fedml.FedMLRunner(args, "cpu", silos(), network())


def test_keys_that_are_fedmls_business_are_warnings(fedml: Any, init: Any, caplog: pytest.LogCaptureFixture) -> None:
    args = init("more_args: {epochs: 1, learning_rte: 3}\n")
    fedml.FedMLRunner(args, "cpu", silos(), network())
    assert "epochs stands in train_args and in more_args; FedML keeps one of them" in caplog.messages


def test_shared_values_are_merged_as_yaml_says(fedml: Any, init: Any, caplog: pytest.LogCaptureFixture) -> None:
    shared = "x-shared: &shared {warm_start_epochs: 3, clip_norm: 1.0}\n"
    args = init(shared + "fedsq_args: {<<: *shared, clip_norm: 2.0}\n")
    fedml.FedMLRunner(args, "cpu", silos(), network())
    assert (args.warm_start_epochs, args.clip_norm) == (3, 2.0)
    assert not any("FedML keeps one of them" in line for line in caplog.messages)


def test_fedmls_own_algorithm_gets_a_number_that_yaml_reads_as_text(fedml: Any, make_args: MakeArgs) -> None:
    assert make_args(federated_optimizer="FedAvg", learning_rate="1e-3").learning_rate == 0.001


def test_fedmls_loader_is_not_asked_for_a_partition_that_it_has_not(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(dataset="cifar10", partition_method="dirichlet")
    with pytest.raises(ConfigError, match=r"^data_args\.partition_method 'dirichlet' is unknown; known: hetero"):
        fedml.data.load(args)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"client_optimizer": "adam", "momentum": 0.5}, "train_args.momentum has no effect: adam has none"),
        (
            {"federated_optimizer": "FedAvg", "clip_norm": 1.0},
            "fedsq_args.clip_norm has no effect: FedML's own FedAvg runs the rounds",
        ),
    ],
)
def test_options_without_effect_are_warnings(
    options: dict[str, Any], line: str, fedml: Any, make_args: MakeArgs, caplog: pytest.LogCaptureFixture
) -> None:
    fedml.FedMLRunner(make_args(**options), "cpu", silos(), network())
    assert line in caplog.messages


def test_threads_count_under_fedmls_own_optimizer(fedml: Any, make_args: MakeArgs) -> None:
    before = torch.get_num_threads()
    try:
        args = make_args(federated_optimizer="FedAvg", threads=before + 1)
        fedml.FedMLRunner(args, "cpu", silos(), network())
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_second_runner_on_the_same_arguments_runs_the_same_algorithm(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args()
    for _ in range(2):
        runner = fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())
        assert isinstance(runner.runner, Simulation)
        assert runner.runner.plan.algorithm.name == args.fedsq_algorithm == args.federated_optimizer == "FedSQ"


def test_a_name_that_a_script_sets_for_the_second_runner_counts(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args()
    fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())
    args.federated_optimizer = "FedAvg"
    runner = fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())
    assert type(runner.runner).__name__ == "SimulatorSingleProcess"


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))])
def test_a_copy_of_used_arguments_keeps_the_algorithm(copier: Any, fedml: Any, make_args: MakeArgs) -> None:
    args = make_args()
    fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())
    runner = fedml.FedMLRunner(copier(args), torch.device("cpu"), silos(), network())
    assert runner.runner.plan.algorithm.name == "FedSQ"


def test_gate_options_reach_a_dualcopy_model(fedml: Any, make_args: MakeArgs) -> None:
    options = {"model": "dualcopy_resnet18", "gate_pooling": "own", "gate_accept": ["layer1.*"]}
    model = fedml.model.create(make_args(**options), 3)
    images = torch.randn(2, 3, 32, 32)
    kinds = {gate.kind for gate in model.gates(images)}
    routed = {gate.kind for gate in DualCopy(model.quantitative).gates(images)}
    assert len(routed - kinds) == 1  # the max-pooling
    assert model._accept == ("layer1.*",)


def test_a_dualcopy_model_starts_from_the_same_weights_as_the_plain_one(fedml: Any, make_args: MakeArgs) -> None:
    plain, dual = (fedml.model.create(make_args(model=name), 3) for name in ("resnet18", "dualcopy_resnet18"))
    for key, value in plain.state_dict().items():
        assert torch.equal(dual.state_dict()[key], value)


def test_model_seed_decides_the_weights_of_fedmls_own_models(fedml: Any, make_args: MakeArgs) -> None:
    options = {"model": "lr", "dataset": "mnist"}
    weights = []
    for seed in (1, 1, 2):
        args = make_args(**options, model_seed=seed)
        torch.manual_seed(len(weights))
        before = torch.get_rng_state()
        weights.append(fedml.model.create(args, 10).linear.weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_without_a_model_seed_fedmls_own_models_draw_as_ever(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(model="lr", dataset="mnist")
    torch.manual_seed(5)
    expected = torch.nn.Linear(28 * 28, 10).weight
    torch.manual_seed(5)
    assert torch.equal(fedml.model.create(args, 10).linear.weight, expected)


def test_a_model_that_cannot_be_gated_advises_the_recipes_key(fedml: Any, make_args: MakeArgs) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.GELU(), torch.nn.ReLU())
    with pytest.raises(GateError, match=r"fedsq_args\.gate_accept: \['1'\]"):
        fedml.FedMLRunner(make_args(), "cpu", silos(), model)


def test_weights_that_do_not_fit_advise_the_recipes_key(fedml: Any, make_args: MakeArgs, tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    torch.save(models.create("resnet18", 3, small_images=True).state_dict(), path)
    args = make_args(warm_start="file", warm_start_file=str(path))
    model = fedml.model.create(args, 3)
    images = TensorDataset(torch.zeros(6, 3, 32, 32), torch.arange(6) % 3)
    with pytest.raises(WeightsError, match=r"this file needs fedsq_args\.small_images: true"):
        fedml.FedMLRunner(args, "cpu", eight(([images] * 3, images), 3), model)


def test_imagenet_for_a_model_that_is_fedmls_is_one_clear_line(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(warm_start="imagenet", model="resnet56")
    with pytest.raises(ConfigError, match="no such weights for resnet56"):
        fedml.FedMLRunner(args, "cpu", silos(), network())


def test_models_of_ours_are_created_by_name(fedml: Any, make_args: MakeArgs) -> None:
    model = fedml.model.create(make_args(model="resnet18", small_images=True), 7)
    assert model.fc.out_features == 7
    assert model.conv1.kernel_size == (3, 3)


def test_a_dualcopy_model_trains_under_fedmls_own_optimizer(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(
        **{"model": "dualcopy_resnet18", "small_images": True, "federated_optimizer": "FedAvg"},
        **{"client_num_in_total": 1, "client_num_per_round": 1, "comm_round": 1},
    )
    model = fedml.model.create(args, 3)
    assert isinstance(model, DualCopy)
    data = silos((8,))
    for loader in (data[3], data[5][0]):
        points, labels = loader.dataset.tensors
        loader.dataset.tensors = (points.repeat(1, 32).view(-1, 3, 8, 8), labels)
    before = model.structural.conv1.weight.clone()
    fedml.FedMLRunner(args, torch.device("cpu"), data, model).run()
    assert torch.equal(model.structural.conv1.weight, before)
    assert not torch.equal(model.quantitative.conv1.weight, before)


def test_fedmls_own_models_are_left_alone(fedml: Any, make_args: MakeArgs) -> None:
    model = fedml.model.create(make_args(model="lr", dataset="mnist"), 10)
    assert type(model).__module__ == "fedml.model.linear.lr"


def test_an_unknown_model_is_an_error(fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match=r"'resnet19' is unknown to FedML.*did you mean 'resnet1"):
        fedml.model.create(make_args(model="resnet19"), 10)


def test_a_model_that_fedml_has_for_other_data_is_an_error(fedml: Any, make_args: MakeArgs) -> None:
    line = "'cnn' is unknown to FedML for cifar10; it is FedML's for mnist, femnist"
    with pytest.raises(ConfigError, match=line):
        fedml.model.create(make_args(model="cnn", dataset="cifar10"), 10)


def test_a_model_that_fedml_cannot_make_is_an_error(fedml: Any, make_args: MakeArgs) -> None:
    """FedML 0.9.6 calls its EfficientNet without the arguments that it insists on."""
    line = r"'efficientnet': FedML cannot make it for cifar10 \(AssertionError: blocks_args"
    with pytest.raises(ConfigError, match=line):
        fedml.model.create(make_args(model="efficientnet", dataset="cifar10"), 10)


def test_an_unknown_data_set_is_an_error_instead_of_cifar10(fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match="dataset 'digit' is unknown; did you mean 'digits'"):
        fedml.data.load(make_args(dataset="digit"))


def test_model_seed_decides_the_initial_weights(fedml: Any, make_args: MakeArgs) -> None:
    first, again, other = (
        fedml.model.create(make_args(model="resnet18", random_seed=r, model_seed=m), 10).fc.weight
        for r, m in ((0, 1), (5, 1), (0, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_missing_recipe_is_not_swallowed(fedml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedML goes on without any option."""
    monkeypatch.setattr(sys, "argv", ["main.py", "--cf", "no-such.yaml"])
    with pytest.raises(ConfigError, match=r"recipe no-such.yaml: No such file"):
        fedml.init()


def test_a_broken_recipe_is_not_swallowed(fedml: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("common_args: {training_type: simulation\ntrain_args: ]")
    monkeypatch.setattr(sys, "argv", ["main.py", "--cf", str(path)])
    with pytest.raises(ConfigError, match="no valid YAML at line 2"):
        fedml.init()


@pytest.mark.parametrize(
    "road", [{}, {"training_type": "cross_silo", "backend": "GRPC", "worker_num": 2, "client_id_list": None}]
)
def test_fedml_init_asks_the_network_for_nothing(
    road: dict[str, Any], make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedML tries five times, half a second apart; across silos it asks three services of its platform."""
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    make_args(**road)
    assert asked == []


def test_mpi_that_is_not_installed_is_one_line(make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"comm_args.backend MPI: .*; pip install 'fedsq-plugin\[mpi\]'"):
        make_args(backend="MPI")


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (None, "grpc_ipconfig_path is missing: a CSV file with the columns eid,rank"),
        ("none.csv", "none.csv cannot be read .*No such file"),
        ("receiver_id,ip\n0,127.0.0.1\n", r"cannot be read \('rank'\); its columns are eid,rank"),
        ("eid,rank,grpc_server_ip,grpc_server_port\n0,0,127.0.0.1,9\n", "has no row for rank 1, 2"),
    ],
)
def test_a_wrong_table_of_addresses_is_found_before_the_warm_start(
    table: str | None, line: str, fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "none.csv"
    if table and "," in table:
        path = tmp_path / "table.csv"
        path.write_text(table)
    known = {"grpc_ipconfig_path": str(path)} if table else {}
    args = make_args(training_type="cross_silo", backend="GRPC", worker_num=2, **known)
    monkeypatch.setattr(hook, "warm_start", lambda *_: pytest.fail("it came to the warm start"))
    with pytest.raises(ConfigError, match=line):
        fedml.FedMLRunner(args, "cpu", silos(), network())


def test_logging_and_printing_survive_fedml_init(make_args: MakeArgs, capsys: pytest.CaptureFixture[str]) -> None:
    """FedML replaces logging.root, which silences named loggers, and sys.stdout.write."""
    root, seen = logging.root, []
    root.handlers, root.level = [], logging.WARNING  # as in a main.py that sets up no logging
    make_args()
    assert logging.root is root is logging.getLogger()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Keep()
    root.addHandler(handler)
    try:
        logging.getLogger("somebody.else").info("still heard")
    finally:
        root.removeHandler(handler)
    assert "still heard" in seen
    capsys.readouterr()
    print("plain")
    assert capsys.readouterr().out == "plain\n"


IGNORED = {"momentum": 0.9, "weight_decay": 0.01, "lr_schedule": "cosine"}


@pytest.mark.parametrize("name", ["FedAvg", "FedProx"])
def test_what_fedmls_own_loop_ignores_is_said_in_a_line_each(name: str, fedml: Any, make_args: MakeArgs) -> None:
    """With a family of ours in the recipe, and without."""
    for options in (IGNORED, {"momentum": 0.9, "weight_decay": 0.01}):
        runner = fedml.FedMLRunner(
            make_args(federated_optimizer=name, **options), torch.device("cpu"), silos(), network()
        )
        assert type(runner.runner).__name__ == "SimulatorSingleProcess"
        *said, way_out = runner.notes
        assert way_out == f"to run the plugin's {name} in place of FedML's own, set fedsq_args.own_algorithms: true"
        for key, line in zip(options, said, strict=True):
            assert line.partition(".")[2].startswith(f"{key} has no effect: FedML's own {name} ")


def test_an_optimizer_that_fedml_takes_for_adam_is_said(fedml: Any, make_args: MakeArgs) -> None:
    for word, said in {"SGD": True, "adamw": True, "sgd": False, "adam": False}.items():
        args = make_args(federated_optimizer="FedAvg", client_optimizer=word, weight_decay=0.0)
        notes = fedml.FedMLRunner(args, torch.device("cpu"), silos(), network()).notes
        assert any(f"client_optimizer is {word}" in line for line in notes) == said
        assert len(notes) == 2 * said


@pytest.mark.parametrize(
    ("name", "read", "options"),
    [
        ("FedNova", {"momentum": 0.9}, {"mu": 0.0, "gmf": 0.0, "dampening": 0.0, "wd": 0.0}),
        ("FedDyn", {"weight_decay": 0.1}, {"feddyn_alpha": 0.1, "initialize_all_clients": False}),
    ],
)
def test_what_one_of_fedmls_algorithms_reads_is_not_said_to_be_ignored(
    name: str, read: dict[str, float], options: dict[str, Any], fedml: Any, make_args: MakeArgs
) -> None:
    args = make_args(federated_optimizer=name, **read, **options)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 3))  # FedML's FedDyn takes no buffers
    assert fedml.FedMLRunner(args, torch.device("cpu"), silos(), plain).notes == []


@pytest.mark.parametrize("name", ["FedAvg", "FedProx"])
def test_own_algorithms_is_the_attribute_in_a_recipe(name: str, fedml: Any, make_args: MakeArgs) -> None:
    """Momentum acts, and the weights are those with the attribute."""
    options = {"federated_optimizer": name, "momentum": 0.9}
    runs = [
        simulate(fedml, make_args(**options, **own), silos(), network())
        for own in ({"own_algorithms": True}, {"fedsq_own_rows": True})
    ]
    assert isinstance(runs[0], Simulation)
    assert fingerprint(final(runs[0])) == fingerprint(final(runs[1]))
    runner = fedml.FedMLRunner(make_args(**options, own_algorithms=False), torch.device("cpu"), silos(), network())
    assert type(runner.runner).__name__ == "SimulatorSingleProcess"


def test_own_algorithms_that_is_no_switch_is_an_error(fedml: Any, init: Any) -> None:
    args = init("fedsq_args: {own_algorithms: perhaps}\n", federated_optimizer="FedAvg")
    with pytest.raises(ConfigError, match=r"fedsq_args\.own_algorithms is 'perhaps'"):
        fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())


def test_own_algorithms_cannot_run_what_fedml_alone_has(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(federated_optimizer="Mime", own_algorithms=True)
    with pytest.raises(ConfigError, match=r"'Mime' is FedML's alone, and fedsq_args.own_algorithms is true"):
        fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())
