"""What the README shows in Python does what it says."""

import re
from pathlib import Path

import pytest
import torch

import mlo_mae
from harness.randomness import draw_dropout
from harness.vectors import weight_decays
from mlo_mae import Config, Labelled, Level, Rates

README = Path(mlo_mae.__file__).with_name("README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_ten_lines_of_exact_are_exact():
    """The README's `exact` against autograd, in float64, after a step from warm moments."""
    cfg = Config(patch_size=4, width=16, depth=2, heads=2, decoder_width=8, decoder_heads=2, mask_start=0.0)
    net, vectors = mlo_mae.build(cfg, 16, 3, 5)
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def level(vector):
        mu = 1e-2 * normal(len(vector))
        return Level(vector.double() + 0.2 * normal(len(vector)), mu, mu.square() * (1 + normal(len(vector)).square()), 7)

    theta, head, psi = map(level, vectors)
    decay = [weight_decays(modules, 0.05).double() for modules in mlo_mae.modules_of(net).values()]
    images = [normal(6, 3, 16, 16) for _ in range(3)]
    theta, step, _, _ = mlo_mae.level1_step(net, theta, psi.params, images[0], Rates(1e-2, decay[0]), 0)
    dropout = draw_dropout(cfg.dropout, (cfg.head_steps, 6, cfg.width), 0, 1).double()
    labels = torch.arange(6) % 5
    labelled = Labelled(images[1], labels, images[2], labels, dropout, Rates(1e-2, decay[1]))

    shown = vars(mlo_mae).copy()
    exec(next(block for block in BLOCKS if "def exact(" in block), shown)
    found = shown["exact"](net, theta, psi.params, head, labelled, step)
    judge = mlo_mae.unrolled(net, theta, psi.params, head, labelled, [step]).hypergradient
    assert judge.norm() > 1e-9 and (found - judge).norm() <= 1e-9 * judge.norm()


@pytest.mark.slow
def test_the_lines_in_python_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--images", "640", "--epochs", "4", "--level1-steps", "4", "--device", "cpu"]
    assert mlo_mae.main(["pretrain", *short]) == 0
    shown, lines = {}, next(block for block in BLOCKS if "mlo_mae.load" in block)
    exec(lines, shown)
    stated = dict(re.findall(r"^(\w+) = .*# (?:.*: )?(\[[\d, ]+\])", lines, re.MULTILINE))  # shapes, as comments say them
    assert stated.keys() == {"features", "p", "tokens"}
    for name, shape in stated.items():
        assert str(list(shown[name].shape)) == shape and shown[name].isfinite().all()
    assert shown["pixels"].shape == (8, 32, 32, 3) and shown["hidden"].shape == (8, 8, 8)
    judge = mlo_mae.unrolled(shown["net"], *shown["problem"]).hypergradient
    assert torch.allclose(shown["hypergradient"], judge, rtol=1e-3, atol=1e-4 * judge.abs().max())
