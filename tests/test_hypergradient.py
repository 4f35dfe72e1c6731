"""The three forms of the hypergradient against each other, in float64, on real level-1 and head steps."""

import dataclasses

import numpy as np
import pytest
import torch

import kernels
import mlo_mae
from mlo_mae import Config, Labelled, Level, Rates, adamw, adamw_pullback, build, decay_of, level1_step

TINY_RUN = Config(patch_size=4, width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2,
                  masking_network="shared", masking_width=12, mask_start=0.0, head_norm="layer", dropout=0.5, batch_size=6,
                  level1_steps=2, head_steps=1)  # fmt: skip
SIZE, CHANNELS, CLASSES = 16, 3, 5


def problem(warm=True, count=1, seed=0, **settings):
    """(net, arguments of a hypergradient function) of a tiny run: `count` level-1 steps were really made."""
    cfg = dataclasses.replace(TINY_RUN, **settings)
    net, params = build(cfg, SIZE, CHANNELS, CLASSES)
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def level(vector, t):
        # Moments as training leaves them: a mean of past gradients, and their mean square at least as large.
        m = 1e-2 * normal(len(vector)) if warm else torch.zeros(len(vector), dtype=torch.float64)
        v = m.square() * (1 + normal(len(vector)).square()) if warm else torch.zeros_like(m)
        moved = vector.double() + 0.2 * normal(len(vector))  # biases and CLS as after training: not zero, not tiny
        return Level(moved, m, v, t if warm else 0)

    theta, head, psi = (level(vector, t) for vector, t in zip(params, (7, 4, 3)))
    decay = [decay_of(cfg, net.encoder, net.decoder).double(), decay_of(cfg, net.head).double()]
    steps = []
    for number in range(count):
        images = normal(cfg.batch_size, CHANNELS, SIZE, SIZE)
        theta, step, _, _ = level1_step(net, theta, psi.params, images, Rates(1e-2, decay[0]), 0, number)
        steps.append(step)
    shape = (cfg.head_steps, cfg.batch_size, cfg.width)
    given = Labelled(
        normal(cfg.batch_size, CHANNELS, SIZE, SIZE), torch.arange(cfg.batch_size) % CLASSES,
        normal(cfg.batch_size, CHANNELS, SIZE, SIZE), torch.arange(cfg.batch_size) % CLASSES,
        mlo_mae.draw_dropout(cfg.dropout, shape, seed, 1).double(),
        mlo_mae.draw_dropout(cfg.dropout, (2, *shape[1:]), seed, 2).double(), Rates(3e-2, decay[1]),
    )  # fmt: skip
    return net, (theta, psi.params, head, given, steps)


def relative_error(found, judge):
    return float((found - judge).norm() / judge.norm())


def errors_of(form, **settings):
    net, arguments = problem(**settings)
    found, judge = form(net, *arguments), mlo_mae.unrolled(net, *arguments)
    assert judge.hypergradient.norm() > 1e-9  # a zero would agree with anything
    assert all(piece.any() for piece in mlo_mae.unflatten(net.masking, judge.hypergradient).values())  # in any layer of T
    assert relative_error(found.head.params, judge.head.params) < 1e-13
    assert relative_error(found.level3_loss, judge.level3_loss) < 1e-13
    return relative_error(found.hypergradient, judge.hypergradient)


@pytest.mark.parametrize("jacobian", ["adamw", "identity"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("head_steps", [1, 3])
@pytest.mark.parametrize("masking_network", ["shared", "mlp"])
@pytest.mark.parametrize("masking_input", ["pixels", "embeddings"])
@pytest.mark.parametrize("head_norm", ["layer", "batch"])
def test_exact_equals_unrolled_over_the_last_step(jacobian, warm, head_steps, masking_network, masking_input, head_norm):
    error = errors_of(mlo_mae.exact, warm=warm, update_jacobian=jacobian, head_steps=head_steps,
                      masking_network=masking_network, masking_input=masking_input, head_norm=head_norm)  # fmt: skip
    assert error < 1e-9


@pytest.mark.parametrize("jacobian", ["adamw", "identity"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("masking_network", ["shared", "mlp"])
@pytest.mark.parametrize("masking_input", ["pixels", "embeddings"])
def test_exact_equals_unrolled_over_several_steps(jacobian, warm, count, masking_network, masking_input):
    error = errors_of(mlo_mae.exact, warm=warm, update_jacobian=jacobian, count=count, masking_network=masking_network,
                      masking_input=masking_input)  # fmt: skip
    assert error < 1e-9


@pytest.mark.parametrize("jacobian", ["adamw", "identity"])
def test_finite_differences_agree_while_dropout_is_held(jacobian):
    settings = dict(hypergradient="finite-difference", update_jacobian=jacobian)
    assert errors_of(mlo_mae.finite_difference, **settings) < 1e-3


@pytest.mark.parametrize("jacobian", ["adamw", "identity"])
def test_finite_differences_are_noise_when_dropout_is_redrawn(jacobian):
    settings = dict(hypergradient="finite-difference", update_jacobian=jacobian, redraw_dropout=True)
    assert errors_of(mlo_mae.finite_difference, **settings) > 0.3


def test_several_steps_differ_from_the_last_alone():
    net, (theta, psi, head, given, steps) = problem(count=3)
    full = mlo_mae.exact(net, theta, psi, head, given, steps).hypergradient
    last = mlo_mae.exact(net, theta, psi, head, given, steps[-1:]).hypergradient
    assert relative_error(last, full) > 1e-2


def test_first_order_is_exact_less_the_path_through_the_head():
    net, (theta, psi, head, given, steps) = problem()
    exact = mlo_mae.exact(net, theta, psi, head, given, steps)
    first = mlo_mae.first_order(net, theta, psi, head, given, steps)
    assert torch.equal(first.head.params, exact.head.params)
    assert relative_error(first.hypergradient, exact.hypergradient) > 1e-2  # so the agreements above do test that path
    # A head that starts where level 2 ends and stays there leaves the direct path alone.
    still = given._replace(rates=given.rates._replace(lr=0.0))
    direct = mlo_mae.exact(net, theta, psi, exact.head, still, steps).hypergradient
    assert relative_error(first.hypergradient, direct) < 1e-12


def test_hypergradient_predicts_the_change_of_level_3():
    """No autograd of ours in this one: move psi, make all the steps again, and read L3."""
    net, (theta, psi, head, given, steps) = problem(count=1)
    gradient = mlo_mae.exact(net, theta, psi, head, given, steps).hypergradient
    direction = gradient / gradient.norm()

    def level3(moved):
        step = steps[0]
        split = net.encoder_size
        prob = mlo_mae.masking_probability(net, moved, step.images, step.theta.params[:split])
        params = step.theta.params.clone().requires_grad_()
        errors = mlo_mae.patch_errors(net, params[:split], params[split:], step)
        (g,) = torch.autograd.grad(mlo_mae.level1_loss(prob, step.mask, errors), params)
        after = adamw(step.theta, g, step.rates).params.detach()
        return mlo_mae.upper_levels(net, after[:split], head, given)[0]

    width = 1e-4
    measured = (level3(psi + width * direction) - level3(psi - width * direction)) / (2 * width)
    assert measured.item() == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_levels_2_and_3_by_modules_and_torchs_adamw():
    """phi', L2 and L3 as PyTorch's own modules and optimiser make them; the forms above share `upper_levels`."""
    net, (theta, psi, head, given, steps) = problem(warm=False, head_steps=3)
    encoder = dict(mlo_mae.unflatten(net.encoder, theta.params[: net.encoder_size]))
    features2, features3 = (
        torch.func.functional_call(net.encoder, encoder, (images,))[:, 0].detach() for images in (given.images2, given.images3)
    )
    norm, fc = torch.nn.LayerNorm(TINY_RUN.width).double(), torch.nn.Linear(TINY_RUN.width, CLASSES).double()
    named = mlo_mae.unflatten(net.head, head.params)
    norm.load_state_dict({"weight": named["norm.weight"], "bias": named["norm.bias"]})
    fc.load_state_dict({"weight": named["fc.weight"], "bias": named["fc.bias"]})
    groups = [{"params": [fc.weight], "weight_decay": given.rates.decay.max().item()},
              {"params": [*norm.parameters(), fc.bias], "weight_decay": 0.0}]  # fmt: skip
    optimizer, losses = torch.optim.AdamW(groups, lr=3e-2, betas=(0.9, 0.95), eps=1e-8), []
    for dropout in given.dropout:
        losses.append(torch.nn.functional.cross_entropy(fc(norm(features2) * dropout), given.labels2))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    found = mlo_mae.exact(net, theta, psi, head, given, steps)
    expected = torch.cat([p.detach().flatten() for p in (norm.weight, norm.bias, fc.weight, fc.bias)])
    assert relative_error(found.head.params, expected) < 1e-12 and found.head.t == 3
    assert found.level2_loss.item() == pytest.approx(losses[0].item(), rel=1e-12)
    loss3 = torch.nn.functional.cross_entropy(fc(norm(features3)), given.labels3)
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
    g, m, v = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    g[0] = m[0] = v[0] = 0
    level = Level(torch.randn(n, dtype=torch.float64), m, v, 9)
    b1, b2, eps, t = mlo_mae.BETA1, mlo_mae.BETA2, mlo_mae.EPS, 10
    mh = (b1 * m + (1 - b1) * g) / (1 - b1**t)
    vh = (b2 * v + (1 - b2) * g**2) / (1 - b2**t)
    root = vh.sqrt()
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


@pytest.mark.parametrize("precision, iterations", [("fp32", 2), ("bf16", 1)])
def test_kernels_forced_on_give_the_same_run(precision, iterations, bfloat16_as_on_a_chip):
    """Outer iterations through the Triton kernels (interpreted without a GPU) and through the references."""
    if kernels.backend.triton is None:
        pytest.skip("triton is not installed")
    cfg = dataclasses.replace(TINY_RUN, patch_size=8, depth=1, labelled_batch_size=4, dropout=0.1, warmup=0.0)
    images = torch.randn(40, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(backend, precision):
        net, params = build(dataclasses.replace(cfg, precision=precision), SIZE, CHANNELS, CLASSES)
        state = mlo_mae.State(0, *(mlo_mae.fresh_level(vector, device) for vector in params))
        labels = torch.arange(40, device=device) % CLASSES
        batches = [iter([mlo_mae.data.Batch(images[i : i + size].to(device), labels[i : i + size]) for i in range(0, 30, size)])
                   for size in (cfg.batch_size, cfg.labelled_batch_size, cfg.labelled_batch_size)]  # fmt: skip
        decay = mlo_mae.level_decays(net, device)
        rate, rows = mlo_mae.inverse_fan_in(net.masking).to(device), []
        with kernels.use(backend):
            for _ in range(iterations):
                state, losses = mlo_mae.outer_iteration(net, state, batches, 2, decay, rate)
                rows.append(torch.stack(list(losses.values())))
        return torch.stack(rows), state

    (ours, state), (exact, judge) = run("triton", precision), run("reference", "fp32")

    def errors(state):  # of the moments, which hold the gradients: a weight whose gradient is rounding may step either way
        return np.array([relative_error(getattr(state, name).m, getattr(judge, name).m) for name in ("theta", "head", "psi")])

    if precision == "fp32":
        assert torch.allclose(ours, exact, rtol=1e-3)  # losses, and the norm of the hypergradient
        assert (errors(state) < 1e-3).all(), errors(state)
    else:
        theirs = errors(run("reference", precision)[1])
        assert (errors(state) < 1.5 * theirs).all(), (errors(state), theirs)
