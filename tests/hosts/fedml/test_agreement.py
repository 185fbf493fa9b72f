"""What a silo reads when FedML trains it, and the options on which the processes of a run must agree."""

from __future__ import annotations

from typing import Any

import pytest

from fedsq_plugin.hosts.fedml.silo import Silos
from fedsq_plugin.settings.agreement import MUST_AGREE
from tests.settings.watch import may_differ, watch_reads

from .cases import ATTACKED
from .conftest import MakeArgs, args_for, prepare


@pytest.mark.parametrize("name", ["FedAvg", "FedSQ", "FedRep"])
@pytest.mark.parametrize("attacked", [True, False], ids=["label flipping", "no attack"])
def test_silos_must_agree_on_what_their_training_reads(
    name: str, attacked: bool, fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[str] = set()

    def watched(original: Any, args: Any) -> Any:
        def call(self: Silos, *arguments: Any) -> Any:
            with watch_reads(type(args)) as read:
                result = original(self, *arguments)
            found.update(read)
            return result

        return call

    attack = ATTACKED["label flipping"] if attacked else {}
    args = args_for(make_args, name, silo_evaluation=True, finetune_epochs=1, **attack)
    for method in ("train_message", "test_message"):
        monkeypatch.setattr(Silos, method, watched(getattr(Silos, method), args))
    prepare(fedml, args).run()
    assert {"learning_rate", "epochs", "finetune_part", "compile", "keep_gates"} <= found
    # Under label flipping a silo draws the silos of the round, to count as one process would.
    assert ({"sampling_seed", "client_num_per_round", "client_num_in_total"} <= found) == attacked
    assert may_differ(found) == set()


def test_what_label_flipping_reads_must_agree() -> None:
    assert {"sampling_seed", "client_num_per_round"} <= set(MUST_AGREE)
