"""Options: what is accepted, and the line that says what is wrong."""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsq_plugin.settings.config import FAMILIES, OPTIONS, OURS, Config, Finding, family_of, parse, validated

REQUIRED = {
    "dataset": "digits",
    "model": "resnet18",
    "federated_optimizer": "FedSQ",
    "client_num_in_total": 4,
    "client_num_per_round": 2,
    "comm_round": 3,
}


def accepted(**options: Any) -> Config:
    config, problems = parse({**REQUIRED, **options})
    assert problems == []
    assert config is not None
    return config


def refused(**options: Any) -> str:
    config, problems = parse({**REQUIRED, **options})
    assert config is None
    assert len(problems) == 1
    return problems[0].line


# What is accepted


def test_required_options_are_enough() -> None:
    assert accepted().model == "resnet18"


def test_options_without_a_default_are_the_required_ones() -> None:
    assert {key for key, option in OPTIONS.items() if option.required} == set(REQUIRED)


def test_keys_of_others_are_ignored() -> None:
    assert accepted(enable_wandb=False, run_id="0").comm_round == 3


def test_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        accepted().comm_round = 5


def test_number_that_yaml_reads_as_text() -> None:
    # YAML 1.1 wants a point in a float: `1e-3` is a string to PyYAML.
    assert accepted(learning_rate="1e-3").learning_rate == 0.001


@pytest.mark.parametrize("value", ["AdamW", "ADAMW", "adamw"])
def test_client_optimizer_in_any_case(value: str) -> None:
    assert accepted(client_optimizer=value).client_optimizer == "adamw"


@pytest.mark.parametrize(("value", "expected"), [([], ()), (["crop", "flip"], ("crop", "flip"))])
def test_list_becomes_a_tuple(value: list[str], expected: tuple[str, ...]) -> None:
    assert accepted(augmentation=value).augmentation == expected


def test_batch_size_minus_one_is_all_data() -> None:
    assert accepted(batch_size=-1).batch_size == -1


@pytest.mark.parametrize("purpose", ["data", "model", "sampling"])
def test_seed_of_a_purpose_falls_back_to_the_random_seed(purpose: Any) -> None:
    assert accepted(random_seed=7).seed(purpose) == 7


@pytest.mark.parametrize("purpose", ["data", "model", "sampling"])
@pytest.mark.parametrize("value", [0, 5])
def test_seed_of_a_purpose_is_its_own_where_given(purpose: Any, value: int) -> None:
    # 0 is a seed, not the lack of one.
    assert accepted(random_seed=7, **{f"{purpose}_seed": value}).seed(purpose) == value


def test_seed_of_one_purpose_leaves_the_others() -> None:
    config = accepted(random_seed=7, data_seed=5)
    assert (config.seed("model"), config.seed("sampling")) == (7, 7)


def test_home_in_the_cache_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert accepted(warm_start_cache_dir="~/cache").cache_dir == Path("/home/someone/cache")


# What is refused


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_missing_option_is_named_with_its_family_and_meaning(key: str) -> None:
    config, problems = parse({name: value for name, value in REQUIRED.items() if name != key})
    line = f"{family_of(key)}.{key} is missing ({OPTIONS[key].meaning})"
    assert (config, problems) == (None, [Finding("missing", key, line)])


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("comm_round", "ten", "train_args.comm_round is 'ten': input should be a valid integer"),
        ("comm_round", 2.5, "train_args.comm_round is 2.5: input should be a valid integer"),
        ("comm_round", None, "train_args.comm_round is None: input should be a valid integer"),
        ("learning_rate", "fast", "train_args.learning_rate is 'fast': input should be a valid number"),
        ("learning_rate", [0.1], "train_args.learning_rate is [0.1]: input should be a valid number"),
        ("model", 18, "model_args.model is 18: input should be a valid string"),
        ("small_images", "maybe", "fedsq_args.small_images is 'maybe': input should be a valid boolean"),
        ("augmentation", "crop", "fedsq_args.augmentation is 'crop': input should be a list"),
    ],
)
def test_wrong_type(key: str, value: Any, line: str) -> None:
    assert refused(**{key: value}).startswith(line)


@pytest.mark.parametrize("key", ["clip_norm", "image_size", "learning_rate", "comm_round", "random_seed"])
@pytest.mark.parametrize("value", [True, False])
def test_switch_is_no_number(key: str, value: bool) -> None:
    line = f"{family_of(key)}.{key} is {value}: input should be a number, not a switch"
    assert refused(**{key: value}) == line


def test_switch_where_a_word_is_wanted_lists_the_words() -> None:
    # `warm_start: no` is False in YAML 1.1.
    assert refused(warm_start=False) == (
        "warm_start_args.warm_start is False: input should be 'none', 'imagenet', 'file' or 'public'"
    )


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("client_num_in_total", 0, "greater than or equal to 1"),
        ("client_num_per_round", 0, "greater than or equal to 1"),
        ("comm_round", 0, "greater than or equal to 1"),
        ("epochs", -1, "greater than or equal to 0"),
        ("random_seed", -1, "greater than or equal to 0"),
        ("learning_rate", 0, "greater than 0"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", float("inf"), "a finite number"),
        ("momentum", 1.0, "less than 1"),
        ("momentum", -0.1, "greater than or equal to 0"),
        ("weight_decay", -0.1, "greater than or equal to 0"),
        ("partition_alpha", 0, "greater than 0"),
        ("fedprox_mu", -1, "greater than or equal to 0"),
        ("frequency_of_the_test", 0, "greater than or equal to 1"),
        ("clip_norm", 0, "greater than 0"),
        ("image_size", 0, "greater than or equal to 1"),
        ("threads", 0, "greater than or equal to 1"),
        ("warm_start_public", 1.0, "less than 1"),
        ("warm_start_batch_size", 1, "greater than or equal to 2"),
    ],
)
def test_value_out_of_range(key: str, value: float, bound: str) -> None:
    line = refused(**{key: value})
    assert line.startswith(f"{family_of(key)}.{key} is {value!r}: input should be ")
    assert line.endswith(bound)


def test_word_that_is_none_of_the_choices_lists_them() -> None:
    assert refused(client_optimizer="lbfgs") == (
        "train_args.client_optimizer is 'lbfgs': input should be 'sgd', 'adam' or 'adamw'"
    )


def test_wrong_entry_of_a_list_names_the_option() -> None:
    assert refused(augmentation=["crop", "rotate"]) == (
        "fedsq_args.augmentation is ['crop', 'rotate']: input should be 'crop' or 'flip'"
    )


def test_line_break_in_a_value_stays_one_line() -> None:
    assert "\n" not in refused(client_optimizer="sgd\nadam")


def test_everything_wrong_is_said_at_once() -> None:
    _, problems = parse({**REQUIRED, "comm_round": 0, "epochs": -1, "buffers": "drop"})
    assert [(finding.kind, finding.key) for finding in problems] == [
        ("value", "comm_round"),
        ("value", "epochs"),
        ("value", "buffers"),
    ]


def test_misfits_are_said_although_another_option_is_wrong() -> None:
    _, problems = parse({**REQUIRED, "epochs": -1, "client_num_per_round": 5, "nesterov": True})
    assert [(finding.kind, finding.key) for finding in problems] == [
        ("value", "epochs"),
        ("misfit", "client_num_per_round"),
        ("misfit", "nesterov"),
    ]


def test_misfit_of_a_wrong_option_is_not_said() -> None:
    # Whether 5 silos per round are too many is unknown while the number of silos is.
    _, problems = parse({**REQUIRED, "client_num_in_total": "x", "client_num_per_round": 5})
    assert [finding.key for finding in problems] == ["client_num_in_total"]


def test_misfit_with_a_default_is_said_although_another_option_is_missing() -> None:
    _, problems = parse({"warm_start_file": "w.pt"})
    assert [finding.key for finding in problems if finding.kind == "misfit"] == ["warm_start_file"]


def test_valid_options_are_given_back_beside_wrong_ones() -> None:
    valid, problems = validated({**REQUIRED, "epochs": "x", "learning_rate": "1e-3"})
    assert [finding.key for finding in problems] == ["epochs"]
    assert valid.keys() == OPTIONS.keys() - {"epochs"}
    assert (valid["learning_rate"], valid["model"], valid["buffers"]) == (0.001, "resnet18", "average")


# Options that must fit one another


def test_more_silos_per_round_than_there_are() -> None:
    assert refused(client_num_per_round=5) == "client_num_per_round is 5, more than client_num_in_total 4"


def test_number_of_silos_that_a_data_set_of_the_host_sets_is_not_compared() -> None:
    # 1000 silos come with FedML's MNIST, whatever the recipe says.
    values = {**REQUIRED, "dataset": "mnist", "client_num_per_round": 5}
    config, problems = parse(values, brings_silos=("mnist",))
    assert config is not None and problems == []
    _, problems = parse({**values, "dataset": "digits"}, brings_silos=("mnist",))
    assert [finding.key for finding in problems] == ["client_num_per_round"]


@pytest.mark.parametrize("size", [0, -2])
def test_batch_size_that_is_no_size(size: int) -> None:
    line = f"train_args.batch_size is {size}: use a number above 0, or -1 for all data"
    assert refused(batch_size=size) == line


def test_warm_start_from_a_file_without_one() -> None:
    assert refused(warm_start="file") == "warm_start is 'file': warm_start_file must name the weights"


def test_warm_start_from_a_file_with_one() -> None:
    assert accepted(warm_start="file", warm_start_file="w.pt").warm_start_file == "w.pt"


def test_weights_file_that_would_not_be_read() -> None:
    assert refused(warm_start_file="w.pt") == (
        "warm_start_file is given but warm_start is 'none'; set warm_start: file"
    )


@pytest.mark.parametrize("options", [{"momentum": 0}, {"momentum": 0.9, "client_optimizer": "adam"}])
def test_nesterov_without_sgds_momentum(options: dict[str, Any]) -> None:
    line = "nesterov needs client_optimizer sgd and a momentum above 0"
    assert refused(nesterov=True, **options) == line


def test_nesterov_with_momentum() -> None:
    assert accepted(nesterov=True, momentum=0.9).nesterov


def test_several_misfits_are_a_line_each() -> None:
    _, problems = parse({**REQUIRED, "client_num_per_round": 5, "nesterov": True})
    assert [finding.key for finding in problems] == ["client_num_per_round", "nesterov"]


# The list of options


@pytest.mark.parametrize("key", sorted(OPTIONS))
def test_option_has_a_meaning_and_a_family(key: str) -> None:
    assert OPTIONS[key].meaning
    assert family_of(key).endswith("_args")


def test_every_option_is_declared_in_one_group() -> None:
    # A second declaration of a name would silently replace the first.
    annotations = [vars(group).get("__annotations__", {}) for group in Config.__mro__]
    declared = Counter(key for names in annotations for key in names if key in OPTIONS)
    assert declared.keys() == OPTIONS.keys()
    assert set(declared.values()) == {1}


def test_no_two_options_have_the_same_meaning() -> None:
    meanings = Counter((option.meaning, family_of(key)) for key, option in OPTIONS.items())
    assert max(meanings.values()) == 1


def test_families_are_fedmls_and_ours() -> None:
    fedml = {"common", "data", "model", "train", "validation", "device", "comm"}
    assert {family_of(key) for key in OPTIONS} == {f"{name}_args" for name in fedml} | set(OURS)


def test_families_have_an_order() -> None:
    assert [*dict.fromkeys(option.family for option in OPTIONS.values())] == list(FAMILIES)


def test_defaults_pass_their_own_checks() -> None:
    defaults = {key: option.default for key, option in OPTIONS.items() if not option.required}
    assert accepted(**defaults) == accepted()


def test_checked_values_pass_again_unchanged() -> None:
    config = accepted(learning_rate="1e-3", augmentation=["flip"], client_optimizer="AdamW")
    assert accepted(**config.model_dump()) == config


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.datetimes()
    | st.sampled_from(["sgd", "file", "none", "-1", "1e-3", "yes", "0x10", "nan", "1_0"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(OPTIONS)), values, max_size=6), st.booleans())
def test_any_value_gives_a_config_or_one_line_per_problem(given_: dict[str, Any], whole: bool) -> None:
    config, problems = parse({**REQUIRED, **given_} if whole else given_)
    assert (config is None) == bool(problems)
    assert not any(len(finding.line.splitlines()) != 1 for finding in problems)


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=8) | st.integers() | st.none() | st.dates(), values, max_size=4))
def test_any_foreign_key_is_ignored(foreign: dict[Any, Any]) -> None:
    foreign = {key: value for key, value in foreign.items() if key not in OPTIONS}
    assert parse({**REQUIRED, **foreign}) == (accepted(), [])


def test_date_is_no_number() -> None:
    assert refused(data_seed=datetime.date(2024, 1, 1)).startswith("fedsq_args.data_seed is datetime.date")
