"""FedSQ as a solver of BenchOpt's benchmark_flamby: copy this file into its folder `solvers`."""

from benchopt import safe_import_context

with safe_import_context() as import_ctx:
    from benchmark_utils.template_flamby_strategy import FLambySolver

    from fedsq_plugin.hosts.flamby.hook import register

    register()
    from flamby.strategies import FedSQ


class Solver(FLambySolver):
    """FedSQ, on data sets whose Baseline has gates: IXI, KiTS, and Camelyon with `gate_accept`.

    For another row, import it in FedSQ's place; the names are in `fedsq algorithms`.
    """

    name = "FedSQ"
    parameters = {  # noqa: RUF012 - BenchOpt's own form
        "learning_rate": [0.01],
        "batch_size": [32],
        "num_updates": [100],
        "structural_copy": ["fixed"],
        "gate_accept": [[]],  # Camelyon: [["attention_V.1", "attention_U.1"]]
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, strategy=FedSQ, **kwargs)

    def set_strategy_specific_args(self):
        own = {"structural_copy": self.structural_copy, "gate_accept": self.gate_accept}
        self.strategy_specific_args = own
