"""Recipes: FedML YAML files, read strictly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.hosts.fedml.names import with_host_defaults
from fedsq_plugin.settings.config import OPTIONS, family_of
from fedsq_plugin.settings.recipe import (
    Families,
    flat,
    misplaced,
    overridden,
    problems,
    read_loosely,
    read_yaml,
    resolve,
    resolved_families,
    with_numbers,
)

RECIPES = Path(__file__).parents[2] / "recipes"


def families(**changes: dict[str, Any]) -> Families:
    """A recipe that has what is required, with these families added or completed."""
    result: Families = {
        "data_args": {"dataset": "digits"},
        "model_args": {"model": "resnet18"},
        "train_args": {
            "federated_optimizer": "FedSQ",
            "client_num_in_total": 4,
            "client_num_per_round": 2,
            "comm_round": 3,
        },
    }
    for family, options in changes.items():
        result[family] = {**result.get(family, {}), **options}
    return result


def without(key: str) -> Families:
    return {family: {k: v for k, v in options.items() if k != key} for family, options in families().items()}


def only(found: Families) -> str:
    """The only problem of a recipe."""
    (finding,) = problems(found)[1]
    return finding.line


# Reading


def unreadable(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"recipe {path}: ")
    assert "\n" not in message
    return message.removeprefix(f"recipe {path}: ")


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_of_ours_have_no_problem(path: Path) -> None:
    assert problems(read_yaml(path))[1] == []


def test_families_are_read_in_order(tmp_path: Path) -> None:
    found = read_yaml(written(tmp_path, "train_args: {epochs: 2, momentum: 0.5}\ndata_args: {dataset: μ}\n"))
    assert found == {"train_args": {"epochs": 2, "momentum": 0.5}, "data_args": {"dataset": "μ"}}
    assert list(found) == ["train_args", "data_args"]


def test_missing_file(tmp_path: Path) -> None:
    assert unreadable(tmp_path / "none.yaml") == "No such file or directory"


def test_folder(tmp_path: Path) -> None:
    assert unreadable(tmp_path) == "Is a directory"


def test_file_below_a_file(tmp_path: Path) -> None:
    assert unreadable(written(tmp_path, "a: {b: 1}") / "below.yaml") == "Not a directory"


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    assert unreadable(written(tmp_path, "a: {b: ä}".encode("latin-1"))) == "it is not UTF-8 text"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}", "null"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    assert unreadable(written(tmp_path, text)).startswith("it must be a mapping of families (common_args: …")


@pytest.mark.parametrize("text", ["- train_args", "3", "train_args", "[{a: {b: 1}}]"])
def test_content_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    assert unreadable(written(tmp_path, text)).startswith("it must be a mapping of families")


@pytest.mark.parametrize("value", ["3", "[epochs]", "text", "", "{1: 2}", "{no: 1}"])
def test_family_that_is_no_mapping_of_names(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"data_args: {{dataset: digits}}\ntrain_args: {value}\n")
    assert unreadable(path) == "train_args must be a mapping of options"


@pytest.mark.parametrize(
    ("name", "shown"), [("1", "1"), ("on", "True"), ("~", "None"), ("2024-01-01", "datetime.date(2024, 1, 1)")]
)
def test_family_whose_name_is_no_text(tmp_path: Path, name: str, shown: str) -> None:
    assert unreadable(written(tmp_path, f"{name}: {{a: 1}}")) == f"{shown} is no name of a family"


def test_yaml_error_names_line_and_column(tmp_path: Path) -> None:
    # Line 2 closes at column 23 with a bracket what it opened with a brace.
    message = unreadable(written(tmp_path, "data_args: {dataset: digits}\ntrain_args: {epochs: 1]\n"))
    assert message == "no valid YAML at line 2, column 23: expected ',' or '}', but got ']'"


def test_tab_for_indentation_is_named(tmp_path: Path) -> None:
    message = unreadable(written(tmp_path, "train_args:\n\tepochs: 1\n"))
    assert message == ("no valid YAML at line 2, column 1: found character '\\t' that cannot start any token")


def test_control_character_is_named_without_a_line(tmp_path: Path) -> None:
    assert unreadable(written(tmp_path, "a: {b: \0}")) == "no valid YAML: not readable as YAML"


@pytest.mark.parametrize(
    "value",
    [
        "2024-13-01",
        "9" * 5000,
        "!!int x",
        '!!int ""',
        "!!bool x",
        "!!timestamp x",
        "[" * 5000,
        "!!python/object:os.system x",
        "=",
    ],
    ids=lambda value: value[:20],
)
def test_value_that_yaml_chokes_on(tmp_path: Path, value: str) -> None:
    assert unreadable(written(tmp_path, f"a: {{b: {value}}}")).startswith("no valid YAML")


@settings(max_examples=150)
@given(st.text(alphabet=st.sampled_from(list("ab:{}[]\n ,-&*!?|>'\"#%@1.~=\t")), max_size=30))
def test_any_text_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = written(tmp_path_factory.getbasetemp(), text)
    try:
        problems(read_yaml(path))
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


# Overriding


def test_setting_replaces_the_value_where_the_recipe_has_it() -> None:
    assert overridden({"somewhere": {"epochs": 1}}, ["epochs=5"]) == {"somewhere": {"epochs": 5}}


@pytest.mark.parametrize(
    ("key", "family"), [("epochs", "train_args"), ("buffers", "fedsq_args"), ("warm_start_epochs", "warm_start_args")]
)
def test_new_setting_goes_to_the_family_of_its_option(key: str, family: str) -> None:
    assert overridden({"data_args": {"dataset": "digits"}}, [f"{key}=5"])[family] == {key: 5}


def test_new_setting_joins_a_family_that_is_there() -> None:
    assert overridden({"train_args": {"epochs": 1}}, ["momentum=0.9"]) == {"train_args": {"epochs": 1, "momentum": 0.9}}


def test_key_that_only_the_recipe_knows_may_be_set() -> None:
    assert overridden({"tracking_args": {"run_name": "a"}}, ["run_name=b"]) == {"tracking_args": {"run_name": "b"}}


def test_last_setting_wins() -> None:
    assert overridden({}, ["epochs=1", "epochs=2"]) == {"train_args": {"epochs": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("true", True),
        ("null", None),
        ("", None),
        ("[crop, flip]", ["crop", "flip"]),
        ("a=b", "a=b"),
        ("1e-3", "1e-3"),
    ],
)
def test_value_of_a_setting_is_yaml(text: str, value: Any) -> None:
    assert overridden({}, [f"head={text}"]) == {"fedsq_args": {"head": value}}


OTHERS = {"wandb_project": "tracking_args", "server_optimizer": "train_args"}
"""What a host knows beside our options."""


def test_setting_may_name_the_family() -> None:
    found = overridden({"train_args": {"epochs": 1}}, ["train_args.epochs=2", "fedsq_args.small_images=true"])
    assert found == {"train_args": {"epochs": 2}, "fedsq_args": {"small_images": True}}


def test_setting_goes_where_the_recipe_has_the_key_whichever_of_its_families_is_named() -> None:
    for family in ("elsewhere", "train_args"):
        assert overridden({"elsewhere": {"epochs": 1}}, [f"{family}.epochs=2"]) == {"elsewhere": {"epochs": 2}}


def test_setting_of_the_hosts_own_option_goes_to_its_family() -> None:
    for name in ("wandb_project", "tracking_args.wandb_project"):
        assert overridden({}, [f"{name}=mine"], OTHERS) == {"tracking_args": {"wandb_project": "mine"}}


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("train_args.small_images=true", "small_images stands in fedsq_args, not in train_args"),
        ("fedsq_args.epochs=2", "epochs stands in elsewhere, not in fedsq_args"),
        ("common_args.wandb_project=x", "wandb_project stands in tracking_args, not in common_args"),
        ("fedsq_args.smal_images=true", "unknown option 'smal_images'; did you mean 'small_images'?"),
        ("tracking_args.wandb_projct=x", "unknown option 'wandb_projct'; did you mean 'wandb_project'?"),
    ],
)
def test_setting_of_a_wrong_family_or_key_gives_the_right_one(setting: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        overridden({"elsewhere": {"epochs": 1}}, [setting], OTHERS)
    assert str(caught.value) == f"--set {setting}: {line}"


def test_given_families_are_left_alone() -> None:
    given_ = families()
    before = copy.deepcopy(given_)
    overridden(given_, ["epochs=5", "comm_round=9", "buffers=keep"])
    assert given_ == before


def test_setting_without_an_equals_sign() -> None:
    with pytest.raises(ConfigError, match="--set epochs: write key=value"):
        overridden({}, ["epochs"])


def test_unknown_setting_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--set momentm=1: unknown option 'momentm'; did you mean 'momentum'\?"):
        overridden(families(), ["momentm=1"])


def test_setting_whose_value_is_no_yaml() -> None:
    with pytest.raises(ConfigError, match=r"--set epochs=\[1: '\[1' is no valid YAML value"):
        overridden({}, ["epochs=[1"])


def test_setting_whose_value_yaml_chokes_on() -> None:
    with pytest.raises(ConfigError, match="'2024-13-01' is no valid YAML value"):
        overridden({}, ["epochs=2024-13-01"])


# Checking


def test_good_recipe_has_no_problem() -> None:
    config, found = problems(families())
    assert (found, config is None) == ([], False)


def test_missing_option_is_named() -> None:
    assert only(without("comm_round")) == "train_args.comm_round is missing (number of rounds)"


def test_missing_option_is_linked_to_its_misspelling() -> None:
    found = without("comm_round")
    found["train_args"]["comm_rounds"] = 3
    assert only(found) == "train_args.comm_rounds looks like a misspelling of 'comm_round'"


def test_misspelled_optional_key_of_fedmls_families_is_found() -> None:
    found = without("learning_rate")
    found["train_args"]["learning_rte"] = 0.1
    assert only(found) == "train_args.learning_rte looks like a misspelling of 'learning_rate'"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("learning_rat", "learning_rate"),
        ("learing_rate", "learning_rate"),
        ("laerning_rate", "learning_rate"),
        ("batchsize", "batch_size"),
        ("batch_sizes", "batch_size"),
        ("epoch", "epochs"),
        ("epohcs", "epochs"),
        ("momemtum", "momentum"),
        ("server_optimiser", "server_optimizer"),
        ("wandb_projects", "wandb_project"),
    ],
)
def test_a_key_one_letter_from_a_known_one_is_a_note(key: str, near: str) -> None:
    found = families(train_args={key: 1})
    (finding,) = misplaced(found, OTHERS)
    assert (finding.is_note, finding.key) == (True, near)
    assert finding.line == f"train_args.{key} looks like a misspelling of '{near}'"
    assert resolve(found).epochs == 1  # a run may start


def test_a_key_one_letter_from_a_known_one_is_a_note_beside_that_too() -> None:
    (finding,) = misplaced(families(train_args={"learning_rate": 0.1, "learning_rates": 0.2}))
    assert (finding.is_note, finding.key) == (True, "learning_rate")


@pytest.mark.parametrize(("key", "near"), [("comm_rounds", "comm_round"), ("com_round", "comm_round")])
def test_a_misspelt_key_that_is_required_is_missing(key: str, near: str) -> None:
    found = without(near)
    found["train_args"][key] = 3
    with pytest.raises(ConfigError, match=f"^train_args.{key} looks like a misspelling of '{near}'$"):
        resolve(found)


@pytest.mark.parametrize("key", ["server_optimizer", "mu", "lr", "learning_rate_min", "rounds", "data", "x"])
def test_a_key_that_is_near_to_none_is_no_note(key: str) -> None:
    assert misplaced(families(train_args={key: 1}), OTHERS) == []


def test_keys_that_only_fedml_knows_are_left_alone() -> None:
    found = families()
    found["train_args"].update(server_optimizer="adam", server_lr=0.1, server_momentum=0.9)
    assert problems(found)[1] == []


def test_a_key_twice_in_one_family_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("train_args:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(ConfigError, match=r"twice.yaml: epochs stands twice, again at line 3, column 3"):
        read_yaml(path)


def test_fedmls_reading_keeps_the_last_of_two_equal_keys_and_lists_them_all(tmp_path: Path) -> None:
    text = "train_args:\n  epochs: 1\n  epochs: 2\ndata_args: {dataset: a, dataset: b}\n"
    found, repeated = read_loosely(written(tmp_path, text))
    assert found == {"train_args": {"epochs": 2}, "data_args": {"dataset": "b"}}
    assert [(finding.kind, finding.key) for finding in repeated] == [("repeated", "epochs"), ("repeated", "dataset")]


def test_a_family_twice_is_listed(tmp_path: Path) -> None:
    _, repeated = read_loosely(written(tmp_path, "train_args: {a: 1}\ntrain_args: {b: 1}\n"))
    assert [finding.key for finding in repeated] == ["train_args"]


def test_setting_with_a_key_twice() -> None:
    with pytest.raises(ConfigError, match=r"--set head=.*: a stands twice"):
        overridden({}, ["head={a: 1, a: 2}"])


def test_merged_keys_are_not_repeated(tmp_path: Path) -> None:
    text = "common_args: &base {a: 1}\ntrain_args:\n  <<: *base\n  a: 2\n"
    assert read_loosely(written(tmp_path, text))[1] == []


@pytest.mark.parametrize(
    ("family", "key", "nearest"),
    [
        ("fedsq_args", "gate_poling", "gate_pooling"),
        ("fedsq_args", "Buffers", "buffers"),
        ("warm_start_args", "warm_start_epoch", "warm_start_epochs"),
    ],
)
def test_unknown_key_in_our_families_gives_the_nearest(family: str, key: str, nearest: str) -> None:
    line = f"{family}.{key} is unknown; did you mean '{nearest}'?"
    assert only(families(**{family: {key: 1}})) == line


def test_unknown_key_like_no_other_lists_the_familys() -> None:
    assert only(families(warm_start_args={"xyz": 1})).startswith(
        "warm_start_args.xyz is unknown; known: relu_ise, relu_ise_harden_epochs"
    )


def test_unknown_key_in_fedmls_families_is_fedmls_business() -> None:
    assert problems(families(train_args={"server_lr": 1}, tracking_args={"xyz": 2}))[1] == []


def test_key_in_two_families() -> None:
    assert only(families(common_args={"epochs": 1}, train_args={"epochs": 2})) == (
        "epochs stands in train_args and in common_args; FedML keeps one of them"
    )


def test_key_of_fedml_in_two_families() -> None:
    assert only(families(common_args={"run_id": 1}, tracking_args={"run_id": 1})) == (
        "run_id stands in common_args and in tracking_args; FedML keeps one of them"
    )


@pytest.mark.parametrize(("family", "nearest"), [("fedsq_arg", "fedsq_args"), ("warmstart_args", "warm_start_args")])
def test_misspelled_family_of_ours_gives_the_nearest(family: str, nearest: str) -> None:
    line = f"family {family} is unknown; did you mean '{nearest}'?"
    assert only(families(**{family: {"anything": 1}})) == line


def test_family_of_somebody_else_is_fine() -> None:
    assert problems(families(environment_args={"bootstrap": "x"}))[1] == []


def test_option_of_ours_counts_in_any_family() -> None:
    config, found = problems(families(train_args={"buffers": "keep"}))
    assert config is not None
    assert (config.buffers, found) == ("keep", [])


def test_wrong_value_is_named_with_its_family() -> None:
    assert only(families(fedsq_args={"buffers": "drop"})) == (
        "fedsq_args.buffers is 'drop': input should be 'average' or 'keep'"
    )


def test_everything_wrong_is_said_at_once() -> None:
    found = families(train_args={"comm_round": 0}, fedsq_args={"xyz": 1}, fedsqargs={"a": 1})
    assert [(finding.kind, finding.key) for finding in problems(found)[1]] == [
        ("unknown", "xyz"),
        ("family", "fedsqargs"),
        ("value", "comm_round"),
    ]


@pytest.mark.parametrize(
    ("changes", "kind", "key"),
    [
        ({"common_args": {"epochs": 1}, "train_args": {"epochs": 2}}, "two families", "epochs"),
        ({"train_args": {"learning_rte": 1}}, "misspelt", "learning_rate"),
        ({"train_args": {"client_num_per_round": 9}}, "misfit", "client_num_per_round"),
    ],
)
def test_finding_says_its_kind_and_key(changes: dict[str, Any], kind: str, key: str) -> None:
    (finding,) = problems(families(**changes))[1]
    assert (finding.kind, finding.key) == (kind, key)


def test_resolve_gives_the_config() -> None:
    assert resolve(families(fedsq_args={"clip_norm": "1e-1"})).clip_norm == 0.1


def test_resolve_says_everything_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(families(train_args={"comm_round": 0}, fedsq_args={"xyz": 1}))
    assert str(caught.value).startswith("fedsq_args.xyz is unknown; known: ")
    assert " | train_args.comm_round is 0: " in str(caught.value)


def test_resolve_refuses_an_unknown_key_although_all_values_are_fine() -> None:
    with pytest.raises(ConfigError, match=r"fedsq_args\.xyz is unknown"):
        resolve(families(fedsq_args={"xyz": 1}))


keys = st.sampled_from(sorted(OPTIONS)) | st.text(max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=6) | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
names = st.sampled_from(["train_args", "fedsq_args", "warm_start_args", "fedsq_arg"]) | st.text(max_size=6)


@settings(max_examples=150)
@given(st.dictionaries(names, st.dictionaries(keys, values, max_size=4), max_size=3))
def test_any_families_give_a_config_or_problems(found: Families) -> None:
    config, wrong = problems(found)
    assert config is not None or wrong
    assert all(isinstance(finding.line, str) for finding in wrong)


# Completing


def test_flat_has_all_options() -> None:
    assert flat({"a": {"x": 1}, "b": {"y": 2, "z": 3}}) == {"x": 1, "y": 2, "z": 3}


def test_host_defaults_add_what_fedml_needs() -> None:
    found = flat(with_host_defaults({}))
    assert found == {
        "training_type": "simulation",
        "random_seed": 0,
        "client_id_list": "[]",
        "using_gpu": False,
        "gpu_id": 0,
        "backend": "sp",
        "frequency_of_the_test": 1,
        "enable_wandb": False,
    }


def test_host_defaults_replace_nothing() -> None:
    assert with_host_defaults({"comm_args": {"backend": "MPI"}})["comm_args"] == {"backend": "MPI"}


def test_host_defaults_do_not_repeat_a_key_of_another_family() -> None:
    found = with_host_defaults({"elsewhere": {"random_seed": 5}})
    assert "random_seed" not in found["common_args"]
    assert flat(found)["random_seed"] == 5


def test_host_defaults_leave_the_given_families_alone() -> None:
    given_ = families()
    before = copy.deepcopy(given_)
    with_host_defaults(given_)
    assert given_ == before


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    """So that FedML's own algorithms, too, train with what was checked."""
    found = families(train_args={"learning_rate": "1e-3", "name": "1e-3", "client_optimizer": "sgd", "epochs": "x"})
    train = with_numbers(found)["train_args"]
    assert (train["learning_rate"], train["name"], train["client_optimizer"]) == (0.001, "1e-3", "sgd")
    assert train["epochs"] == "x"  # wrong, and said elsewhere
    assert found["train_args"]["learning_rate"] == "1e-3"


def resolved(**changes: dict[str, Any]) -> Families:
    found = families(**changes)
    return resolved_families(found, resolve(found))


def test_resolved_families_hold_every_option() -> None:
    assert flat(resolved()).keys() == OPTIONS.keys()


def test_resolved_options_stand_once_and_in_their_own_family() -> None:
    homes = [(key, family) for family, options in resolved().items() for key in options]
    assert sorted(homes) == sorted((key, family_of(key)) for key in OPTIONS)


def test_resolved_option_stays_where_the_recipe_has_it() -> None:
    found = resolved(elsewhere={"epochs": 4})
    assert found["elsewhere"] == {"epochs": 4}
    assert "epochs" not in found["train_args"]


def test_resolved_values_are_the_checked_ones() -> None:
    found = resolved(train_args={"learning_rate": "1e-3", "client_optimizer": "AdamW"})
    assert (found["train_args"]["learning_rate"], found["train_args"]["client_optimizer"]) == (0.001, "adamw")


def test_resolved_families_keep_fedmls_own_keys() -> None:
    assert resolved(tracking_args={"run_name": "a"})["tracking_args"] == {"run_name": "a"}


def test_resolved_families_come_back_through_yaml(tmp_path: Path) -> None:
    changes = {"fedsq_args": {"augmentation": ["crop"], "gate_accept": ["a.*"], "data_seed": 3}}
    found = resolved(**changes)
    text = yaml.safe_dump(found, sort_keys=False)
    assert resolve(read_yaml(written(tmp_path, text))) == resolve(families(**changes))


def test_a_misspelt_family_of_fedmls_is_found() -> None:
    found = families()
    found["data_arg"] = found.pop("data_args")
    assert "family data_arg looks like a misspelling of 'data_args'" in [str(f) for f in problems(found)[1]]
