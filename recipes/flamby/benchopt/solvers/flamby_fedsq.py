"""FedSQ as a solver of BenchOpt's benchmark_flamby: copy this file into its folder `solvers`.

Run with benchmark_flamby d6ceb54 (2024-06-12), FLamby edacf54, numpy 1.26.4 and torch 2.15 under BenchOpt
1.5.1, 1.6.0, 1.7.0, 1.8.1 and 1.10.0. What these need, with any solver:

- `pip install 'benchopt<1.8' 'joblib<1.6' 'pyarrow<26'`. With BenchOpt 1.8.1 and 1.10.0, the benchmark's own
  solvers end in KeyError 'value' (its stopping rule); BenchOpt 1.6.0 to 1.8.1 do not import with joblib 1.6;
  pyarrow 26 refuses numpy 1.26.
- `pip install --no-deps nnunet==1.7.0`, whatever the data set: its objective.py imports KiTS and LIDC.
- For IXI and LIDC, `self.fed_dataset(center=i, ...)` for `self.fed_dataset(i, ...)`, twice, in its
  benchmark_utils/template_flamby_dataset.py: the first parameter of these classes is another one.

It computes losses in training mode: with BatchNorm, FedSQ's losses, whose gates are in evaluation mode, begin
elsewhere than FedAvg's; the metrics begin equal.
"""

from benchmark_utils import CustomSPC
from benchmark_utils.template_flamby_strategy import FLambySolver
from benchopt import safe_import_context

with safe_import_context() as import_ctx:
    import torch
    from torch.utils.data import DataLoader

    from fedsq_plugin.errors import FedSQError
    from fedsq_plugin.federation.seeding import isolated
    from fedsq_plugin.hosts.flamby.hook import register

    register()
    from flamby.strategies import FedSQ


class Solver(FLambySolver):
    """FedSQ, on data sets whose model has gates; others are skipped, with the reason.

    For another algorithm, import it in FedSQ's place; the names are in `fedsq algorithms`.
    """

    name = "FedSQ"
    parameters = {  # noqa: RUF012 - BenchOpt's own form
        "learning_rate": [0.01],
        "batch_size": [32],
        "num_updates": [100],
        "structural_copy": ["fixed"],
        "gate_accept": [[]],  # Camelyon: [["attention_V.1", "attention_U.1"]]
    }
    # FLambySolver's own, but for the key: BenchOpt's default for it is another one since 1.8.
    stopping_criterion = CustomSPC(patience=100_000_000, strategy="callback", key_to_monitor="objective_value")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, strategy=FedSQ, **kwargs)

    def skip(self, train_datasets, collate_fn, model, **others):
        """The first forward finds the gates: it is done here, with random generators of its own."""
        self.set_strategy_specific_args()
        try:
            with isolated(0), torch.no_grad():
                x, _ = next(iter(DataLoader(train_datasets[0], 1, collate_fn=collate_fn)))
                viewed, *_ = self.strategy.viewed(model, self.strategy_specific_args)
                viewed.eval()(x)
        except FedSQError as error:
            return True, str(error)
        return False, None

    def set_strategy_specific_args(self):
        own = {"structural_copy": self.structural_copy, "gate_accept": self.gate_accept}
        self.strategy_specific_args = own
