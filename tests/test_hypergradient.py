"""The forms of the hypergradient against each other, in float64, on real level-1 and head steps."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import TINY, error_of_form, hypergradient_problem, relative_error

import kernels
import mlo_mae
from data import Batch
from harness.vectors import inverse_fan_in, unflatten, weight_decays
from mlo_mae import Level, Rates, adamw, adamw_pullback, build


@pytest.mark.parametrize("jacobian", ["adamw", "identity"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("head_steps", [1, 3])
@pytest.mark.parametrize("masking_network", ["shared", "mlp"])
@pytest.mark.parametrize("masking_input", ["pixels", "embeddings"])
@pytest.mark.parametrize("head_norm", ["layer", "batch"])
def test_exact_equals_unrolled_over_the_last_step(jacobian, warm, head_steps, masking_network, masking_input, head_norm):
    settings = {"masking_network": masking_network, "masking_input": masking_input, "head_norm": head_norm}
    assert error_of_form(mlo_mae.exact, warm=warm, update_jacobian=jacobian, head_steps=head_steps, **settings) < 1e-9


@pytest.mark.parametrize("jacobian", ["adamw", "identity"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("masking_network", ["shared", "mlp"])
@pytest.mark.parametrize("masking_input", ["pixels", "embeddings"])
def test_exact_equals_unrolled_over_several_steps(jacobian, warm, count, masking_network, masking_input):
    settings = {"masking_network": masking_network, "masking_input": masking_input}
    assert error_of_form(mlo_mae.exact, warm=warm, update_jacobian=jacobian, count=count, **settings) < 1e-9


def test_several_steps_differ_from_the_last_alone():
    net, (theta, psi, head, labelled, steps) = hypergradient_problem(count=3)
    full = mlo_mae.exact(net, theta, psi, head, labelled, steps).hypergradient
    last = mlo_mae.exact(net, theta, psi, head, labelled, steps[-1:]).hypergradient
    assert relative_error(last, full) > 1e-2


def test_first_order_is_exact_less_the_path_through_the_head():
    net, (theta, psi, head, labelled, steps) = hypergradient_problem()
    exact = mlo_mae.exact(net, theta, psi, head, labelled, steps)
    first = mlo_mae.first_order(net, theta, psi, head, labelled, steps)
    assert torch.equal(first.head.params, exact.head.params)
    assert relative_error(first.hypergradient, exact.hypergradient) > 1e-2  # so the agreements above do test that path
    # A head that starts where level 2 ends and stays there leaves the direct path alone.
    still = labelled._replace(rates=labelled.rates._replace(lr=0.0))
    direct = mlo_mae.exact(net, theta, psi, exact.head, still, steps).hypergradient
    assert relative_error(first.hypergradient, direct) < 1e-12


def test_hypergradient_predicts_the_change_of_level_3():
    """No autograd of ours in this one: move psi, make all the steps again, and read L3."""
    net, (theta, psi, head, labelled, steps) = hypergradient_problem(count=1)
    gradient = mlo_mae.exact(net, theta, psi, head, labelled, steps).hypergradient
    direction = gradient / gradient.norm()

    def level3(moved):
        step = steps[0]
        split = net.encoder_size
        prob = mlo_mae.masking_probability(net, moved, step.images, step.theta.params[:split])
        params = step.theta.params.clone().requires_grad_()
        errors = mlo_mae.patch_errors(net, params[:split], params[split:], step)
        (g,) = torch.autograd.grad(mlo_mae.level1_loss(prob, step.mask, errors), params)
        after = adamw(step.theta, g, step.rates).params.detach()
        return mlo_mae.upper_levels(net, after[:split], head, labelled)[0]

    width = 1e-4
    measured = (level3(psi + width * direction) - level3(psi - width * direction)) / (2 * width)
    assert measured.item() == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_levels_2_and_3_by_modules_and_torchs_adamw():
    """phi', L2 and L3 as PyTorch's own modules and optimiser make them; the forms above share `upper_levels`."""
    net, (theta, psi, head, labelled, steps) = hypergradient_problem(warm=False, head_steps=3)
    encoder = dict(unflatten(net.encoder, theta.params[: net.encoder_size]))
    features2, features3 = (
        torch.func.functional_call(net.encoder, encoder, (images,))[:, 0].detach()
        for images in (labelled.images2, labelled.images3)
    )
    norm, fc = torch.nn.LayerNorm(TINY.width).double(), torch.nn.Linear(TINY.width, 5).double()
    named = unflatten(net.head, head.params)
    norm.load_state_dict({"weight": named["norm.weight"], "bias": named["norm.bias"]})
    fc.load_state_dict({"weight": named["fc.weight"], "bias": named["fc.bias"]})
    groups = [
        {"params": [fc.weight], "weight_decay": labelled.rates.decay.max().item()},
        {"params": [*norm.parameters(), fc.bias], "weight_decay": 0.0},
    ]
    optimizer, losses = torch.optim.AdamW(groups, lr=3e-2, betas=(0.9, 0.95), eps=1e-8), []
    for dropout in labelled.dropout:
        losses.append(torch.nn.functional.cross_entropy(fc(norm(features2) * dropout), labelled.labels2))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    found = mlo_mae.exact(net, theta, psi, head, labelled, steps)
    expected = torch.cat([p.detach().flatten() for p in (norm.weight, norm.bias, fc.weight, fc.bias)])
    assert relative_error(found.head.params, expected) < 1e-12 and found.head.t == 3
    assert found.level2_loss.item() == pytest.approx(losses[0].item(), rel=1e-12)
    loss3 = torch.nn.functional.cross_entropy(fc(norm(features3)), labelled.labels3)
    assert found.level3_loss.item() == pytest.approx(loss3.item(), rel=1e-12)


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_adamw_makes_the_steps_of_torch(warm):
    torch.manual_seed(0)
    params = torch.randn(50, dtype=torch.float64)
    ours = Level(params, torch.zeros_like(params), torch.zeros_like(params), 0)
    theirs = torch.nn.Parameter(params.clone())
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5 if warm else 1):
        theirs.grad = torch.randn_like(params)
        theirs.grad[:3] = 0  # second moment 0: the step must be 0, not NaN
        ours = adamw(ours, theirs.grad, Rates(3e-3, torch.full_like(params, 0.1)))
        optimizer.step()
    assert torch.allclose(ours.params, theirs.detach(), rtol=1e-12, atol=0)


def test_adamw_pullback_is_the_published_diagonal():
    """Equation (12) of the docstring, written out, for a warm state with a parameter that never had a gradient."""
    torch.manual_seed(1)
    n, lr = 40, 2e-3
    (g, mu, params), nu = torch.randn(3, n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    g[0] = mu[0] = nu[0] = 0
    level = Level(params, mu, nu, 9)
    b1, b2, eps, t = mlo_mae.BETA1, mlo_mae.BETA2, mlo_mae.EPS, 10
    mh = (b1 * mu + (1 - b1) * g) / (1 - b1**t)
    nh = (b2 * nu + (1 - b2) * g**2) / (1 - b2**t)
    root = nh.sqrt()
    second = mh * (1 - b2) * g / ((1 - b2**t) * root * (root + eps) ** 2)
    second[0] = 0
    diagonal = -lr * ((1 - b1) / (1 - b1**t) / (root + eps) - second)
    cotangent = torch.randn(n, dtype=torch.float64)
    zero = torch.zeros_like(cotangent)
    rates = Rates(lr, torch.zeros(n, dtype=torch.float64))
    back, c = adamw_pullback(level, g, rates, "adamw", (cotangent, zero, zero))
    assert torch.allclose(c[1:], (diagonal * cotangent)[1:], rtol=1e-10, atol=0)
    assert torch.isfinite(c).all() and torch.isfinite(torch.stack(back)).all()
    assert torch.equal(adamw_pullback(level, g, rates, "identity", (cotangent, zero, zero))[1], -cotangent)


def test_level1_loss_is_linear_in_the_errors():
    torch.manual_seed(2)
    prob, first, second = (torch.rand(4, 9, dtype=torch.float64) for _ in range(3))
    mask = (prob > 0.4).double()
    together = mlo_mae.level1_loss(prob, mask, 2 * first - 3 * second)
    apart = 2 * mlo_mae.level1_loss(prob, mask, first) - 3 * mlo_mae.level1_loss(prob, mask, second)
    assert float(together) == pytest.approx(float(apart), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("precision, iterations", [("fp32", 2), ("bf16", 1)])
def test_kernels_forced_on_give_the_same_run(precision, iterations, bfloat16_as_on_a_chip):
    """Outer iterations through the Triton kernels (interpreted without a GPU) and through the references."""
    if kernels.backend.triton is None:
        pytest.skip("triton is not installed")
    cfg = dataclasses.replace(TINY, patch_size=8, depth=1, batch_size=6, labelled_batch_size=4, dropout=0.1, warmup=0.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    labels, sizes = torch.arange(40, device=device) % 5, (cfg.batch_size, *2 * [cfg.labelled_batch_size])

    def run(backend, precision):
        net, params = build(dataclasses.replace(cfg, precision=precision), 16, 3, 5)
        state, rows = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, device) for vector in params)), []
        batches = [iter([Batch(images[i : i + size], labels[i : i + size]) for i in range(0, 30, size)]) for size in sizes]
        decay = [weight_decays(modules, cfg.weight_decay).to(device) for modules in mlo_mae.modules_of(net).values()]
        rate = inverse_fan_in(net.masking).to(device)
        with kernels.use(backend):
            for _ in range(iterations):
                state, losses = mlo_mae.outer_iteration(net, state, batches, 2, decay, rate)
                rows.append(torch.stack(list(losses.values())))
        return torch.stack(rows), state

    (ours, state), (exact, judge) = run("triton", precision), run("reference", "fp32")

    def errors(state):  # of the moments, which hold the gradients: a weight whose gradient is rounding may step either way
        return np.array([relative_error(found.mu, level.mu) for found, level in zip(state[1:], judge[1:])])

    if precision == "fp32":
        assert torch.allclose(ours, exact, rtol=1e-3)  # losses, and the norm of the hypergradient
        assert (errors(state) < 1e-3).all(), errors(state)
    else:
        theirs = errors(run("reference", precision)[1])
        assert (errors(state) < 1.5 * theirs).all(), (errors(state), theirs)
