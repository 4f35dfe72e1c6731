"""The hypergradient on a toy. hypergradient.md explains each piece; docs/build.py makes this file of it."""

import torch
from torch.func import grad, jvp, vjp  # grad(f) is a function too: the derivative of f

torch.set_default_dtype(torch.float64)  # 16 digits, so that "the same" can mean the first 12

image = torch.tensor([1.0, 0.9, -0.6, 0.4])  # four patches, each of one number
mask = torch.tensor([0.0, 1.0, 1.0, 1.0])  # m: the first patch is visible, three are hidden (1)
x2, y2 = 1.2, 1.0  # an image to train the head on, of one patch, and its label
x3, y3 = 0.8, 1.0  # an image to try it on, and its label
penalty = 0.1


def masking_probability(psi):
    """p: how much T wants each patch to count. With psi above 0 it prefers bright patches."""
    return torch.sigmoid(psi * image)


def patch_errors(theta):
    """l: squared errors of the guess f e v, the same for all patches; v is the visible one."""
    e, f = theta
    return (f * e * image[0] - image) ** 2


def level1_loss(p, errors):
    """L1, the mean over hidden patches of their errors times their weights (2)."""
    return (mask * p * errors).sum() / mask.sum()


def solved_head(theta):
    """phi': the best head for the features that E makes (5)."""
    z2 = theta[0] * x2
    return z2 * y2 / (z2**2 + penalty)


def level3_loss(theta, phi):
    """L3, the error of E and head on the other labelled image (6)."""
    return (phi * theta[0] * x3 - y3) ** 2


lr, decay, b1, b2, eps = 0.1, 0.05, 0.9, 0.95, 1e-8
psi = torch.tensor(0.5)
theta, mu, nu = torch.tensor([0.5, 0.7]), torch.tensor([-0.05, -0.04]), torch.tensor([0.006, 0.004])
start = theta, mu, nu, 9  # as nine earlier steps may have left them


def gradient1(theta, psi):
    """g1 = dL1/dtheta."""
    p = masking_probability(psi)
    return grad(lambda moved: level1_loss(p, patch_errors(moved)))(theta)


def adamw(level, g):
    """One step (11): theta', mu', nu' and the number of steps made."""
    theta, mu, nu, t = level
    t = t + 1
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    mh, nh = mu / (1 - b1**t), nu / (1 - b2**t)
    return (1 - lr * decay) * theta - lr * mh / (nh.sqrt() + eps), mu, nu, t


def outer(psi, steps=1):
    """L3 as a function of psi alone: level 1 makes a step (or several), level 2 is solved, level 3 judges."""
    level = start
    for _ in range(steps):
        level = adamw(level, gradient1(level[0], psi))  # (3)
    return level3_loss(level[0], solved_head(level[0]))


def slope(f, x, along=1.0):
    """How fast f changes as x moves along a direction, by moving it a little either way."""
    return (f(x + 1e-5 * along) - f(x - 1e-5 * along)) / 2e-5


def compare(what, by_hand, autograd, moved):
    """Print a number (or several) three ways; stop where they are not the same."""
    for way, value in {"by hand": by_hand, "autograd": autograd, "moved": moved}.items():
        print(f"{what:<19} {way:<9}", *(f"{number + 0.0:10.6f}" for number in value.reshape(-1).tolist()))
        what = ""
    assert (by_hand - autograd).norm() <= 1e-12 * autograd.norm() + 1e-14, "the formula is wrong"
    assert (moved - autograd).norm() <= 1e-6 * autograd.norm() + 1e-9, "autograd was asked something else"


g1 = gradient1(theta, psi)
after = adamw(start, g1)[0]  # theta'
phi = solved_head(after)
print(f"theta' {after[0]:.6f} {after[1]:.6f}   phi' {phi:.6f}   L3 {outer(psi):.6f}")
print(f"dL3/dpsi: autograd {grad(outer)(psi):.6f}, moved {slope(outer, psi):.6f}")


def paths_to_level3(theta):
    """dL3/de along its two paths: through the feature of the tried image, and through the head."""
    z2, z3, phi = theta[0] * x2, theta[0] * x3, solved_head(theta)
    r = phi * z3 - y3
    dphi_dz2 = (y2 - 2 * z2 * phi) / (z2**2 + penalty)
    return 2 * r * phi * x3, 2 * r * z3 * dphi_dz2 * x2


def cotangent_of(theta):
    """a = dL3/dtheta', for e and f (7)."""
    direct, through_head = paths_to_level3(theta)
    return torch.stack([direct + through_head, torch.zeros(())])


def levels_2_and_3(theta):
    return level3_loss(theta, solved_head(theta))


a = cotangent_of(after)
moved = torch.stack([slope(levels_2_and_3, after, along) for along in torch.eye(2)])
compare("(7) a", a, grad(levels_2_and_3)(after), moved)
print("its two paths: direct {:.6f}, through the head {:.6f}".format(*paths_to_level3(after)))


def adamw_pullback(level, g, cotangent):
    """From (a, a_mu, a_nu), how L3 changes with theta', mu', nu', to the same of theta, mu, nu; and c, of g."""
    a, a_mu, a_nu = cotangent
    _, mu, nu, t = adamw(level, g)
    mh, root = mu / (1 - b1**t), (nu / (1 - b2**t)).sqrt()
    at_mu = a_mu - a * lr / ((1 - b1**t) * (root + eps))  # all that mu' does to L3
    at_nu = a_nu + a * lr * mh / (2 * (1 - b2**t) * root * (root + eps) ** 2)  # all that nu' does
    c = (1 - b1) * at_mu + 2 * (1 - b2) * g * at_nu  # (8), (12)
    return ((1 - lr * decay) * a, b1 * at_mu, b2 * at_nu), c


none = torch.zeros(2)
_, c = adamw_pullback(start, g1, (a, none, none))
_, pull = vjp(lambda g: adamw(start, g)[0], g1)  # autograd's way back through the step
moved = torch.stack([a @ slope(lambda g: adamw(start, g)[0], g1, along) for along in torch.eye(2)])
compare("(8) c", c, pull(a)[0], moved)


def directional_errors(theta, c):
    """How fast each patch's error changes as theta moves along c (9)."""
    e, f = theta
    return 2 * (f * e * image[0] - image) * image[0] * (f * c[0] + e * c[1])


d = directional_errors(theta, c)
compare("(9) d", d, jvp(patch_errors, (theta,), (c,))[1], slope(patch_errors, theta, c))
p = masking_probability(psi)
print(f"c . g1 = {c @ g1:.9f} = L1(p, d) = {level1_loss(p, d):.9f}")
assert abs(c @ g1 - level1_loss(p, d)) < 1e-15


def of_masking(psi, d):
    """dL3/dpsi = dL1(p(psi), d)/dpsi (10)."""
    p = masking_probability(psi)
    return (mask * p * (1 - p) * image * d).sum() / mask.sum()


def loss_of_d(psi):
    return level1_loss(masking_probability(psi), d)


compare("(10) dL3/dpsi", of_masking(psi, d), grad(loss_of_d)(psi), slope(loss_of_d, psi))
compare("the whole chain", of_masking(psi, d), grad(outer)(psi), slope(outer, psi))


def hessian_times(theta, psi, c):
    """H c: how fast the gradient of L1 changes as theta moves along c (13)."""
    (e, f), v = theta, image[0]
    w, r = mask * masking_probability(psi) / mask.sum(), f * e * v - image
    return 2 * v**2 * w.sum() * (f * c[0] + e * c[1]) * torch.stack([f, e]) + 2 * v * (w * r).sum() * c.flip(0)


def exact(psi, steps=1):
    """The hypergradient through the last steps, from the last to the first: (7), then (8) to (10) and (13) for each."""
    levels, gradients, total = [start], [], 0.0
    for _ in range(steps):
        gradients.append(gradient1(levels[-1][0], psi))
        levels.append(adamw(levels[-1], gradients[-1]))
    cotangent = cotangent_of(levels[-1][0]), none, none
    for level, g in zip(levels[-2::-1], gradients[::-1]):
        (a, a_mu, a_nu), c = adamw_pullback(level, g, cotangent)
        total = total + of_masking(psi, directional_errors(level[0], c))
        cotangent = a + hessian_times(level[0], psi, c), a_mu, a_nu
    return total


changes = jvp(lambda theta: gradient1(theta, psi), (theta,), (c,))[1]
compare("(13) H c", hessian_times(theta, psi, c), changes, slope(lambda theta: gradient1(theta, psi), theta, c))
for steps in (1, 2, 3):
    by_autograd = grad(lambda psi: outer(psi, steps))(psi)
    compare(f"through {steps} step(s)", exact(psi, steps), by_autograd, slope(lambda psi: outer(psi, steps), psi))


print("memory    psi      exact    dU/dg = -1")
usual = start
for memory, where in ((1.0, 0.5), (0.3, 0.5), (0.3, 3.0)):
    start, where = (theta, memory * mu, memory**2 * nu, 9), torch.tensor(where)
    stepped = adamw(start, gradient1(theta, where))[0]
    minus_one = of_masking(where, directional_errors(theta, -cotangent_of(stepped)))
    print(f"{memory:6.1f} {where:6.1f} {exact(where):10.6f} {minus_one:13.6f}")
    assert abs(exact(where) - grad(outer)(where)) <= 1e-12 * abs(grad(outer)(where)) + 1e-14
start = usual


print("moved by    error, 16 digits    error, bfloat16")
for width in (2.0, 1.0, 0.1, 0.01):
    ends = torch.stack([outer(psi + width), outer(psi - width)])
    found = [(high - low) / (2 * width) for high, low in (ends, ends.to(torch.bfloat16).to(ends.dtype))]
    print(f"{width:8.2f}", *(f"{abs(one / exact(psi) - 1):19.1e}" for one in found))
