"""The backbones with smooth activations: their stems, and their gates once the activations are ReLUs."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from fedsq_plugin import DualCopy, models, validate
from fedsq_plugin.errors import GateError

SMOOTH = (nn.GELU, nn.SiLU, nn.Hardswish)
CLASSES = 4


@pytest.fixture(scope="module", params=["convnext_tiny", "vit_b_16", "efficientnet_b0", "gelunet"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """The backbone for small images, in evaluation mode; not to be changed."""
    torch.manual_seed(0)
    return models.create(name, CLASSES, small_images=True).eval()


@pytest.fixture(scope="module")
def rectified(name, model):
    """The same with ReLUs, and with a head that ViT's zeros do not make blind."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, SMOOTH):
                setattr(parent, key, nn.ReLU(inplace=getattr(child, "inplace", False)))
    nn.init.normal_(model.get_submodule(models.find_backbone(name).head).weight, std=0.1)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_small_images_keep_the_keys_and_run(name, model):
    if name != "gelunet":
        with torch.device("meta"):
            assert list(model.state_dict()) == list(get_model(name).state_dict())
    for side in (32,) if name == "vit_b_16" else (8, 16, 32, 64):
        assert model(torch.randn(2, 3, side, side)).shape == (2, CLASSES)


def test_it_is_refused_as_it_is(model):
    with pytest.raises(GateError, match=r"(GELU|SiLU) has no fixed linear gate"):
        DualCopy(model)


def test_what_stays_ungated_with_relus_is_what_is_listed(name, rectified, images):
    patterns = models.find_backbone(name).ungated
    assert validate(rectified, images, accept=patterns) == []
    left = validate(rectified, images)
    # 16 blocks, each with one squeeze-and-excitation.
    assert len(left) == (16 if name == "efficientnet_b0" else 0) and bool(left) == bool(patterns)


def test_with_relus_the_dual_copy_equals_the_plain_model(name, rectified, images):
    dual = DualCopy(rectified.eval(), accept=models.find_backbone(name).ungated)
    # With gradients: without, torch runs plain attention, and no other, by a fused kernel that rounds
    # differently.
    assert torch.equal(dual(images), rectified(images))
    with torch.no_grad():
        torch.testing.assert_close(dual(images), rectified(images))


def test_with_relus_a_training_step_reaches_all_that_the_plain_model_trains(name, rectified, images):
    labels = torch.tensor([0, 3])
    dual = DualCopy(rectified.train(), accept=models.find_backbone(name).ungated)
    reached = []
    for network in (rectified, dual):
        torch.manual_seed(2)  # for dropout and stochastic depth
        rectified.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        gradients = {k: p.grad for k, p in rectified.named_parameters() if p.grad is not None}
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        reached.append(list(gradients))
    assert reached[0] == reached[1]
    stem = next(module for module in rectified.modules() if isinstance(module, nn.Conv2d))
    assert stem.weight.grad.any() and rectified.get_submodule(models.find_backbone(name).head).weight.grad.any()


# Stems: the weight's shape, stride and padding with the options; the initial deviations are the models'
# own: 0.02 cut off at 100 deviations, sqrt(1 / (channels * 16 * 16)), sqrt(2 / (32 * 3 * 3)).
@pytest.mark.parametrize(
    ("name", "options", "shape", "stride", "padding", "deviation"),
    [
        ("convnext_tiny", {"small_images": True}, (96, 3, 3, 3), 1, 1, 0.02),
        ("convnext_tiny", {"in_channels": 1}, (96, 1, 4, 4), 4, 0, 0.02),
        ("vit_b_16", {"small_images": True, "in_channels": 1}, (768, 1, 16, 16), 16, 0, 0.0625),
        ("efficientnet_b0", {"small_images": True}, (32, 3, 3, 3), 1, 1, 0.0833),
        ("efficientnet_b0", {"in_channels": 4}, (32, 4, 3, 3), 2, 1, 0.0833),
        ("gelunet", {"small_images": True, "in_channels": 1}, (32, 1, 3, 3), 1, 1, None),
    ],
)
def test_stems(name, options, shape, stride, padding, deviation):
    torch.manual_seed(0)
    model = models.create(name, CLASSES, **options)
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert stem.weight.shape == shape
    assert (stem.stride, stem.padding) == ((stride, stride), (padding, padding))
    if deviation is not None:
        assert stem.weight.std().item() == pytest.approx(deviation, rel=0.1)
        assert stem.bias is None or not stem.bias.any()
    side = 32 if name == "vit_b_16" else 64
    assert model.eval()(torch.randn(1, shape[1], side, side)).shape == (1, CLASSES)


def test_vit_takes_one_size_of_image():
    with torch.device("meta"):
        large, small = (models.create("vit_b_16", CLASSES, small_images=flag) for flag in (False, True))
        # One token for each patch of 16x16, and the class token.
        assert large.encoder.pos_embedding.shape == (1, 14 * 14 + 1, 768)
        assert small.encoder.pos_embedding.shape == (1, 2 * 2 + 1, 768)
        assert large(torch.zeros(1, 3, 224, 224)).shape == (1, CLASSES)
        with pytest.raises(AssertionError, match="Expected 32 but got 64"):
            small(torch.zeros(1, 3, 64, 64))


def test_gelunet_is_the_same_with_and_without_small_images():
    states = []
    for flag in (False, True):
        torch.manual_seed(3)
        states.append(models.create("gelunet", 10, small_images=flag).state_dict())
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    # Convolutions, BatchNorm's scales and shifts, the head.
    assert sum(p.numel() for p in models.create("gelunet", 10).parameters()) == (
        9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 129 * 10
    )


def test_a_file_of_gelunet_warms_it_up(tmp_path):
    source = models.create("gelunet", 6, in_channels=1)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    warm = models.create("gelunet", CLASSES, tmp_path / "w.pt", in_channels=1).state_dict()
    assert all(torch.equal(warm[k], v) for k, v in source.state_dict().items() if not k.startswith("fc."))
    assert warm["fc.weight"].shape == (CLASSES, 128)
