"""Recipes: FedML YAML files, read strictly."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ..errors import ConfigError, nearest
from .config import OPTIONS, OURS, Config, Finding, family_of, parse, validated
from .yaml_text import place, read_families, read_value

Families = dict[str, dict[str, Any]]
NO_OTHERS: Mapping[str, str] = MappingProxyType({})


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
        content, found = read_families(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at {place(mark)}" if mark else ""
        reason = getattr(error, "problem", None) or "not readable as YAML"
        raise ConfigError(f"recipe {path}: no valid YAML{where}: {reason}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"recipe {path}: it must be a mapping of families (common_args: …, train_args: …)")
    for family, options in content.items():
        if not isinstance(family, str):
            raise ConfigError(f"recipe {path}: {family!r} is no name of a family")
        if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
            raise ConfigError(f"recipe {path}: {family} must be a mapping of options")
    return content, found


def overridden(families: Families, settings: Iterable[str], others: Mapping[str, str] = NO_OTHERS) -> Families:
    """Apply settings `key=value` or `family.key=value` (values read as YAML) to a copy of the families.

    A key goes where the recipe has it, or to the family in which it is documented.

    Args:
        others: families of the options that the host knows beside ours, by key.

    Raises:
        ConfigError: no `=`, a key that neither the recipe nor the plugin knows, or a family that is not the key's.
    """
    result = {family: dict(options) for family, options in families.items()}
    for setting in settings:
        name, equals, text = setting.partition("=")
        given, _, key = name.strip().rpartition(".")
        if not equals:
            raise ConfigError(f"--set {setting}: write key=value")
        # Of two families that have the key, FedML keeps the last.
        home = next((family for family in reversed(result) if key in result[family]), None)
        documented = family_of(key) if key in OPTIONS else others.get(key)
        if home is None and documented is None:
            raise ConfigError(f"--set {setting}: unknown option '{key}'{nearest(key, [*OPTIONS, *others])}")
        if given and given not in (home, documented):
            raise ConfigError(f"--set {setting}: {key} stands in {home or documented}, not in {given}")
        try:
            value, repeated = read_value(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {setting}: '{text}' is no valid YAML value") from None
        if repeated:
            raise ConfigError(f"--set {setting}: {repeated[0]}")
        result.setdefault(home or str(documented), {})[key] = value
    return result


def problems(
    families: Families, brings_silos: Collection[str] = (), others: Mapping[str, str] = NO_OTHERS
) -> tuple[Config | None, list[Finding]]:
    """The config, and everything wrong with the recipe's keys and values. `brings_silos` is that of `parse`, `others`
    that of `misplaced`."""
    config, wrong = parse(flat(families), brings_silos)
    found = misplaced(families, others)
    mistyped = {finding.key for finding in found if finding.kind == "missing"}
    return config, found + [f for f in wrong if f.kind != "missing" or f.key not in mistyped]


def misplaced(families: Families, others: Mapping[str, str] = NO_OTHERS) -> list[Finding]:
    """What is wrong with the recipe's keys: unknown, misspelt (`key` is then the right one), or in two
    families. Where a misspelt option is missing, its kind is that.

    Args:
        others: families of the options that the host knows beside ours, by key.
    """
    found = [
        Finding("unknown", key, f"{family}.{key} is unknown{nearest(key, _keys_of(family))}")
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
        if family in OURS or key in OPTIONS or key in others:
            continue
        near = _near(key, [*OPTIONS, *others])
        # With the right key beside it, only one letter more or less tells that this is no other option.
        if near is None or (near in seen and not _one_letter_apart(key, near)):
            continue
        missing = near in OPTIONS and OPTIONS[near].required and near not in seen
        line = f"{family}.{key} looks like a misspelling of '{near}'"
        found.append(Finding("missing" if missing else "misspelt", near, line))
    return found


def resolve(families: Families, brings_silos: Collection[str] = ()) -> Config:
    """The checked config of a recipe; `brings_silos` is that of `parse`.

    Raises:
        ConfigError: with everything that is wrong.
    """
    config, found = problems(families, brings_silos)
    fatal = [finding for finding in found if not finding.is_note]
    if config is None or fatal:
        raise ConfigError(" | ".join(map(str, fatal)))
    return config


def flat(families: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All options in one mapping, as FedML has them."""
    return {key: value for options in families.values() for key, value in options.items()}


def with_numbers(families: Families) -> Families:
    """The families, with a number for each option that is one and that YAML 1.1 reads as text, as `1e-3`."""
    valid = validated(flat(families))[0]
    result = {family: dict(options) for family, options in families.items()}
    for options in result.values():
        for key, value in options.items():
            if isinstance(value, str) and isinstance(valid.get(key), int | float):
                options[key] = valid[key]
    return result


def resolved_families(families: Families, config: Config) -> Families:
    """The recipe with every option's value as checked, defaults included."""
    result = {family: dict(options) for family, options in families.items()}
    homes = {key: family for family, options in families.items() for key in options}
    for key, value in config.model_dump(mode="json").items():
        result.setdefault(homes.get(key, family_of(key)), {})[key] = value
    return result


def _keys_of(family: str) -> list[str]:
    return [key for key in OPTIONS if family_of(key) == family]


def _near(key: str, known: Collection[str]) -> str | None:
    """The known name of which `key` looks like a misspelling."""
    near = [*difflib.get_close_matches(key, known, n=1, cutoff=0.88)]
    return next(iter([*(name for name in known if _one_letter_apart(key, name)), *near]), None)


def _one_letter_apart(one: str, other: str) -> bool:
    """Whether one letter more, less or other, or two letters in the other order, make one name of the other. In names
    of up to three letters this says nothing."""
    if one == other or min(len(one), len(other)) < 4:
        return False
    start = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[:2][::-1] and a[2:] == b[2:])
