"""Random files in the layouts of FLamby's data sets, a few samples for each centre.

They go with a copy of FLamby, whose lists of samples are cut down to those that have a file.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

CHECKOUT = os.environ.get("FLAMBY_CHECKOUT", "")
needs_flamby = pytest.mark.skipif(
    not CHECKOUT,
    reason="needs FLamby: git clone https://github.com/owkin/FLamby, pip install -e '.[flamby]', and "
    "FLAMBY_CHECKOUT=that folder",
)

PATCH = (16, 32, 64)
"""Of the KiTS stand-in, in voxels; nnU-Net halves 4 times along the first axis, 5 times along the others."""


def copied(root: Path) -> Path:
    """A copy of the checkout's package in `root`, which stand-ins may change: its `flamby/datasets`."""
    ignored = shutil.ignore_patterns("dataset_location*")
    shutil.copytree(Path(CHECKOUT, "flamby"), root / "flamby", ignore=ignored)
    return root / "flamby" / "datasets"


def locate(datasets: Path, dataset: str, folder: Path) -> None:
    """Let FLamby's own configuration name the folder of the data."""
    (datasets / dataset / "dataset_creation_scripts" / "dataset_location.yaml").write_text(
        f"dataset_path: {folder}\ndownload_complete: true\npreprocessing_complete: true\n"
    )


def _few(table: pd.DataFrame, by: list[str], each: int) -> pd.DataFrame:
    return table.groupby(by, sort=True).head(each)


def isic(datasets: Path, folder: Path) -> None:
    """Two training and two test images of a centre, 224 pixels a side."""
    from PIL import Image

    split = datasets / "fed_isic2019" / "dataset_creation_scripts" / "train_test_split"
    few = _few(pd.read_csv(split), ["fold2"], 2)
    few.to_csv(split, index=False)
    images = folder / "ISIC_2019_Training_Input_preprocessed"
    images.mkdir(parents=True)
    for n, name in enumerate(few["image"]):
        pixels = np.random.default_rng(n).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{name}.jpg")


def ixi(datasets: Path, folder: Path) -> None:
    """A training and a test volume of a centre, with their brain masks: beside each other and zipped."""
    import nibabel

    table = pd.read_csv(datasets / "fed_ixi" / "metadata" / "metadata_tiny.csv")
    train, test = (table[table["Split"] == split] for split in ("train", "test"))
    chosen = pd.concat([_few(train, ["Manufacturer"], 1), _few(test, ["Manufacturer"], 1)])
    root = folder / "7kd5wj7v7p-3"
    generator = np.random.default_rng(0)
    for patient, centre in zip(chosen["Patient ID"], chosen["Manufacturer"], strict=True):
        name = f"IXI{patient:03d}-{('Guys', 'HH', 'IOP')[centre]}-0001"
        for kind, suffix, values in (
            ("T1", "image", generator.random((24, 30, 24))),
            ("label", "label", (generator.random((24, 30, 24)) > 0.5).astype(float)),
        ):
            at = root / "IXI_sample" / name / kind / f"{name}_{suffix}.nii.gz"
            at.parent.mkdir(parents=True)
            nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), at)
    with zipfile.ZipFile(folder / "7kd5wj7v7p-3.zip", "w") as zipped:
        for file in sorted(root.rglob("*.nii.gz")):
            zipped.write(file, file.relative_to(folder))


def kits(datasets: Path, folder: Path) -> None:
    """A training case and a test case of a site, three of the first, as nnU-Net's preprocessing leaves
    them; FLamby's configuration names the folder."""
    sites = datasets / "fed_kits19" / "metadata" / "thresholded_sites.csv"
    table = pd.read_csv(sites)
    train, test = (table[table["train_test_split"] == fold] for fold in ("train", "test"))
    first = test["site_ids"] == test["site_ids"].min()
    few = pd.concat([_few(train, ["site_ids"], 1), test[first][:3], _few(test[~first], ["site_ids"], 1)])
    few.to_csv(sites, index=False)
    task = folder / "kits19_preprocessing" / "Task064_KiTS_labelsFixed"
    cases = task / "nnUNetData_plans_v2.1_stage0"
    cases.mkdir(parents=True)
    _pickled(task / "nnUNetPlansv2.1_plans_3D.pkl", {"plans_per_stage": [{"patch_size": np.array(PATCH)}]})
    for n, case in enumerate(few["case_ids"]):
        generator = np.random.default_rng(n)
        shape = tuple(side + 8 for side in PATCH)
        labels = generator.integers(0, 3, shape)
        data = np.stack([generator.standard_normal(shape), labels]).astype(np.float32)
        np.savez(cases / f"{case}.npz", data=data)
        places = {kind: np.argwhere(labels == kind)[:50] for kind in (1, 2)}
        _pickled(cases / f"{case}.pkl", {"class_locations": places})
    locate(datasets, "fed_kits19", folder)


def camelyon(datasets: Path, folder: Path) -> None:
    """Features of some tiles for three training and three test slides of a hospital."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(datasets / "fed_camelyon16" / "metadata" / "metadata.csv")
    labels = pd.read_csv(datasets / "fed_camelyon16" / "labels.csv")
    known = set(labels["filenames"])
    names = table["slide_name"].str.partition(".")[0].str.lower()
    table = table.assign(name=names, fold=np.where(names.str.startswith("test"), "test", "train"))
    table = table[[f"{name}.tif.npy" in known for name in table["name"]]]
    for n, name in enumerate(_few(table, ["fold", "hospital_corrected", "label"], 2)["name"]):
        tiles = np.random.default_rng(n).random((5 + n % 3, 2048), dtype=np.float32)
        np.save(folder / f"{name}.tif.npy", tiles)


def tcga(datasets: Path, folder: Path) -> None:
    """Random patients in place of FLamby's own table. No data of TCGA's are left, so that the marker of an
    accepted licence, without which FLamby asks, accepts nothing."""
    package = datasets / "fed_tcga_brca"
    table = pd.read_csv(package / "brca.csv")
    generator = np.random.default_rng(0)
    random: dict[str, Any] = {"E": generator.integers(0, 2, len(table)), "T": generator.integers(1, 999, len(table))}
    for column in table.columns[1:]:
        if column not in random:
            random[column] = generator.integers(0, 2, len(table))
    columns = {name: random.get(name, table[name]) for name in table.columns}
    pd.DataFrame(columns).to_csv(package / "brca.csv", index=False)
    (package / "dataset_creation_scripts" / "license_agreement_fed_tcga_brca").touch()


def _pickled(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        pickle.dump(content, file)


def forget_flamby() -> None:
    """Let the next import of FLamby be of what is on the path by then."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "flamby"]:
        del sys.modules[name]
