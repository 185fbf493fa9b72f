"""Mutated recipes: `fedsq check` and `fedsq report` say what is wrong in lines, and never fall over.

FEDSQ_FUZZ is the number of cases, 400 when unset. Messages and snapshots have theirs beside their modules
(tests/federation/test_wire.py, test_snapshots.py).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.run.check import notes
from fedsq_plugin.settings.recipe import overridden, problems, read_loosely

RECIPES = [path.read_text() for path in sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))]
WORDS = (
    *("null", "true", "-1", "0", "1e309", ".nan", "[]", "{}", "[1, [2]]", "!!python/object:os.system x"),
    *("&a *a", "? x", "2026-13-41", "'", '"', "!!binary x", "!!float x", "<<: {a: 1}", "\x00", "\u2028", "☃"),
    *("9" * 5000, "[" * 300, "fedsq_args", "epochs: 1", "FedSQ+FedSQ", "FedSQ+", "+", "../../etc/passwd"),
)


def mutated(text: str, draw: random.Random) -> str:
    for _ in range(draw.randint(1, 3)):
        lines, kind = text.split("\n"), draw.randrange(6)
        at = draw.randrange(len(lines))
        place = draw.randrange(len(text) + 1)
        if kind == 0:
            text = text[:place]
        elif kind == 1:
            text = text[:place] + draw.choice(WORDS) + text[place:]
        elif kind == 2:
            text = "\n".join(lines[:at] + lines[at + 1 :])
        elif kind == 3:
            text = "\n".join([*lines[: at + 1], draw.choice(lines), *lines[at + 1 :]])
        elif kind == 4:
            head, colon, _ = lines[at].rpartition(":")
            text = "\n".join([*lines[:at], f"{head}{colon} {draw.choice(WORDS)}", *lines[at + 1 :]])
        else:
            text = text[:place] + chr(draw.randrange(1, 0x2FF)) + text[place + 1 :]
        text = text or " "
    return text


def test_mutated_recipes_are_read_or_refused_in_lines(tmp_path: Path) -> None:
    draw, counts, path = random.Random(0), Counter[str](), tmp_path / "recipe.yaml"
    for _ in range(int(os.environ.get("FEDSQ_FUZZ", "400"))):
        path.write_text(mutated(draw.choice(RECIPES), draw), encoding="utf-8", newline="")
        try:
            families, repeated = read_loosely(path)
            families = overridden(families, [f"random_seed={draw.choice(WORDS[:6])}"])
            config, found = problems(families)
            lines = [*map(str, repeated), *map(str, found), *notes(families)]
            assert config is not None or found
            counts["sound" if config is not None and not found and not repeated else "faults named"] += 1
        except ConfigError as error:
            lines = [str(error)]
            counts["refused"] += 1
        assert all(lines) and not any(set("\n\r\x00\u2028") & set(line) for line in lines), lines
    print(dict(counts))
    assert set(counts) == {"sound", "faults named", "refused"}
