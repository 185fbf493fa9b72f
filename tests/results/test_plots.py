from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.image import imread

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.results.plots import accuracy_over_rounds, label_distribution

from .rows import NAN, table


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


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


THREE_SEEDS = table(
    {
        ("FedAvg", 0): [0.1, 0.2, 0.3],
        ("FedAvg", 1): [0.3, 0.4, 0.5],
        ("FedSQ", 0): [0.2, 0.4, NAN],
        ("FedSQ", 1): [0.4, 0.6, 0.8],
    }
)


def test_lines_are_means_and_end_where_a_seed_does(tmp_path: Path, drawn: list[Any]) -> None:
    accuracy_over_rounds(THREE_SEEDS, tmp_path / "a.png", warm_start=0.25)
    (axes,) = drawn[0].axes
    average, fedsq, warm = axes.get_lines()
    # percent, mean of the two seeds: (10 + 30) / 2 and so on
    assert average.get_ydata() == pytest.approx([20, 30, 40])
    assert fedsq.get_ydata() == pytest.approx([30, 50, NAN], nan_ok=True)
    assert list(warm.get_ydata()) == [25, 25] and warm.get_linestyle() == ":"
    assert [text.get_text() for text in axes.texts] == ["warm start\n25.0%"]
    assert legend(drawn[0]) == ["FedAvg", "FedSQ\n(1 of 2 seeds diverged)"]
    shade = axes.collections[0].get_paths()[0].get_extents()
    assert (shade.y0, shade.y1) == pytest.approx((10, 50))
    title = "Accuracy of the global model on the global test data\nmean and range over 2 seeds"
    assert axes.get_ylabel() == "accuracy (%)" and axes.get_title(loc="left") == title


def test_the_file_is_a_png_at_150_dpi_and_nothing_else_is_left(tmp_path: Path) -> None:
    accuracy_over_rounds(THREE_SEEDS, tmp_path / "a.png")
    assert names(tmp_path) == ["a.png"]
    assert imread(tmp_path / "a.png").shape[:2] == (720, 1350)  # 4.8 and 9 inches


def test_the_same_metrics_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        accuracy_over_rounds(THREE_SEEDS, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_one_seed_is_a_plain_line_and_rounds_are_whole(tmp_path: Path, drawn: list[Any]) -> None:
    for rounds in (1, 2, 3):
        accuracy_over_rounds(table({("FedSQ", 0): [0.5] * rounds}), tmp_path / "a.png")
        (axes,) = drawn[-1].axes
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks == list(range(1, rounds + 1)) and not axes.collections
    accuracy_over_rounds(table({("FedSQ", 0): [NAN]}), tmp_path / "a.png")
    assert legend(drawn[-1]) == ["FedSQ (diverged)"]


def test_lines_differ_without_their_colours(tmp_path: Path, drawn: list[Any]) -> None:
    metrics = table({(f"method {number}", 0): [0.1, 0.2] for number in range(14)})
    accuracy_over_rounds(metrics, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    looks = {(line._unscaled_dash_pattern[1], line.get_marker()) for line in axes.get_lines()}
    assert len(looks) == 14


def test_the_legend_lies_beside_the_data(tmp_path: Path, drawn: list[Any]) -> None:
    accuracy_over_rounds(THREE_SEEDS, tmp_path / "a.png", warm_start=0.3)
    (axes,) = drawn[0].axes
    label = axes.texts[0].get_window_extent()
    box = drawn[0].legends[0].get_window_extent()
    assert axes.get_window_extent().x1 < label.x0 < label.x1 <= box.x0 < box.x1 <= 1350


def test_another_split_is_drawn_from_its_own_rows(tmp_path: Path, drawn: list[Any]) -> None:
    silos = table({("FedRep", 0): [0.5, 0.75]}, "silos")
    accuracy_over_rounds(pd.concat([THREE_SEEDS, silos]), tmp_path / "a.png", "silos")
    (axes,) = drawn[0].axes
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == [50, 75]
    # The third algorithm of the metrics looks like one in every picture.
    assert (line.get_color(), line.get_marker()) == ("#009E73", "^")
    assert axes.get_title(loc="left") == "Accuracy of each silo's own model on its own test data"


@pytest.mark.parametrize(("algorithms", "drawn_as"), [(6, "mean and range"), (7, "mean")])
def test_many_lines_have_no_shades(tmp_path: Path, drawn: list[Any], algorithms: int, drawn_as: str) -> None:
    metrics = table({(f"method {n}", seed): [0.1, 0.2] for n in range(algorithms) for seed in (0, 1)})
    accuracy_over_rounds(metrics, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left").endswith(f"\n{drawn_as} over 2 seeds")
    assert len(axes.collections) == (6 if algorithms == 6 else 0)


def test_sixteen_algorithms_fit_though_all_diverged(tmp_path: Path, drawn: list[Any]) -> None:
    runs = {(f"FedSQ+Method{n:02}", s): [0.5, NAN if s else 0.5] for n in range(16) for s in range(3)}
    accuracy_over_rounds(table(runs, "silos"), tmp_path / "a.png", "silos", warm_start=0.5)
    (axes,) = drawn[0].axes
    box = drawn[0].legends[0].get_window_extent()
    assert len(legend(drawn[0])) == 16 and box.y0 >= 0
    # "left" titles are no part of the layout, which would let them run into the legend
    assert axes._left_title.get_window_extent().x1 < box.x0


def test_global_settings_are_left_alone(tmp_path: Path) -> None:
    before = dict(rcParams)
    accuracy_over_rounds(THREE_SEEDS, tmp_path / "a.png")
    assert dict(rcParams) == before


def test_few_classes_show_their_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    label_distribution([[1200, 0], [3, 4]], tmp_path / "l.png", ["no", "yes"], ["north", "south"])
    heat, sizes = drawn[0].axes
    assert [text.get_text() for text in heat.texts] == ["1,200", "3", "4"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["north", "south"]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["no", "yes"]
    assert [text.get_text() for text in sizes.texts] == ["1,200", "7"]
    assert "1,207 in 2 silos" in heat.get_title(loc="left")


@pytest.mark.parametrize("silos", [2, 30])
@pytest.mark.parametrize("classes", [2, 20, 100])
def test_nothing_is_clipped_or_overlaps(tmp_path: Path, drawn: list[Any], silos: int, classes: int) -> None:
    counts = np.full((silos, classes), 9_999)
    label_distribution(counts.tolist(), tmp_path / "l.png", [f"class {n}" for n in range(classes)])
    (figure,) = drawn
    heat, sizes = figure.axes[:2]
    width, height = imread(tmp_path / "l.png").shape[1::-1]
    for text in [*heat.texts, *sizes.texts, *heat.get_xticklabels(), *heat.get_yticklabels()]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    for labels in (heat.get_xticklabels(), heat.get_yticklabels(), heat.texts[:classes]):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    assert (len(figure.axes) == 3) == (classes > 20)  # the colour bar


@pytest.mark.parametrize("counts", [[], [[]], [[1, 2], [3]], [[1, -1]], [[0.5]], [["1"]]])
def test_counts_that_are_no_table_are_refused(tmp_path: Path, counts: Any) -> None:
    with pytest.raises(ConfigError, match="expected one list per silo"):
        label_distribution(counts, tmp_path / "l.png")
    assert names(tmp_path) == []


def test_names_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 names for the 2 classes"):
        label_distribution([[1, 2]], tmp_path / "l.png", ["a", "b", "c"])
    with pytest.raises(ConfigError, match="2 names for the 1 silos"):
        label_distribution([[1, 2]], tmp_path / "l.png", silos=["a", "b"])


def test_all_silos_may_be_empty(tmp_path: Path) -> None:
    label_distribution([[0, 0], [0, 0]], tmp_path / "l.png")
    assert names(tmp_path) == ["l.png"]
