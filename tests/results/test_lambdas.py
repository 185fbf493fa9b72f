from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.results.lambdas import lambda_profile

HISTORY = [{"b": 1.01, "a": 1.01}, {"b": 1.5, "a": 1.2}, {"b": 10.0, "a": 20.0}, {"b": 79.0, "a": 138.0}]
TARGET = {"a": 138.6, "b": 79.8}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures saved while the test runs."""
    figures: list[Any] = []
    save = Figure.savefig

    def savefig(self: Any, *args: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def lines(figure: Any) -> dict[str, list[float]]:
    """Values of each line, by its label on one line."""
    return {line.get_label().replace("\n", " "): list(line.get_ydata()) for line in figure.axes[0].get_lines()}


def many(layers: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """A history and a target over layers named as efficientnet's."""
    names = [f"features.{place}.0.block.2.activation" for place in range(layers)]
    return [dict.fromkeys(names, value) for value in (1.01, 1.3, 79.0)], dict.fromkeys(names, 79.0)


def test_lines_are_target_initial_learned_and_hardened(tmp_path: Path, drawn: list[Any]) -> None:
    lambda_profile(HISTORY, 1, TARGET, tmp_path / "a.png")
    # In the order of the history's layers, b then a, whatever the target's.
    assert lines(drawn[0]) == {
        "target": [79.8, 138.6],
        "initial": [1.01, 1.01],
        "learned (epoch 1)": [1.5, 1.2],
        "hardened (epoch 3)": [79.0, 138.0],
    }


def test_nothing_learned_is_no_line(tmp_path: Path, drawn: list[Any]) -> None:
    lambda_profile(HISTORY, 0, TARGET, tmp_path / "a.png")
    assert list(lines(drawn[0])) == ["target", "initial", "hardened (epoch 3)"]


def test_nothing_hardened_is_no_line(tmp_path: Path, drawn: list[Any]) -> None:
    lambda_profile(HISTORY[:2], 1, TARGET, tmp_path / "a.png")
    assert list(lines(drawn[0])) == ["target", "initial", "learned (epoch 1)"]


def test_hardened_looks_the_same_without_a_learned_line(tmp_path: Path, drawn: list[Any]) -> None:
    lambda_profile(HISTORY, 1, TARGET, tmp_path / "a.png")
    lambda_profile(HISTORY, 0, TARGET, tmp_path / "b.png")
    with_learned, without = (figure.axes[0].get_lines()[-1] for figure in drawn)
    assert with_learned.get_color() == without.get_color()


def test_scale_is_logarithmic(tmp_path: Path, drawn: list[Any]) -> None:
    lambda_profile(HISTORY, 1, TARGET, tmp_path / "a.png")
    assert drawn[0].axes[0].get_yscale() == "log"


def test_legend_names_the_lines(tmp_path: Path, drawn: list[Any]) -> None:
    lambda_profile(HISTORY, 1, TARGET, tmp_path / "a.png")
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts == ["target", "initial", "learned\n(epoch 1)", "hardened\n(epoch 3)"]


@pytest.mark.parametrize("layers", [1, 2, 12, 49])
def test_layers_names_neither_overlap_nor_leave_the_picture(layers: int, tmp_path: Path, drawn: list[Any]) -> None:
    history, target = many(layers)
    lambda_profile(history, 1, target, tmp_path / "a.png")
    boxes = [label.get_window_extent() for label in drawn[0].axes[0].get_xticklabels()]
    assert len(boxes) == layers
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert all(drawn[0].bbox.x0 <= box.x0 and drawn[0].bbox.y0 <= box.y0 for box in boxes)


@pytest.mark.parametrize("layers", [1, 49])
def test_legend_lies_within_the_picture_beside_the_axes(layers: int, tmp_path: Path, drawn: list[Any]) -> None:
    history, target = many(layers)
    lambda_profile(history, 1, target, tmp_path / "a.png")
    legend = drawn[0].legends[0].get_window_extent()
    assert drawn[0].axes[0].get_window_extent().x1 <= legend.x0 and legend.x1 <= drawn[0].bbox.x1


def test_short_names_lie_flat(tmp_path: Path, drawn: list[Any]) -> None:
    lambda_profile(HISTORY, 1, TARGET, tmp_path / "a.png")
    assert {label.get_rotation() for label in drawn[0].axes[0].get_xticklabels()} == {0}


def test_file_is_a_picture_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    lambda_profile(HISTORY, 1, TARGET, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").ndim == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("history", [[], [{}]])
def test_empty_history_is_refused(history: list[dict[str, float]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="history of λ is empty"):
        lambda_profile(history, 0, {}, tmp_path / "a.png")


@pytest.mark.parametrize("learned", [-1, 4])
def test_more_learning_than_epochs_is_refused(learned: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"learned in {learned} epochs, yet the history has 3"):
        lambda_profile(HISTORY, learned, TARGET, tmp_path / "a.png")


def test_other_layers_in_the_history_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"history\[1\] of λ names other layers"):
        lambda_profile([HISTORY[0], {"a": 2.0}], 1, TARGET, tmp_path / "a.png")


def test_other_layers_in_the_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target of λ names other layers"):
        lambda_profile(HISTORY, 1, {**TARGET, "c": 2.0}, tmp_path / "a.png")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_value_that_has_no_logarithm_is_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"history\[1\] gives λ = .* for layer 'b'"):
        lambda_profile([HISTORY[0], {"b": value, "a": 1.0}], 1, TARGET, tmp_path / "a.png")
