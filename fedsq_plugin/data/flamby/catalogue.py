"""Facts about FLamby's data sets that their packages do not export (owkin/FLamby, edacf54)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PREFIX = "flamby/"
"""The names of FLamby's data sets and of their baselines begin with this in a recipe."""
BASELINE = f"{PREFIX}baseline"
"""`model` in a recipe: the data set's own `Baseline()`."""
MLP = "mlp"
"""`model` in a recipe: our MLP, with the inputs and outputs that the data set needs."""
NORMED = "mlp_bn"
"""`model` in a recipe: the MLP with BatchNorm."""
MODELS = (MLP, NORMED, BASELINE)
"""Models whose size comes from a data set of FLamby's."""


@dataclass(frozen=True)
class FlambyData:
    """One data set. Module paths are those of its `Baseline`."""

    name: str
    """The name of its package in `flamby.datasets`."""
    outputs: int
    """Outputs of a model: the number of classes, or 1."""
    metric: str
    """The name of what FLamby's `metric` measures."""
    files: str
    """Glob; at least one such file must be in its folder."""
    get: Sequence[str]
    """Commands that get the data, run in the data set's dataset_creation_scripts. They ask for the licence, unless
    `before` does."""
    baseline: str
    """What `Baseline()` makes, in words."""
    head: str
    """Module path of the last layer."""
    over: Literal["all", "labels", "scan"] = "all"
    """What FLamby's metric is applied to: all predictions together; the labels that are predicted for a batch; a
    batch that is taken for one scan."""
    features: int | None = None
    """Length of a sample, where samples are vectors."""
    colour_images: bool = False
    """Whether samples are images of three channels, which our own backbones take."""
    probability: bool = False
    """Whether its loss takes probabilities, so that a model ends in a sigmoid."""
    ungated: tuple[str, ...] = ()
    """Patterns of the modules that have no gate and stay as they are."""
    instead: str | None = None
    """What to train under gates where the baseline has no gate, in words; None: it has gates."""
    before: str = ""
    """What to do before those commands, in words."""
    downloads: bool = False
    """Whether the baseline downloads its weights."""
    test_batch: int | None = None
    """Samples of a test batch in FLamby's own benchmark; None: as many as in training."""
    takes_path: bool = True
    """Whether its constructor takes `data_path`."""
    alternating: str | None = None
    """Attribute of the data set that every sample flips; it is set back before each pass, so that a pass does not
    depend on the pass before."""
    not_in_path: str | None = None
    """Text that must not be in the path of its files: FLamby takes it for the name of a split."""
    generated: bool = False
    """Whether the data are generated, with any number of centres."""
    needs_gpu: bool = False
    """Whether its loss works on a GPU only."""

    @property
    def key(self) -> str:
        """Its name in a recipe."""
        return f"{PREFIX}{self.name}"


_LINEAR = "a linear model"

CATALOGUE: dict[str, FlambyData] = {
    about.key: about
    for about in (
        FlambyData(
            "fed_camelyon16",
            outputs=1,
            metric="AUC",
            files="*.npy",
            get=(
                "python download.py --output-folder FOLDER --path-to-secret SECRET --port 6006",
                "python tiling_slides.py",
            ),
            baseline="DeepMIL",
            head="classifier.4",
            ungated=("attention_V.1", "attention_U.1"),  # attention over the tiles of a bag
            not_in_path="test",
        ),
        FlambyData(
            "fed_heart_disease",
            outputs=1,
            metric="accuracy",
            files="processed.*.data",
            get=("python download.py --output-folder FOLDER",),
            baseline=_LINEAR,
            head="linear",
            features=13,
            probability=True,
            instead=f"the model {MLP}",
        ),
        FlambyData(
            "fed_isic2019",
            outputs=8,
            metric="balanced accuracy",
            files="ISIC_2019_Training_Input_preprocessed/*.jpg",
            get=("python download_isic.py --output-folder FOLDER", "python resize_images.py"),
            baseline="EfficientNet-B0",
            head="base_model._fc",
            colour_images=True,
            instead="the model resnet18 or alexnet",
            downloads=True,
        ),
        FlambyData(
            "fed_ixi",
            outputs=2,
            metric="Dice",
            files="7kd5wj7v7p-3/IXI_sample/*/T1/*.nii.gz",
            get=("python download.py --output-folder FOLDER",),
            baseline="a UNet",
            head="classifier.conv_layer",
            test_batch=1,
        ),
        FlambyData(
            "fed_kits19",
            outputs=3,
            metric="Dice",
            files="kits19_preprocessing/Task064_KiTS_labelsFixed/nnUNetPlansv2.1_plans_3D.pkl",
            before="git clone https://github.com/neheller/kits19, and do what its README says",
            get=(
                "python create_config.py --output_folder FOLDER",
                "python parsing_and_adding_metadata.py",
                "python run_nnUnet_plan_and_preprocess.py",
            ),
            baseline="nnU-Net",
            head="seg_outputs.4",
            over="labels",
            test_batch=2,
            takes_path=False,
            alternating="oversample_next_sample",
        ),
        FlambyData(
            "fed_lidc_idri",
            outputs=1,
            metric="Dice",
            files="**/patient.nii.gz",
            get=("python download_ct_scans.py -o FOLDER",),
            baseline="VNet, whose ELUs are smooth",
            head="out_tr.conv2",
            over="scan",
            instead="an algorithm without gates, as FedAvg, or a network of your own with nn.LeakyReLU",
            test_batch=1,
            needs_gpu=True,
        ),
        FlambyData(
            "fed_synthetic",
            outputs=3,
            metric="accuracy",
            files="*.data",
            get=("python download.py --centers 4 --snr 0.25 --output-folder FOLDER",),
            baseline=_LINEAR,
            head="linear",
            features=10,
            generated=True,
            instead=f"the model {MLP}",
        ),
        FlambyData(
            "fed_tcga_brca",
            outputs=1,
            metric="concordance index",
            files="brca.csv",
            get=(),
            baseline=_LINEAR,
            head="fc",
            features=39,
            instead=f"the model {MLP}",
            takes_path=False,
        ),
    )
}
