"""YAML as FedML reads it (YAML 1.1, PyYAML's safe loader), with what PyYAML says nothing about.

Anchors and merges are what YAML says they are. FedML flattens the families of a file, the last one wins, and knows no
family that only holds values to be merged elsewhere; so such a family is left out, and a key that several families have
from one place in the file is kept in the last of them alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set
from typing import Any, NamedTuple

import yaml

from .config import FAMILIES, OPTIONS, Finding

KNOWN_FAMILIES = frozenset(
    [*FAMILIES, "environment_args", "tracking_args", "attack_args", "defense_args", "dp_args", "fhe_args", "mlops_args"]
)
"""Families that FedML's own recipes and ours have; another one may be there to hold shared values alone."""
LARGEST = 100_000
"""Values of a text, each alias counted as what it stands for. A few lines can claim billions."""
_MERGE = "tag:yaml.org,2002:merge"
_INT = "tag:yaml.org,2002:int"
_VALUE = "tag:yaml.org,2002:value"
_TEXT = "tag:yaml.org,2002:str"
_Pair = tuple[yaml.Node, yaml.Node]


def read_value(text: str) -> tuple[Any, list[Finding]]:
    """The value that a text stands for, and its repeated keys.

    Raises:
        yaml.YAMLError: it is no YAML; `problem` says why, in one line.
    """
    node, loader = _compose(text)
    with _one_kind_of_error():
        repeated = _repeated(node, loader)
    return _construct(loader, node), repeated


def read_families(text: str) -> tuple[Any, list[Finding]]:
    """The content of a recipe, each key in one family only where the file gives it one value, and what is wrong with
    the keys: those that stand twice, and numbers that YAML 1.1 reads otherwise than they look.

    Raises:
        yaml.YAMLError: it is no YAML; `problem` says why, in one line.
    """
    node, loader = _compose(text)
    # Merged keys are written into the nodes when these are constructed: what stands in the file is looked at before.
    with _one_kind_of_error():
        repeated, families = _repeated(node, loader), _families(node, loader.anchored)
        bases = {*_bases(node)} if isinstance(node, yaml.MappingNode) else set()
    found = [*repeated, *_other_numbers(families)]
    content = _construct(loader, node)
    if isinstance(content, dict):
        _leave_one_place(content, families, bases)
    return content, found


class _Family(NamedTuple):
    """What the nodes of a file say of one of its families."""

    node: yaml.Node
    keys: dict[str, yaml.Node]
    """The node of each key's value, merged keys included."""
    bases: frozenset[int]
    """The mappings that it merges, those that these merge included, by their identity."""
    anchored: bool
    """Whether it has an anchor, used or not."""


def _compose(text: str) -> tuple[yaml.Node | None, _Loader]:
    with _one_kind_of_error():
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_endless(node, {}, [])
    return node, loader


def _construct(loader: yaml.SafeLoader, node: yaml.Node | None) -> Any:
    with _one_kind_of_error():
        return None if node is None else loader.construct_document(node)


class _one_kind_of_error:
    """Turn what PyYAML lets out for values such as a date in month 13, or `!!bool x`, into its own error."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | LookupError | AttributeError | TypeError | RecursionError):
            raise yaml.MarkedYAMLError(problem=str(error)) from None
        halves = ("second occurrence", "but found")
        if isinstance(error, yaml.MarkedYAMLError) and error.context and str(error.problem).startswith(halves):
            error.problem = f"{error.context.replace('; first occurrence', '')}, {error.problem}"


def place(mark: Any) -> str:
    """Where something stands in a text, in words."""
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _refuse_endless(node: yaml.Node | None, sizes: dict[int, int], above: list[int]) -> int:
    """The number of values of a node, each alias counted as what it stands for.

    Raises:
        yaml.MarkedYAMLError: an alias stands inside of its own anchor, or the values are too many.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.MarkedYAMLError(
            problem="an alias stands inside of what its own anchor names", problem_mark=node.start_mark
        )
    if id(node) not in sizes:
        above.append(id(node))
        sizes[id(node)] = 1 + sum(_refuse_endless(child, sizes, above) for child in _children(node))
        above.pop()
    if sizes[id(node)] > LARGEST:
        raise yaml.MarkedYAMLError(
            problem=f"its aliases stand for more than {LARGEST} values", problem_mark=node.start_mark
        )
    return sizes[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """All nodes below this one, each once, in the order of the file."""
    seen: set[int] = set()
    waiting = [] if node is None else [node]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += reversed([*_children(one)])


def _repeated(node: yaml.Node | None, loader: yaml.SafeLoader) -> list[Finding]:
    """The keys that stand twice in one mapping of the text. PyYAML keeps the last and says nothing."""
    found = []
    for one in _nodes(node):
        if not isinstance(one, yaml.MappingNode):
            continue
        seen: set[Any] = set()
        for key, _ in one.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = _MERGE if key.tag == _MERGE else (key.tag, loader.construct_object(key))
            if name in seen and (key.tag != _MERGE or _merges_differ(one)):
                remedy = "; write <<: [*one, *other], where the first wins" if key.tag == _MERGE else ""
                line = f"{key.value} stands twice, again at {place(key.start_mark)}{remedy}"
                found.append(Finding("repeated", str(key.value), line))
            seen.add(name)
    return found


def _merges(node: yaml.MappingNode) -> list[list[yaml.MappingNode]]:
    """What each `<<` of a mapping merges.

    Raises:
        yaml.MarkedYAMLError: it is no mapping, and no list of mappings.
    """
    found = []
    for key, value in node.value:
        if key.tag == _MERGE:
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            wrong = next((one for one in merged if not isinstance(one, yaml.MappingNode)), None)
            if wrong is not None:
                problem = f"expected a mapping or list of mappings for merging, but found {wrong.id}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=wrong.start_mark)
            found.append(merged)
    return found


def _merges_differ(node: yaml.MappingNode) -> bool:
    """Whether two `<<` of one mapping give a key that the mapping has not itself two values."""
    own = {key.value for key, _ in node.value if key.tag != _MERGE}
    given: dict[str, set[int]] = {}
    for merged in _merges(node):
        for key, (_, value) in _pairs_of(merged).items():
            given.setdefault(key, set()).add(id(value))
    return any(len(values) > 1 for key, values in given.items() if key not in own)


def _pairs_of(merged: list[yaml.MappingNode]) -> dict[str, _Pair]:
    """The pairs of a list of mappings, each with what it merges, by their keys. The first that has a key wins."""
    found: dict[str, _Pair] = {}
    for one in reversed(merged):
        for inner in _merges(one):
            found |= _pairs_of(inner)
        found |= {key.value: (key, value) for key, value in one.value if key.tag != _MERGE}
    return found


class _Loader(yaml.SafeLoader):
    """PyYAML 6.0.4 lets the last of several merged mappings win; by YAML's rule, and in older versions, it is the
    first."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.anchored: set[int] = set()
        """The nodes that have an anchor, by their identity."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        anchored = not isinstance(event, yaml.AliasEvent) and getattr(event, "anchor", None) is not None
        node: yaml.Node | None = super().compose_node(parent, index)
        if anchored:
            self.anchored.add(id(node))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        merged: dict[str, _Pair] = {}
        for one in _merges(node):
            merged |= _pairs_of(one)
        own = [(key, value) for key, value in node.value if key.tag != _MERGE]
        for key, _ in own:
            merged.pop(key.value, None)
            if key.tag == _VALUE:
                key.tag = _TEXT  # as PyYAML does
        node.value = [*merged.values(), *own]


def _bases(node: yaml.MappingNode) -> Iterator[int]:
    for merged in _merges(node):
        for one in merged:
            yield id(one)
            yield from _bases(one)


def _families(node: yaml.Node | None, anchored: Set[int]) -> dict[str, _Family]:
    """The families of a file by their names, in FedML's order."""
    if not isinstance(node, yaml.MappingNode):
        return {}
    found = {}
    for name, (_, value) in _pairs_of([node]).items():
        keys, bases = {}, frozenset[int]()
        if isinstance(value, yaml.MappingNode):
            keys = {key: one for key, (_, one) in _pairs_of([value]).items()}
            bases = frozenset(_bases(value))
        found[name] = _Family(value, keys, bases, id(value) in anchored)
    return found


def _leave_one_place(content: dict[Any, Any], families: dict[str, _Family], bases: Collection[int]) -> None:
    """Take the keys away, in place, that another family has from the same place in the file, or replaces after merging
    the family that has them. FedML would flatten all of them."""
    order = [name for name in content if name in families]
    for number, name in enumerate(order):
        family, later = families[name], [families[one] for one in order[number + 1 :]]
        held = content[name]
        if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
            if name not in KNOWN_FAMILIES and family.anchored:
                del content[name]  # `x-rate: &rate 0.01`: no family, but a value for others
            continue
        if name not in KNOWN_FAMILIES and (id(family.node) in bases or _is_template(name, family, later)):
            del content[name]
            continue
        merged = [key for key in held if _is_merged(family.keys.get(key), families.values())]
        given = [key for key in held if any(_replaces(key, family, one) for one in later)]
        gone = {*given, *(merged if name not in KNOWN_FAMILIES else ())}
        content[name] = {key: value for key, value in held.items() if key not in gone}
        if gone and not content[name] and name not in KNOWN_FAMILIES:
            del content[name]


def _is_template(name: str, family: _Family, later: list[_Family]) -> bool:
    """Whether a family of an unknown name is there to be merged, though perhaps it is not: one of several to choose
    from. By its name, or because it changes nothing."""
    return family.anchored and (
        name.startswith("x-") or all(any(key in one.keys for one in later) for key in family.keys)
    )


def _replaces(key: str, family: _Family, later: _Family) -> bool:
    if key not in later.keys:
        return False
    return later.keys[key] is family.keys.get(key) or id(family.node) in later.bases


def _is_merged(value: yaml.Node | None, families: Collection[_Family]) -> bool:
    """Whether a family merges this value: then it is no option, but holds some."""
    return isinstance(value, yaml.MappingNode) and any(id(value) in family.bases for family in families)


def _other_numbers(families: dict[str, _Family]) -> list[Finding]:
    """Options of ours whose number YAML 1.1 reads otherwise than it looks: 010 is 8, and 1:30 is 90."""
    found = []
    for name, family in families.items():
        for key, value in family.keys.items():
            text = str(value.value)
            digits = text.lstrip("+-").replace("_", "")
            octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0" and int(digits, 8) != int(digits)
            if key in OPTIONS and value.tag == _INT and (octal or ":" in text):
                sign = "-" if text.startswith("-") else ""
                what = f"the octal number {sign}{int(digits, 8)}" if octal else "a number of base 60"
                line = (
                    f"{name}.{key} is {text} ({place(value.start_mark)}), which YAML reads as {what}; write it plainly"
                )
                found.append(Finding("number", key, line))
    return found
