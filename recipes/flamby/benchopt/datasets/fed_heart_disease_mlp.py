"""Heart Disease with an MLP as a data set of BenchOpt's benchmark_flamby: copy this file into its `datasets`.

Its own "Fed-Heart-Disease" has FLamby's linear baseline, which has no gates.
"""

from benchmark_utils.template_flamby_dataset import FLambyDataset
from benchopt import safe_import_context

with safe_import_context() as import_ctx:
    from flamby.datasets.fed_heart_disease import NUM_CLIENTS, Baseline, BaselineLoss, FedHeartDisease, metric

    from fedsq_plugin.data.flamby.backbones import factory
    from fedsq_plugin.data.flamby.catalogue import CATALOGUE


class Dataset(FLambyDataset):
    """The centres, the split, the loss and the metric are those of "Fed-Heart-Disease"."""

    name = "Fed-Heart-Disease-MLP"
    parameters = {"train": ["fl"], "test": ["val"], "seed": [42]}  # noqa: RUF012 - BenchOpt's own form

    def __init__(self, *args, **kwargs):
        super().__init__(
            *args,
            fed_dataset=FedHeartDisease,
            model_arch=factory(CATALOGUE["flamby/fed_heart_disease"], "mlp", None, Baseline),
            loss=BaselineLoss,
            num_clients=NUM_CLIENTS,
            metric=metric,
            test_size=0.25,
            stratify_func=lambda sample: sample[1],
            **kwargs,
        )
