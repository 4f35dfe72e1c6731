"""Parameters as one vector, and back."""

import pytest
import torch
from torch import nn

from harness import UserError
from harness.vectors import call, flatten, inverse_fan_in, named, size_of, unflatten, weight_decays
from mlo_mae import Config, build, modules_of


def two_modules():
    """A convolution, norm and embedding table; and a linear layer: 3x2x2x2 + 3 + 3 + 3 + 4x3 and 2x5 + 2 parameters."""
    first = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 2), "norm": nn.LayerNorm(3), "table": nn.Embedding(4, 3)})
    return [first, nn.ModuleDict({"fc": nn.Linear(5, 2)})]


def test_a_vector_is_cut_in_the_order_of_the_parameters():
    modules = two_modules()
    assert [size_of(module) for module in modules] == [24 + 3 + 3 + 3 + 12, 12]
    vector = torch.arange(57.0)
    pieces = named(modules, vector)
    expected = [(name, p.shape) for module in modules for name, p in module.named_parameters()]
    assert [(name, piece.shape) for name, piece in pieces.items()] == expected
    assert torch.equal(torch.cat([piece.flatten() for piece in pieces.values()]), vector)
    assert all(piece.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr() for piece in pieces.values())
    assert torch.equal(flatten(modules, pieces), vector)
    assert torch.equal(flatten(modules, dict(reversed(pieces.items()))), vector)  # names count, not their order
    assert unflatten(modules[1], vector[45:])["fc.bias"].tolist() == [55, 56]


def test_a_call_takes_its_parameters_from_the_vector_and_has_derivatives_in_it():
    module, x = nn.Linear(3, 2).to("meta"), torch.randn(4, 3, dtype=torch.float64)
    params = torch.randn(8, dtype=torch.float64, requires_grad=True)
    expected = x @ params[:6].view(2, 3).T + params[6:]
    assert torch.allclose(call(module, params, x), expected)
    found, wanted = (
        torch.autograd.grad(out.pow(3).sum(), params, create_graph=True)[0] for out in (call(module, params, x), expected)
    )
    assert torch.allclose(found, wanted)
    second = [torch.autograd.grad(gradient.square().sum(), params)[0] for gradient in (found, wanted)]
    assert torch.allclose(*second) and second[0].any()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"fc.weight": torch.zeros(2, 4)}, ["fc.weight", "(2, 4)", "(2, 5)"]),
        ({"fc.bias": None}, ["fc.bias", "missing"]),
        ({"fc.more": torch.zeros(2)}, ["fc.more", "expected nothing"]),
        ({"fc.bias": torch.zeros(2).double()}, ["ordinary"]),
        ({"fc.bias": torch.zeros(2, device="meta")}, ["ordinary"]),
        ({"fc.weight": torch.zeros(2, 5).to_sparse()}, ["ordinary"]),
        ({"fc.bias": [0.0, 0.0]}, ["ordinary"]),
        ({"fc.bias": torch.tensor([0.0, torch.nan])}, ["not finite"]),
        ({"fc.bias": torch.tensor([0.0, torch.inf])}, ["not finite"]),
    ],
)
def test_tensors_that_are_not_the_modules_are_refused(changes, words):
    modules = two_modules()
    tensors = named(modules, torch.zeros(57)) | changes
    with pytest.raises(UserError) as caught:
        flatten(modules, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("tensors", [None, [], 3, "weights"])
def test_what_is_no_dict_of_tensors_is_refused(tensors):
    with pytest.raises(UserError, match="ordinary"):
        flatten(two_modules(), tensors)


@pytest.mark.parametrize("level2, network", [("ridge", "tokens"), ("steps", "shared"), ("steps", "mlp")])
def test_no_decay_on_biases_norms_tokens_and_positions(level2, network):
    net, _ = build(Config(weight_decay=0.3, level2=level2, masking_network=network), 32, 3, 8)
    for part, modules in modules_of(net).items():
        decay = named(modules, weight_decays(modules, 0.3))
        for name, value in decay.items():
            decayed = name.endswith("weight") and "norm" not in name  # tokens and positions have other names
            assert torch.equal(value, torch.full_like(value, 0.3 if decayed else 0.0)), name
        assert any(value.any() for value in decay.values()) == ((part, level2) != ("head", "ridge"))  # moments do not decay


def test_fan_in_is_what_a_unit_sums():
    scales = unflatten(module := two_modules()[0], inverse_fan_in(module))
    assert scales["conv.weight"].unique().tolist() == [1 / 8] and scales["conv.bias"].unique().tolist() == [1]
    assert scales["table.weight"].unique().tolist() == pytest.approx([1 / 3])
