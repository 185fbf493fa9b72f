import torch
from torch import nn

from fedsq_plugin import DualCopy, validate
from fedsq_plugin.models.mlp import MLP


def test_a_hidden_layer_is_linear_and_relu_and_the_head_is_linear():
    model = MLP(inputs=2, outputs=1, hidden=(2,))
    with torch.no_grad():
        model.features[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
        model.features[0].bias.copy_(torch.tensor([0.0, -1.0]))
        model.fc.weight.copy_(torch.tensor([[3.0, 5.0]]))
        model.fc.bias.fill_(0.5)
    # (1, 2): hidden (-1, 3) -> (0, 3); 15.5. (3, 0): hidden (3, -1) -> (3, 0); 9.5.
    assert model(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).tolist() == [[15.5], [9.5]]


def test_hidden_widths_are_as_given():
    layers = [m for m in MLP(5, 3, hidden=(7, 4)).modules() if isinstance(m, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(5, 7), (7, 4), (4, 3)]


def test_norm_stands_before_every_relu():
    kinds = [type(m).__name__ for m in MLP(5, 3, hidden=(7, 4), norm=True).features]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2


def test_sigmoid_gives_probabilities_of_the_same_scores():
    torch.manual_seed(0)
    scores = MLP(4, 1)
    torch.manual_seed(0)
    probabilities = MLP(4, 1, sigmoid=True)
    x = torch.randn(6, 4)
    assert torch.equal(probabilities(x), torch.sigmoid(scores(x)))


def test_it_has_a_gate_for_every_hidden_unit_with_and_without_the_sigmoid():
    x = torch.randn(6, 4)
    for sigmoid in (False, True):
        model = MLP(4, 1, sigmoid=sigmoid).eval()
        assert validate(model, (x,)) == []
        assert torch.equal(DualCopy(model).eval()(x), model(x))
