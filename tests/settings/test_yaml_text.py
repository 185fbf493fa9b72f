"""What a recipe's YAML says: anchors, merges, keys that stand twice, and numbers that look otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.settings.recipe import flat, misplaced, overridden, read_loosely, read_yaml

SHARED = "x-shared: &shared {learning_rate: 0.01, batch_size: 32}\n"


def read(folder: Path, text: str) -> dict[str, dict[str, Any]]:
    """The families of a text in which no key stands twice."""
    path = folder / "recipe.yaml"
    path.write_text(text)
    families = read_yaml(path)
    assert misplaced(families) == []
    return families


def refused(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).partition("recipe.yaml: ")[2]


@pytest.mark.parametrize(
    ("text", "train"),
    [
        (SHARED + "train_args: {<<: *shared, epochs: 2}", {"learning_rate": 0.01, "batch_size": 32, "epochs": 2}),
        (SHARED + "train_args: {<<: *shared, learning_rate: 0.5}", {"learning_rate": 0.5, "batch_size": 32}),
        (SHARED + "train_args: {learning_rate: 0.5, <<: *shared}", {"learning_rate": 0.5, "batch_size": 32}),
        # Of several mappings, the first that has the key wins (yaml.org/type/merge).
        (SHARED + "x-b: &b {learning_rate: 2, a: 1}\ntrain_args: {<<: [*shared, *b]}",
         {"learning_rate": 0.01, "batch_size": 32, "a": 1}),
        (SHARED + "x-b: &b {<<: *shared, learning_rate: 2}\ntrain_args: {<<: *b, a: 1}",
         {"learning_rate": 2, "batch_size": 32, "a": 1}),
        (SHARED + "x-b: &b {a: 1}\ntrain_args: {<<: *shared, <<: *b}",
         {"learning_rate": 0.01, "batch_size": 32, "a": 1}),
        ("x-all:\n  one: &one {a: 1}\n  two: &two {b: 2}\ntrain_args: {<<: [*one, *two]}", {"a": 1, "b": 2}),
        ("x-all: {epochs: &e {epochs: 3}}\ntrain_args: {<<: *e}", {"epochs": 3}),
        ("x-rate: &rate 0.1\ntrain_args: {learning_rate: *rate}", {"learning_rate": 0.1}),
        ("x-names: &names [a, b]\ntrain_args: {x: *names, y: *names}", {"x": ["a", "b"], "y": ["a", "b"]}),
        ("all: &all {train_args: {epochs: 2}}\n<<: *all", {"epochs": 2}),
        # One of several to choose from.
        ("x-a: &a {epochs: 1}\nx-b: &b {epochs: 2, c: 3}\ntrain_args: {<<: *a}", {"epochs": 1}),
        ("train_args: {epochs: 1}\nx-b: &b {epochs: 2}", {"epochs": 1}),
        ("small: &s {epochs: 1}\nlarge: &l {epochs: 2}\ntrain_args: {<<: *s}", {"epochs": 1}),
        ("x-rate: &rate 0.1\ntrain_args: {epochs: 1}", {"epochs": 1}),
        ("x-a: &a {epochs: 1}\nx-b: &b {<<: *a, c: 2}\ntrain_args: {<<: *b, epochs: 3}", {"epochs": 3, "c": 2}),
    ],
)  # fmt: skip
def test_families_that_only_hold_shared_values_are_none(tmp_path: Path, text: str, train: dict[str, Any]) -> None:
    assert read(tmp_path, text) == {"train_args": train}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("common_args: {epochs: &e 4}\ntrain_args: {epochs: *e}", {"epochs": 4}),
        ("common_args: &c {a: 1, b: 2}\ntrain_args: {<<: *c, b: 3}", {"a": 1, "b": 3}),
        ("common_args: &c {a: 1}\ndata_args: {<<: *c}\ntrain_args: {<<: *c}", {"a": 1}),
        (SHARED + "common_args: &c {<<: *shared}\ntrain_args: {<<: *c, batch_size: 8}",
         {"learning_rate": 0.01, "batch_size": 8}),
        ("common_args: {defaults: {a: &a {epochs: 1}, b: &b {<<: *a, epochs: 2}}}\ntrain_args: {<<: *b}",
         {"defaults": {"a": {"epochs": 1}, "b": {"epochs": 2}}, "epochs": 2}),
        # FedML takes the keys of every family, also of one that nobody knows.
        ("mine: {epochs: 4, name: &n x}\nfedsq_args: {head: *n}", {"epochs": 4, "name": "x", "head": "x"}),
    ],
)  # fmt: skip
def test_a_key_that_several_families_have_from_one_place_has_one_value(
    tmp_path: Path, text: str, values: dict[str, Any]
) -> None:
    assert flat(read(tmp_path, text)) == values


@pytest.mark.parametrize(
    "text",
    [
        "common_args: {epochs: 1}\ntrain_args: {epochs: 1}",
        "common_args: {epochs: 1}\ntrain_args: {epochs: 2}",
        # One family replaces the shared value, the other does not: FedML would take the last.
        "x: &x {epochs: 1}\ncommon_args: {<<: *x, epochs: 2}\ntrain_args: {<<: *x}",
        "train_args: {epochs: 1}\nx: &x {epochs: 2}\ncommon_args: {<<: *x}",
        "train_args: {epochs: 1}\nmine: &x {epochs: 2}",
        "mine: {epochs: 1}\ntrain_args: {epochs: 2}",
    ],
)
def test_a_key_that_two_families_have_from_two_places_is_found(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    families, repeated = read_loosely(path)
    assert repeated == []
    assert [(finding.kind, finding.key) for finding in misplaced(families)] == [("two families", "epochs")]


def test_a_setting_replaces_a_shared_value(tmp_path: Path) -> None:
    families = read(tmp_path, SHARED + "train_args: {<<: *shared}")
    assert flat(overridden(families, ["learning_rate=5"])) == {"learning_rate": 5, "batch_size": 32}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train_args: {epochs: 1, epochs: 2}", "epochs stands twice, again at line 1, column 25"),
        ('train_args: {epochs: 1, "epochs": 2}', "epochs stands twice, again at line 1, column 25"),
        (SHARED + "train_args:\n  <<: *shared\n  a: 1\n  a: 1\n", "a stands twice, again at line 5, column 3"),
        ("train_args: {x: {16: a, 0x10: b}}", "0x10 stands twice, again at line 1, column 25"),
        (SHARED + "x: &x {batch_size: 2}\ntrain_args: {<<: *shared, <<: *x}",
         "<< stands twice, again at line 3, column 27; write <<: [*one, *other], where the first wins"),
    ],
)  # fmt: skip
def test_a_key_that_really_stands_twice_is_refused(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text + "\n")
    _, found = read_loosely(path)
    assert [str(finding) for finding in found] == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: &x {b: *x}", "an alias stands inside of what its own anchor names"),
        ("a: &x {<<: *x}", "an alias stands inside of what its own anchor names"),
        ("a: {b: &x [*x]}", "an alias stands inside of what its own anchor names"),
        ("a: {b: &x 1}\nc: {d: &x 2}", "found duplicate anchor 'x', second occurrence"),
        ("a: {b: *x}", "found undefined alias 'x'"),
        ("a: {<<: 3}", "expected a mapping or list of mappings for merging, but found scalar"),
        ("a: {b: 1}\n---\nc: {d: 1}", "expected a single document in the stream, but found another document"),
        ("a: {b: !!python/name:os.system }", "could not determine a constructor for the tag"),
    ],
)
def test_what_yaml_refuses_is_one_line_with_the_place(tmp_path: Path, text: str, line: str) -> None:
    message = refused(tmp_path, text)
    assert message.startswith("no valid YAML at line ") and line in message


def test_a_few_lines_that_stand_for_billions_of_values_are_refused(tmp_path: Path) -> None:
    lines = ["  a0: &a0 [x, x]", *(f"  a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    assert "its aliases stand for more than 100000 values" in refused(tmp_path, "\n".join(["a:", *lines]))


@pytest.mark.parametrize(
    ("number", "read_as"),
    [("010", "the octal number 8"), ("-0100", "the octal number -64"), ("1:30", "a number of base 60")],
)
def test_a_number_that_is_not_what_it_looks_like_is_refused(tmp_path: Path, number: str, read_as: str) -> None:
    line = refused(tmp_path, f"train_args: {{comm_round: {number}}}")
    assert (
        line
        == f"train_args.comm_round is {number} (line 1, column 26), which YAML reads as {read_as}; write it plainly"
    )


@pytest.mark.parametrize(("text", "value"), [("00", 0), ("1_000", 1000), ("0x10", 16), ("007", 7), ("1e3", "1e3")])
def test_other_ways_to_write_a_number_are_yamls(tmp_path: Path, text: str, value: Any) -> None:
    assert read(tmp_path, f"train_args: {{comm_round: {text}}}") == {"train_args": {"comm_round": value}}


def test_an_identifier_with_leading_zeros_is_nobodys_number(tmp_path: Path) -> None:
    assert read(tmp_path, "common_args: {run_id: 010}") == {"common_args": {"run_id": 8}}


def test_reading_agrees_with_pyyaml_where_nothing_is_merged(tmp_path: Path) -> None:
    text = "train_args: {epochs: 2, a: [1, {b: c}], d: 2024-01-01, e: on, f: ~, g: 1.5}\ndata_args: {h: &h x, i: *h}\n"
    assert read(tmp_path, text) == yaml.safe_load(text)
