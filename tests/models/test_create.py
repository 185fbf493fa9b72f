import logging
import subprocess
import sys
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model, resnet18

from fedsq_plugin import DualCopy, models
from fedsq_plugin.errors import ConfigError, WeightsError

GATED = ["alexnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
SMOOTH = ["convnext_tiny", "vit_b_16", "efficientnet_b0", "gelunet"]
RESNET18_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


def raised(kind, *args, **kwargs):
    """The message of the error that `create` raises; always one line."""
    with pytest.raises(kind) as caught:
        models.create(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def equal(first, second):
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def test_names_are_the_plain_models_and_the_dual_copies_of_those_with_gates():
    assert models.names() == GATED + SMOOTH + [f"dualcopy_{name}" for name in GATED]
    assert [name for name in models.names() if models.find_backbone(name).smooth] == SMOOTH
    for name in GATED:
        assert models.find_backbone(f"dualcopy_{name}") == models.find_backbone(name)
        assert models.find_backbone(name).ungated == ()


@pytest.mark.parametrize("name", SMOOTH)
def test_a_dual_copy_of_smooth_activations_says_what_to_do_instead(name):
    message = raised(ConfigError, f"dualcopy_{name}", 10)
    assert message == (
        f"unknown model 'dualcopy_{name}': the smooth activations of {name} have no gates; use model: {name} "
        "with federated_optimizer: FedSQ and warm_start_args.relu_ise: true"
    )


def test_importing_the_package_does_not_import_torchvision():
    code = "import sys, fedsq_plugin.models as m; m.names(); sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Convolutions and linear layers by the layer counts of He et al. 2016 (a downsampling convolution
# in each of the stages that changes its shape, which are 3 of basic blocks and 4 of bottlenecks).
# ConvNeXt-T has 3 + 3 + 9 + 3 blocks of 3 after its stem, and 3 downsamplings; ViT-B 12 blocks, whose
# attention is one Linear (its input projections are a bare parameter) and whose MLP is two; EfficientNet-B0
# 16 blocks of 5, the first without an expansion, between two convolutions.
@pytest.mark.parametrize(
    ("name", "layers", "width"),
    [
        ("alexnet", 8, 4096),
        ("resnet18", 18 + 3, 512),
        ("resnet34", 34 + 3, 512),
        ("resnet50", 50 + 4, 2048),
        ("resnet101", 101 + 4, 2048),
        ("resnet152", 152 + 4, 2048),
        ("convnext_tiny", 1 + 18 * 3 + 3 + 1, 768),
        ("vit_b_16", 1 + 12 * 3 + 1, 768),
        ("efficientnet_b0", 1 + 16 * 5 - 1 + 1 + 1, 1280),
        ("gelunet", 3 + 1, 128),
    ],
)
def test_every_name_makes_its_model_with_a_new_head(name, layers, width):
    with torch.device("meta"):  # the large ones take seconds to initialise
        model = models.create(name, 7)
    found = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(found) == layers
    assert model.get_submodule(models.find_backbone(name).head) is found[-1]
    assert (found[-1].in_features, found[-1].out_features) == (width, 7)


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "convnext_tiny", "efficientnet_b0"])
def test_the_same_seed_gives_torchvisions_own_initialisation(name):
    torch.manual_seed(3)
    mine = models.create(name, 5)
    torch.manual_seed(3)
    theirs = get_model(name, num_classes=5)
    assert equal(mine.state_dict(), theirs.state_dict())
    assert mine.training


@pytest.mark.parametrize(("name", "in_channels"), [("resnet18", 3), ("alexnet", 1)])
def test_small_images_run_from_8_to_64_pixels_with_torchvisions_keys(name, in_channels):
    model = models.create(name, 4, small_images=True, in_channels=in_channels).eval()
    assert list(model.state_dict()) == list(get_model(name).state_dict())
    for side in (8, 16, 32, 64):
        assert model(torch.randn(2, in_channels, side, side)).shape == (2, 4)


def test_the_small_stem_keeps_the_resolution():
    model = models.create("resnet18", 4, small_images=True)
    assert model.conv1.weight.shape == (64, 3, 3, 3) and model.conv1.bias is None
    assert model.maxpool(model.conv1(torch.randn(1, 3, 9, 9))).shape == (1, 64, 9, 9)
    small = models.create("alexnet", 4, small_images=True)
    assert small.features[0].weight.shape == (64, 3, 3, 3) and small.features[0].bias.shape == (64,)
    assert small.features[:3](torch.randn(1, 3, 9, 9)).shape == (1, 64, 9, 9)
    # Two poolings of 3 by 2 are left: 32 -> 15 -> 7.
    assert small.features(torch.randn(1, 3, 32, 32)).shape == (1, 256, 7, 7)


def test_the_new_stem_is_initialised_as_torchvision_initialises_it():
    torch.manual_seed(0)
    # He initialisation over the fan out: sqrt(2 / (64 * 3 * 3)) = 0.0589.
    deviation = models.create("resnet18", 4, small_images=True).conv1.weight.std().item()
    assert deviation == pytest.approx(0.0589, rel=0.1)
    # Torch's default: uniform within 1 / sqrt(3 * 3 * 3) = 0.19245.
    largest = models.create("alexnet", 4, small_images=True).features[0].weight.abs().max().item()
    assert 0.18 < largest <= 0.19246


def test_other_channels_keep_the_large_stem():
    model = models.create("resnet18", 4, in_channels=1)
    assert model.conv1.weight.shape == (64, 1, 7, 7)
    assert (model.conv1.stride, model.conv1.padding) == ((2, 2), (3, 3))
    assert isinstance(model.maxpool, nn.MaxPool2d)
    large = models.create("alexnet", 4, in_channels=4)
    assert large.features[0].weight.shape == (64, 4, 11, 11)
    assert large.eval()(torch.randn(1, 4, 63, 63)).shape == (1, 4)


@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
def test_a_dual_copy_is_the_same_model_wrapped(name):
    torch.manual_seed(1)
    plain = models.create(name, 4, small_images=True)
    torch.manual_seed(1)
    dual = models.create(f"dualcopy_{name}", 4, small_images=True)
    assert isinstance(dual, DualCopy) and not isinstance(plain, DualCopy)
    assert equal(dual.state_dict(), plain.state_dict())
    assert equal(dual.structural.state_dict(), plain.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(dual.eval()(x), plain.eval()(x))


def test_a_dual_copy_is_taken_after_the_weights_are_loaded(tmp_path):
    save_file(resnet18(num_classes=6).state_dict(), tmp_path / "w.safetensors")
    dual = models.create("dualcopy_resnet18", 4, weights=tmp_path / "w.safetensors")
    assert dual.fc.out_features == 4
    assert equal(dual.structural.state_dict(), dual.state_dict())


def test_a_file_warms_up_all_but_a_head_of_another_size(tmp_path, caplog):
    source = resnet18(num_classes=6)
    source.bn1.running_mean.fill_(0.25)
    source.bn1.num_batches_tracked.fill_(17)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(5)
    fresh = models.create("resnet18", 4).state_dict()
    torch.manual_seed(5)
    with caplog.at_level(logging.INFO, logger="fedsq_plugin"):
        warm = models.create("resnet18", 4, weights=str(tmp_path / "w.safetensors")).state_dict()
    for key, value in source.state_dict().items():
        assert torch.equal(warm[key], fresh[key] if key.startswith("fc.") else value), key
    assert warm["bn1.num_batches_tracked"].item() == 17
    assert "head fc: the file has 6 outputs, the model 4; newly initialised" in caplog.text


def test_a_file_with_a_head_of_the_same_size_gives_the_head_too(tmp_path, caplog):
    source = resnet18(num_classes=4).state_dict()
    torch.save(source, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, logger="fedsq_plugin"):
        warm = models.create("resnet18", 4, weights=tmp_path / "w.pt")
    assert equal(warm.state_dict(), source)
    assert not caplog.records


def test_a_file_made_with_a_small_stem_fits_a_small_stem(tmp_path):
    source = models.create("resnet18", 4, small_images=True, in_channels=1)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    again = models.create("resnet18", 4, tmp_path / "w.pt", small_images=True, in_channels=1)
    assert equal(again.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("made_with", "asked_for", "remedy"),
    [
        ({}, {"small_images": True}, "small_images: false"),
        ({"small_images": True}, {}, "small_images: true"),
        ({}, {"in_channels": 1}, "in_channels: 3"),
        ({"in_channels": 1}, {"small_images": True}, "small_images: false and in_channels: 1"),
    ],
)
def test_a_file_with_another_stem_names_the_option_that_fits(tmp_path, made_with, asked_for, remedy):
    path = tmp_path / "w.pt"
    torch.save(models.create("resnet18", 4, **made_with).state_dict(), path)
    message = raised(WeightsError, "resnet18", 4, weights=path, **asked_for)
    assert message.startswith(f"weights {path} for resnet18: ")
    assert message.endswith(f"this file needs {remedy}")
    assert "conv1.weight: file 64x" in message
    assert models.create("resnet18", 4, weights=path, **made_with).fc.out_features == 4


def test_a_file_of_another_model_is_refused(tmp_path):
    torch.save(resnet18(num_classes=4).state_dict(), tmp_path / "w.pt")
    message = raised(WeightsError, "resnet34", 4, weights=tmp_path / "w.pt")
    # 34 - 18 = 16 convolutions more, each with a weight and BatchNorm's weight, bias, mean and
    # variance; counters may lack.
    assert "80 missing in the file (layer1.2.conv1.weight 64x64x3x3; " in message
    assert message.endswith("use the model that the file was made with")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet19", "did you mean 'resnet18'?"),
        ("dualcopy_resnt50", "did you mean 'dualcopy_resnet50'?"),
        ("dualcopy_dualcopy_resnet18", "did you mean 'dualcopy_resnet18'?"),
        ("inception", "known: alexnet, convnext_tiny, dualcopy_alexnet"),
        (None, "known: alexnet"),
        (["resnet18"], "did you mean 'resnet18'?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, hint):
    message = raised(ConfigError, name, 10)
    assert repr(name) in message and hint in message
    with pytest.raises(ConfigError, match="unknown model"):
        models.find_backbone(name)


@pytest.mark.parametrize("value", [0, -1, 2.0, "10", True, None])
def test_numbers_must_be_whole_and_at_least_one(value):
    assert f"num_classes is {value!r}" in raised(ConfigError, "resnet18", value)
    assert f"in_channels is {value!r}" in raised(ConfigError, "resnet18", 4, in_channels=value)


def test_weights_must_be_none_a_word_or_a_path():
    assert "weights is True" in raised(ConfigError, "resnet18", 4, weights=True)
    message = raised(WeightsError, "resnet18", 4, weights="imagnet")
    assert "imagnet does not exist" in message and "give 'imagenet' or a file" in message


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty download folder, and a network without hosts."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args, **kwargs):
        raise URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    return tmp_path / "hub" / "checkpoints"


def test_imagenet_without_a_network_says_what_and_offers_a_file(hub):
    message = raised(WeightsError, "resnet18", 4, weights="imagenet")
    assert message == (
        f"cannot fetch ImageNet's weights for resnet18 from {RESNET18_URL} ([Errno -2] Name or service "
        "not known); fetch that file elsewhere and give its path as weights"
    )


@pytest.mark.parametrize("fault", [TimeoutError("timed out"), RuntimeError('invalid hash value (expected "f37072fd")')])
def test_a_download_that_breaks_off_is_one_line(hub, monkeypatch, fault):
    def broken(*args, **kwargs):
        raise fault

    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    assert f"({fault})" in raised(WeightsError, "resnet18", 4, weights="imagenet")


def test_imagenet_loads_what_torchvision_downloads(hub, monkeypatch):
    # As torchvision publishes them: 1000 outputs, and no BatchNorm counters.
    torch.manual_seed(7)
    published = {k: v for k, v in resnet18().state_dict().items() if "num_batches" not in k}
    seen = []

    def download(url, target, hash_prefix, progress):
        seen.append((url, hash_prefix))
        torch.save(published, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        warm = models.create("dualcopy_resnet18", 4, weights="imagenet").state_dict()
        assert warm["fc.weight"].shape == (4, 512)
        assert all(torch.equal(warm[k], v) for k, v in published.items() if not k.startswith("fc."))
        assert warm["bn1.num_batches_tracked"].item() == 0
    assert seen == [(RESNET18_URL, "f37072fd")]  # checked by its hash, and fetched once
    whole = models.create("resnet18", 1000, weights="imagenet")
    assert torch.equal(whole.fc.weight, published["fc.weight"])


@pytest.mark.parametrize("content", [b"", b"<html>blocked by the proxy</html>"])
def test_a_broken_file_in_the_download_folder_is_one_line(hub, content):
    hub.mkdir(parents=True)
    (hub / "resnet18-f37072fd.pth").write_bytes(content)
    assert "cannot fetch" in raised(WeightsError, "resnet18", 4, weights="imagenet")


@pytest.mark.parametrize(
    ("options", "remedy"), [({"small_images": True}, "small_images: false"), ({"in_channels": 1}, "in_channels: 3")]
)
@pytest.mark.parametrize("name", ["alexnet", "vit_b_16"])
def test_imagenet_needs_large_images_of_three_channels(hub, name, options, remedy):
    message = raised(WeightsError, name, 4, weights="imagenet", **options)
    assert f"they need {remedy};" in message and "fetch" not in message


def test_gelunet_has_no_imagenet_weights(hub):
    message = raised(WeightsError, "gelunet", 4, weights="imagenet")
    assert message == "gelunet is ours and has no ImageNet weights; use weights: null, or a file"


# The hashes of torchvision's documentation: version 1, where resnet50 and larger have a second one too.
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("alexnet", "alexnet-owt-7be5be79.pth"),
        ("resnet34", "resnet34-b627a593.pth"),
        ("resnet50", "resnet50-0676ba61.pth"),
        ("resnet101", "resnet101-63fe2227.pth"),
        ("resnet152", "resnet152-394f9c45.pth"),
        ("convnext_tiny", "convnext_tiny-983f1562.pth"),
        ("vit_b_16", "vit_b_16-c867db91.pth"),
        ("efficientnet_b0", "efficientnet_b0_rwightman-7f5810bc.pth"),
    ],
)
def test_imagenet_is_the_first_published_version(hub, name, file):
    assert f"https://download.pytorch.org/models/{file} (" in raised(WeightsError, name, 4, "imagenet")


def test_a_release_loads_into_torchvisions_model():
    dual = models.create("dualcopy_resnet18", 4)
    plain = resnet18(num_classes=4)
    plain.load_state_dict(dual.state_dict())
    assert equal(plain.state_dict(), dual.release().state_dict())
