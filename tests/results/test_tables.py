from __future__ import annotations

import io

import pandas as pd
import pytest
from rich.console import Console, RenderableType

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.results.statistics import runs
from fedsq_plugin.results.tables import compare_table, run_table

from .rows import NAN, table

# Best accuracy in percent: FedAvg 50 51 52, FedSQ 51 53 54, so +1 +2 +2 points: mean 1.67, in
# thirds of a point deviations -2 1 1, so sqrt(6 / 9 / 2) = .58.
THREE = runs(
    table(
        {
            ("FedAvg", 0): [0.50, 0.40],
            ("FedAvg", 1): [0.40, 0.51],
            ("FedAvg", 2): [0.52, 0.52],
            ("FedSQ", 0): [0.51, 0.51],
            ("FedSQ", 1): [0.53, NAN],
            ("FedSQ", 2): [0.54, 0.51],
        }
    )
)


def rendered(renderable: RenderableType) -> list[str]:
    """Its lines in a terminal of 100 columns, none of them longer."""
    file = io.StringIO()
    Console(width=100, file=file).print(renderable)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 100
    return lines


def cells(lines: list[str], name: str) -> list[list[str]]:
    """The cells of the rows that begin with `name`; cells are two spaces apart."""
    found = [line for line in lines if line.startswith(name + " ")]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in found]


def test_one_run_shows_no_seed() -> None:
    lines = rendered(run_table(runs(table({("FedSQ", 4): [0.25, 0.579, NAN]}))))
    assert "seed" not in lines[1]
    assert cells(lines, "FedSQ") == [["FedSQ", "57.9", "2", "–", "25.0", "2.0", "7.0"]]


def test_several_seeds_are_told_apart() -> None:
    lines = rendered(run_table(THREE))
    assert lines[1].split()[:2] == ["algorithm", "seed"]
    assert [row[1] for row in cells(lines, "FedAvg")] == ["0", "1", "2"]


def test_comparison_by_hand() -> None:
    lines = rendered(compare_table(THREE, "FedAvg"))
    (average,) = cells(lines, "FedAvg")
    # rounds to best 1 2 1: mean 4/3, deviation sqrt(1/3); final 40 51 52: mean 143/3, and in thirds
    # deviations -23 10 13: sqrt(798 / 9 / 2) = 6.66
    assert average[:5] == ["FedAvg", "3", "51.0 ± 1.0", "1.3 ± 0.6", "47.7 ± 6.7"]
    fedsq, difference = cells(lines, "FedSQ")
    assert fedsq[2:5] == ["52.7 ± 1.5", "1.0 ± 0.0", "–"]
    # rounds 0 -1 0: mean -1/3, one seed earlier
    assert difference[1:] == ["+1.7 ± 0.6 points (3/3 seeds)", "-0.3 ± 0.6 rounds (1/3 seeds)"]


def test_one_seed_has_differences_without_deviation() -> None:
    of = runs(table({("FedAvg", 0): [0.5], ("FedSQ", 0): [0.4999], ("FedBN", 1): [0.5]}))
    lines = rendered(compare_table(of, "FedAvg"))
    assert cells(lines, "FedAvg")[0][2:4] == ["50.0", "1"]
    assert cells(lines, "FedSQ")[1][1:] == ["+0.0 points (0/1 seed)", "+0.0 rounds (0/1 seed)"]
    assert cells(lines, "FedBN")[1][1:] == ["–", "–"]


def test_silos_by_hand() -> None:
    silos = {("FedAvg", 0): [0.5, 0.6], ("FedAvg", 1): [0.7, 0.6], ("FedRep", 0): [0.8, 0.7], ("FedRep", 1): [0.7, 0.7]}
    lines = rendered(compare_table(runs(table(silos, "silos"), "silos"), "FedAvg"))
    # best 60 70 and 80 70; rounds to best 2 1 and 1 1; final 60 60 and 70 70
    (average,) = cells(lines, "FedAvg")
    assert average == ["FedAvg", "2", "65.0 ± 7.1", "1.5 ± 0.7", "60.0 ± 0.0"]
    of, difference = cells(lines, "FedRep")
    assert of == ["FedRep", "2", "75.0 ± 7.1", "1.0 ± 0.0", "70.0 ± 0.0"]
    # points 20 0, rounds -1 0
    assert difference[1:] == ["+10.0 ± 14.1 points (1/2 seeds)", "-0.5 ± 0.7 rounds (1/2 seeds)"]


def test_one_round_has_one_accuracy_and_its_difference() -> None:
    tuned = {("FedAvg", 0): [0.5], ("FedAvg", 1): [0.6], ("FedRep", 0): [0.7], ("FedRep", 1): [0.6]}
    of = runs(table(tuned, "silos_tuned"), "silos_tuned")
    lines = rendered(compare_table(of, "FedAvg"))
    assert lines[0].split() == ["algorithm", "seeds", "accuracy", "%"]
    assert cells(lines, "FedAvg") == [["FedAvg", "2", "55.0 ± 7.1"]]
    # points 20 0
    assert cells(lines, "FedRep") == [["FedRep", "2", "65.0 ± 7.1"], ["FedRep", "+10.0 ± 14.1 points (1/2 seeds)"]]
    assert cells(rendered(run_table(of.iloc[:1])), "FedAvg") == [["FedAvg", "50.0"]]


def test_a_released_accuracy_that_nobody_has_is_not_shown() -> None:
    of = runs(table({("FedAvg", 0): [0.5], ("FedBN", 0): [0.5]}, accuracy_released=NAN))
    lines = rendered(compare_table(of, "FedAvg"))
    assert "released" not in lines[0]
    assert cells(lines, "FedBN")[0] == ["FedBN", "1", "50.0", "1", "50.0", "2.0", "7.0"]
    assert "released" not in rendered(run_table(of.iloc[:1]))[0]
    of.loc[1, "final_accuracy_released"] = 0.25
    assert cells(rendered(compare_table(of, "FedAvg")), "FedAvg")[0][5] == "–"


def test_one_algorithm_has_no_differences() -> None:
    of = runs(table({("FedSQ", 0): [0.5], ("FedSQ", 1): [0.5]}))
    assert not any("difference" in line for line in rendered(compare_table(of, "FedSQ")))


def test_a_diverged_seed_shows_how_many_others_won() -> None:
    of = runs(table({("FedAvg", 0): [0.5], ("FedAvg", 1): [0.5], ("FedSQ", 0): [0.6], ("FedSQ", 1): [NAN]}))
    assert cells(rendered(compare_table(of, "FedAvg")), "FedSQ")[1][1] == "– (1/2 seeds)"


def test_the_widest_numbers_fit_without_wrapping() -> None:
    name = "FedSQ+FedMR+FedAdam"
    of = THREE.assign(algorithm=THREE["algorithm"].replace("FedSQ", name))
    # mean 66.7, deviations in thirds -2 1 1: 57.7, the largest that three accuracies can have
    of["best_accuracy"] = [0.0, 1.0, 1.0] * 2
    of["final_accuracy"] = of["final_accuracy_released"] = of["best_accuracy"]
    of["seconds_per_round"], of["bytes_per_round"] = 3599.0, 12_345e6
    of["rounds_to_best"] = [10.0, 50.0, 90.0] * 2
    lines = rendered(compare_table(of, "FedAvg"))
    # 2 header lines, a rule, 2 rows; a gap, a title, a header, a rule, 1 row: nothing wrapped
    assert len(lines) == 10
    assert cells(lines, name)[0] == [
        *(name, "3", "66.7 ± 57.7", "50.0 ± 40.0", "66.7 ± 57.7", "66.7 ± 57.7"),
        *("3599", "12345"),
    ]
    assert len(rendered(run_table(of))) == 9  # 2 header lines, a rule, 6 rows


def test_sixteen_algorithms_fit_without_wrapping() -> None:
    names = ["FedAvg", "FedSQ+FedMR", "FedSQ+FrozenBN", *(f"FedSQ+Method{n:02}" for n in range(13))]
    of = runs(table({(name, seed): [0.1, 0.9, 0.5] for name in names for seed in range(3)}))
    # 2 header lines, a rule, 16 rows; a gap, a title, a header, a rule, 15 rows
    assert len(rendered(compare_table(of, "FedAvg"))) == 38


def test_a_longer_name_fits_beside_common_numbers() -> None:
    of = THREE.assign(algorithm=THREE["algorithm"].replace("FedSQ", "FedSQ+FedMR+FedAdam-nobn"))
    assert len(rendered(compare_table(of, "FedAvg"))) == 10


def test_a_name_too_long_folds_and_the_numbers_stay_whole() -> None:
    of = THREE.assign(algorithm=THREE["algorithm"].replace("FedSQ", "x" * 60))
    text = "\n".join(rendered(compare_table(of, "FedAvg")))
    assert "52.7 ± 1.5" in text and "+1.7 ± 0.6 points (3/3 seeds)" in text and "…" not in text


def test_brackets_in_a_name_are_not_markup() -> None:
    of = runs(table({("Fed[bold]SQ", 0): [0.5]}))
    assert any("Fed[bold]SQ" in line for line in rendered(run_table(of)))


@pytest.mark.parametrize(
    ("seconds", "size", "shown"),
    [(0.01234, 448, ["0.012", "0.00045"]), (0.5, 0, ["0.50", "0"]), (345.6, 5e5, ["346", "0.50"])],
)
def test_small_numbers_keep_their_digits(seconds: float, size: float, shown: list[str]) -> None:
    of: pd.DataFrame = runs(table({("FedSQ", 0): [0.5]}))
    of["seconds_per_round"], of["bytes_per_round"] = seconds, size
    assert cells(rendered(run_table(of)), "FedSQ")[0][-2:] == shown


def test_an_unknown_reference_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'FedAvg'"):
        compare_table(THREE, "FedAvgg")
