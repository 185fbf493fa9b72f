from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.results.metrics import checked, frame
from fedsq_plugin.results.statistics import STATISTICS, measured, over_seeds, paired, runs

from .rows import NAN, row, table

ACCURACIES = st.lists(st.floats(0, 1) | st.just(NAN), min_size=1, max_size=4)
TABLES = st.dictionaries(
    st.tuples(st.sampled_from(["FedAvg", "FedSQ", "FedBN"]), st.integers(0, 3)), ACCURACIES, min_size=1, max_size=8
).map(table)

# Best accuracies: FedAvg .5 .6 .7, FedSQ .6 .5 .9, for the seeds 0 1 2.
THREE = table(
    {
        ("FedSQ", 0): [0.6, 0.4],
        ("FedSQ", 1): [0.4, 0.5],
        ("FedSQ", 2): [0.9, 0.9],
        ("FedAvg", 0): [0.5, 0.5],
        ("FedAvg", 1): [0.2, 0.6],
        ("FedAvg", 2): [0.7, 0.1],
    }
)


def test_one_run_by_hand() -> None:
    metrics = frame(
        [
            checked(row(round=1, accuracy=0.4, seconds=1, bytes_up=10, bytes_down=20)),
            checked(row(round=2, accuracy=0.75, seconds=2, bytes_up=10, bytes_down=0)),
            checked(row(round=3, accuracy=0.75, seconds=3, bytes_up=10, bytes_down=10)),
            checked(row(round=4, accuracy=0.5, accuracy_released=0.125, seconds=6)),
            checked(row(round=4, split="train", accuracy=1.0, seconds=6)),
        ]
    )
    (run,) = runs(metrics[metrics["round"] < 4]).to_dict("records")
    assert run == {
        "algorithm": "FedSQ",
        "seed": 0,
        "best_accuracy": 0.75,
        "rounds_to_best": 2,  # 3 reaches .75 too, but later
        "final_accuracy": 0.75,
        "final_accuracy_released": 0.25,
        "seconds_per_round": 2.0,  # (1 + 2 + 3) / 3
        "bytes_per_round": 20.0,  # (30 + 10 + 20) / 3
    }
    last = runs(metrics).iloc[0]  # the train split's 1.0 does not count
    assert (last["best_accuracy"], last["final_accuracy"]) == (0.75, 0.5)
    assert last["final_accuracy_released"] == 0.125
    assert last["seconds_per_round"] == 3.0  # (1 + 2 + 3 + 6) / 4
    assert runs(metrics, split="train")["final_accuracy"].tolist() == [1.0]


def test_other_splits_have_accuracies_only() -> None:
    metrics = table({("FedSQ", 0): [0.25, 0.75, 0.5], ("FedAvg", 0): [0.5]}, "silos")
    fedsq, average = runs(metrics, "silos").to_dict("records")
    assert fedsq == {"algorithm": "FedSQ", "seed": 0, "best_accuracy": 0.75, "rounds_to_best": 2, "final_accuracy": 0.5}
    # One round only, but the split has several.
    assert (average["best_accuracy"], average["final_accuracy"]) == (0.5, 0.5)


def test_a_split_of_one_round_has_one_accuracy() -> None:
    tuned = {("FedAvg", 0): [0.5], ("FedAvg", 1): [0.25], ("FedSQ", 0): [0.75], ("FedSQ", 1): [1.0]}
    of = runs(table(tuned, "silos_tuned"), "silos_tuned")
    assert list(of.columns) == ["algorithm", "seed", "final_accuracy"]
    assert measured(of) == ["final_accuracy"]
    # (.5 + .25) / 2 = .375, deviations .125 both: sqrt(2 / 64)
    average = over_seeds(of).iloc[0]
    assert average["final_accuracy_mean"] == 0.375
    assert average["final_accuracy_std"] == pytest.approx(math.sqrt(1 / 32))
    # .75 - .5 = .25 and 1 - .25 = .75: mean .5, deviations .25 both: sqrt(2 / 16)
    (difference,) = paired(of, "FedAvg", "final_accuracy").to_dict("records")
    assert (difference["mean"], difference["wins"]) == (0.5, 2)
    assert difference["std"] == pytest.approx(math.sqrt(1 / 8))
    with pytest.raises(ConfigError, match="no statistic 'best_accuracy'"):
        paired(of, "FedAvg")


def test_algorithms_by_appearance_and_seeds_ascending() -> None:
    of = runs(table({("FedSQ", 2): [0.1], ("FedAvg", 1): [0.1], ("FedSQ", 0): [0.1]}))
    assert list(zip(of["algorithm"], of["seed"], strict=True)) == [("FedSQ", 0), ("FedSQ", 2), ("FedAvg", 1)]


def test_a_diverged_run_keeps_its_best_and_has_no_final() -> None:
    run = runs(table({("FedSQ", 0): [0.25, 0.5, NAN, NAN]})).iloc[0]
    assert (run["best_accuracy"], run["rounds_to_best"]) == (0.5, 2)
    assert math.isnan(run["final_accuracy"])
    never = runs(table({("FedSQ", 0): [NAN, NAN]})).iloc[0]
    assert math.isnan(never["best_accuracy"]) and math.isnan(never["rounds_to_best"])


def test_over_seeds_by_hand() -> None:
    of = over_seeds(runs(THREE)).set_index("algorithm")
    assert list(of.index) == ["FedSQ", "FedAvg"] and of["seeds"].tolist() == [3, 3]
    # (.5 + .6 + .7) / 3 = .6; deviations -.1 0 .1, so sqrt(.02 / 2) = .1
    assert of.loc["FedAvg", "best_accuracy_mean"] == pytest.approx(0.6)
    assert of.loc["FedAvg", "best_accuracy_std"] == pytest.approx(0.1)
    # (.6 + .5 + .9) / 3 = 2/3; deviations in thirtieths -2 -5 7, so (4 + 25 + 49) / 900 / 2
    assert of.loc["FedSQ", "best_accuracy_mean"] == pytest.approx(2 / 3)
    assert of.loc["FedSQ", "best_accuracy_std"] == pytest.approx(math.sqrt(78 / 1800))
    # rounds to best 1 2 1: mean 4/3, squares (1 + 4 + 1) / 9 = 6/9, half of it 1/3
    assert of.loc["FedSQ", "rounds_to_best_mean"] == pytest.approx(4 / 3)
    assert of.loc["FedSQ", "rounds_to_best_std"] == pytest.approx(math.sqrt(1 / 3))
    assert of.loc["FedSQ", "bytes_per_round_mean"] == 7_000_000


def test_one_seed_has_no_deviation_and_a_lost_seed_no_mean() -> None:
    one = over_seeds(runs(table({("FedSQ", 5): [0.5]}))).iloc[0]
    assert one["seeds"] == 1 and one["best_accuracy_mean"] == 0.5
    assert math.isnan(one["best_accuracy_std"])
    lost = over_seeds(runs(table({("FedSQ", 0): [0.5, 0.5], ("FedSQ", 1): [0.5, NAN]}))).iloc[0]
    assert lost["best_accuracy_mean"] == 0.5 and lost["best_accuracy_std"] == 0
    assert math.isnan(lost["final_accuracy_mean"]) and math.isnan(lost["final_accuracy_std"])


def test_paired_by_hand() -> None:
    (of,) = paired(runs(THREE), "FedAvg").to_dict("records")
    # differences .1 -.1 .2: mean .2/3; deviations in thirtieths 1 -5 4: (1 + 25 + 16) / 900 / 2
    assert of["algorithm"] == "FedSQ" and (of["n"], of["wins"]) == (3, 2)
    assert of["mean"] == pytest.approx(0.2 / 3)
    assert of["std"] == pytest.approx(math.sqrt(42 / 1800))
    # rounds to best 1 2 1 against 1 2 1: never strictly better
    (of,) = paired(runs(THREE), "FedAvg", "rounds_to_best").to_dict("records")
    assert (of["mean"], of["std"], of["wins"]) == (0, 0, 0)


def test_fewer_rounds_win() -> None:
    of = runs(table({("FedAvg", 0): [0.1, 0.2, 0.3], ("FedSQ", 0): [0.3, 0.2, 0.1]}))
    (row,) = paired(of, "FedAvg", "rounds_to_best").to_dict("records")
    assert (row["mean"], row["wins"]) == (-2, 1)


def test_only_the_seeds_both_have_are_paired() -> None:
    of = runs(
        table(
            {
                ("FedAvg", 0): [0.25],
                ("FedAvg", 1): [0.5],
                ("FedSQ", 1): [0.75],
                ("FedSQ", 2): [1.0],
                ("FedBN", 3): [1.0],
                ("FedMR", 0): [NAN],
                ("FedMR", 1): [1.0],
            }
        )
    )
    by = paired(of, "FedAvg").set_index("algorithm")
    assert (by.loc["FedSQ", "mean"], by.loc["FedSQ", "n"], by.loc["FedSQ", "wins"]) == (0.25, 1, 1)
    assert math.isnan(by.loc["FedSQ", "std"])
    assert math.isnan(by.loc["FedBN", "mean"]) and by.loc["FedBN", "n"] == 0
    assert math.isnan(by.loc["FedMR", "mean"])  # a diverged seed is not left out of the mean
    assert (by.loc["FedMR", "n"], by.loc["FedMR", "wins"]) == (2, 1)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'fedavgg' .* did you mean 'FedAvg'"):
        paired(runs(THREE), "fedavgg")
    with pytest.raises(ConfigError, match="did you mean 'best_accuracy'"):
        paired(runs(THREE), "FedAvg", "best_acuracy")
    with pytest.raises(ConfigError, match="no rows of split 'tests'; did you mean 'test'"):
        runs(THREE, "tests")
    with pytest.raises(ConfigError, match="no rows of split 'test'"):
        runs(frame([]))


@settings(max_examples=40)
@given(metrics=TABLES, shuffle=st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_bit(metrics: pd.DataFrame, shuffle: object) -> None:
    order = list(range(len(metrics)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    one, two = runs(metrics), runs(metrics.iloc[order])
    keys = ["algorithm", "seed"]
    assert_frame_equal(
        one.sort_values(keys, ignore_index=True), two.sort_values(keys, ignore_index=True), check_exact=True
    )
    assert_frame_equal(
        over_seeds(one).sort_values("algorithm", ignore_index=True),
        over_seeds(two).sort_values("algorithm", ignore_index=True),
        check_exact=True,
    )


@settings(max_examples=40)
@given(metrics=TABLES, column=st.sampled_from(STATISTICS))
def test_paired_differences_are_antisymmetric(metrics: pd.DataFrame, column: str) -> None:
    of = runs(metrics)
    algorithms = list(of["algorithm"].unique())
    by = {a: paired(of, a, column).set_index("algorithm") for a in algorithms}
    for a in algorithms:
        for b in set(algorithms) - {a}:
            ab, ba = by[b].loc[a], by[a].loc[b]
            assert ab["n"] == ba["n"] and ab["wins"] + ba["wins"] <= ab["n"]
            assert ab["mean"] == -ba["mean"] or (math.isnan(ab["mean"]) and math.isnan(ba["mean"]))
            assert ab["std"] == ba["std"] or (math.isnan(ab["std"]) and math.isnan(ba["std"]))
