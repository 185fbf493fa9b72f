"""Recipes: FedML YAML files, read strictly."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, nearest
from .config import OPTIONS, OURS, Config, Finding, family_of, parse

Families = dict[str, dict[str, Any]]


def read_yaml(path: str | Path) -> Families:
    """Read a recipe's families.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping of families; a key stands twice.
    """
    families, repeated = read_loosely(path)
    if repeated:
        raise ConfigError(f"recipe {path}: {' | '.join(map(str, repeated))}")
    return families


def read_loosely(path: str | Path) -> tuple[Families, list[Finding]]:
    """Read a recipe's families as FedML does, the last of two equal keys, and list those keys.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping of families.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"recipe {path}: {reason}") from None
    try:
        content, repeated = _yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at {_place(mark)}" if mark else ""
        reason = getattr(error, "problem", None) or "not readable as YAML"
        raise ConfigError(f"recipe {path}: no valid YAML{where}: {reason}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"recipe {path}: it must be a mapping of families (common_args: …, train_args: …)")
    for family, options in content.items():
        if not isinstance(family, str):
            raise ConfigError(f"recipe {path}: {family!r} is no name of a family")
        if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
            raise ConfigError(f"recipe {path}: {family} must be a mapping of options")
    return content, repeated


def overridden(families: Families, settings: Iterable[str]) -> Families:
    """Apply `key=value` settings (values read as YAML) to a copy of the families.

    A key goes where the recipe has it, or to the family in which it is documented.

    Raises:
        ConfigError: no `=`, or a key that neither the recipe nor the plugin knows.
    """
    result = {family: dict(options) for family, options in families.items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write key=value")
        home = next((family for family, options in result.items() if key in options), None)
        if home is None and key not in OPTIONS:
            raise ConfigError(f"--set {setting}: unknown option '{key}'{nearest(key, OPTIONS)}")
        try:
            value, repeated = _yaml(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {setting}: '{text}' is no valid YAML value") from None
        if repeated:
            raise ConfigError(f"--set {setting}: {repeated[0]}")
        result.setdefault(home or family_of(key), {})[key] = value
    return result


def problems(families: Families, brings_silos: Collection[str] = ()) -> tuple[Config | None, list[Finding]]:
    """The config, and everything wrong with the recipe's keys and values. `brings_silos` is that of `parse`."""
    config, wrong = parse(flat(families), brings_silos)
    found = misplaced(families)
    mistyped = {finding.key for finding in found if finding.kind == "misspelt"}
    return config, found + [f for f in wrong if f.kind != "missing" or f.key not in mistyped]


def misplaced(families: Families) -> list[Finding]:
    """What is wrong with the recipe's keys: unknown, misspelt (`key` is then the right one), or in two
    families."""
    own = {family: [key for key in OPTIONS if family_of(key) == family] for family in OURS}
    found = [
        Finding("unknown", key, f"{family}.{key} is unknown{nearest(key, own[family])}")
        for family in OURS
        for key in families.get(family, {})
        if key not in OPTIONS
    ]
    seen: dict[str, str] = {}
    for family, options in families.items():
        for key in options:
            if key in seen:
                line = f"{key} stands in {seen[key]} and in {family}; FedML keeps one of them"
                found.append(Finding("two families", key, line))
            seen[key] = family
    found += [
        Finding("family", family, f"family {family} is unknown{nearest(family, close)}")
        for family in families
        if family not in OURS and (close := difflib.get_close_matches(family, OURS, cutoff=0.8))
    ]
    homes = {family_of(key) for key in OPTIONS}.difference(OURS)
    found += [
        Finding("family", family, f"family {family} looks like a misspelling of '{close[0]}'")
        for family in families
        if family not in homes and (close := difflib.get_close_matches(family, homes, n=1, cutoff=0.9))
    ]
    for key, family in seen.items():
        near = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.88)
        if family not in OURS and key not in OPTIONS and near and near[0] not in seen:
            line = f"{family}.{key} looks like a misspelling of '{near[0]}'"
            found.append(Finding("misspelt", near[0], line))
    return found


def resolve(families: Families, brings_silos: Collection[str] = ()) -> Config:
    """The checked config of a recipe; `brings_silos` is that of `parse`.

    Raises:
        ConfigError: with everything that is wrong.
    """
    config, found = problems(families, brings_silos)
    if config is None or found:
        raise ConfigError(" | ".join(map(str, found)))
    return config


def flat(families: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All options in one mapping, as FedML has them."""
    return {key: value for options in families.values() for key, value in options.items()}


def resolved_families(families: Families, config: Config) -> Families:
    """The recipe with every option's value as checked, defaults included."""
    result = {family: dict(options) for family, options in families.items()}
    homes = {key: family for family, options in families.items() for key in options}
    for key, value in config.model_dump(mode="json").items():
        result.setdefault(homes.get(key, family_of(key)), {})[key] = value
    return result


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[Finding] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in keys[:number] and key.value != "<<":
                line = f"{key.value} stands twice, again at {_place(key.start_mark)}"
                self.repeated.append(Finding("repeated", str(key.value), line))
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> tuple[Any, list[Finding]]:
    """The content of a YAML text, and its repeated keys."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data(), loader.repeated
        finally:
            loader.dispose()
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets these out for values such as a date in month 13, or `!!bool x`.
        raise yaml.MarkedYAMLError(problem=str(error)) from None


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
