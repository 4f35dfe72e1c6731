"""How far must a hypergradient look? Measured on `shapes`, whose objects are known, with a T of two parameters.

    python mlo_mae.py horizon --save   # minutes on 2 CPU cores; --save also writes benchmarks/horizon.md

T gives every patch of an object the logit a, and every other patch b; masks are random. An MAE is trained for some steps
with a = b, and then goes on in three ways: objects weighted up (a > b), all alike, background weighted up (a < b). Some
steps later a linear classifier is fitted to the features of all training images, and its cross-entropy on the validation
images, L3, says which way was the better one, had one looked that far ahead. Beside it stands what T is told instead: the
exact derivative of L3 through as many level-1 steps, from labelled batches and head steps as in a run.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn
from tqdm import tqdm

import mlo_mae
from data import Splits
from experiments import features
from harness import UserError, cli
from harness.files import write_whole
from harness.measure import BENCHMARKS, machine
from harness.probe import lbfgs_probes
from harness.randomness import draw_dropout
from harness.schedule import schedule
from harness.vectors import call, weight_decays
from mlo_mae import Config, Labelled, Level, Networks, Rates, Step

WEIGHTED = {"objects": (2.0, -2.0), "all alike": (0.0, 0.0), "background": (-2.0, 2.0)}  # (a, b); sigmoid(2) = 0.88
LOOKS = {1: 16, 8: 4, 64: 2, 256: 1}  # steps ahead, and how many derivatives through as many steps are taken a seed
CONFIG = Config(masking="learned", mask_start=0.0, mask_noise=1e9)  # noise alone draws the masks
HEAD_LOOKS = 30  # T's looks before the ways part, which leave a head that has learned
TITLES = "steps ahead | L3, objects up | all alike | background up | objects up - alike | background up - alike"
NOTE = """\
L3: cross-entropy on validation images of a linear classifier fitted to the training images, mean over seeds;
differences ± standard deviation over seeds. Derivative: by the weight of an object's patch less by another's, a step,
mean ± standard error."""


class ObjectWeights(nn.Module):
    """T of the logits (a, b). The objects of `shapes` are coloured, and their background is grey."""

    def __init__(self, patch: int):
        super().__init__()
        self.patch, self.logits = patch, nn.Parameter(torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> p [B, N]
        coloured = (images.amax(1) - images.amin(1) > 0.6).float()  # [B, H, W]
        share = reduce(coloured, "b (h p) (w q) -> b (h w)", "mean", p=self.patch, q=self.patch)  # [B, N]
        return torch.where(share > 0.02, self.logits[0], self.logits[1]).sigmoid()


class Training(NamedTuple):
    """Level 1 at one point of a run, from where it can go on in several ways."""

    net: Networks
    splits: Splits
    decay: list[Tensor]  # weight decays of the three levels
    total: int  # level-1 steps of the whole run, which the learning rate follows
    number: int  # level-1 steps made
    theta: Level
    head: Level


def begin(seed: int, number: int, total: int) -> Training:
    """The Training of a seed after `number` of `total` steps with all patches alike."""
    cfg = replace(CONFIG, seed=seed)
    splits = mlo_mae.load_data(cfg, torch.device("cpu"))
    net, (theta, phi, _) = mlo_mae.build(cfg, splits.image_size, splits.channels, len(splits.class_names))
    net.masking = ObjectWeights(cfg.patch_size)
    decay = [weight_decays(modules, cfg.weight_decay) for modules in mlo_mae.modules_of(net).values()]
    start = Training(net, splits, decay, total, 0, *(mlo_mae.fresh_level(params, "cpu") for params in (theta, phi)))
    theta, _ = go_on(start, "all alike", number)
    head = start.head
    for look in range(HEAD_LOOKS):
        _, head, _ = mlo_mae.upper_levels(net, theta.params[: net.encoder_size], head, labelled(start, look))
        head = mlo_mae.detached(head)
    return start._replace(number=number, theta=theta, head=head)


def go_on(training: Training, weighted: str, count: int, order: int = 0) -> tuple[Level, list[Step]]:
    """theta after `count` more steps, and those Steps; `order` changes images and masks."""
    net, cfg, theta, made = training.net, training.net.cfg, training.theta, []
    psi = torch.tensor(WEIGHTED[weighted])
    batches = training.splits.train.stream(cfg.batch_size, 1000 * order + cfg.seed, start=training.number)
    for number, (images, _) in zip(range(training.number, training.number + count), batches):
        rates = Rates(cfg.lr * schedule(number, training.total, cfg.warmup * training.total), training.decay[0])
        theta, step, _, _ = mlo_mae.level1_step(net, theta, psi, images, rates, cfg.seed, order, number)
        made.append(step)
    return theta, made


def labelled(training: Training, look: int) -> Labelled:
    """Batches, dropout and rates of levels 2 and 3 for one look."""
    cfg, splits = training.net.cfg, training.splits
    size, seed = cfg.labelled_batch_size, 1000 * look + cfg.seed
    batch2, batch3 = (next(iter(split.stream(size, seed))) for split in (splits.train, splits.val))
    dropout = draw_dropout(cfg.dropout, (cfg.head_steps, size, cfg.width), cfg.seed, look)
    return Labelled(*batch2, *batch3, dropout, Rates(cfg.head_lr, training.decay[1]))


def fitted_loss3(training: Training, theta: Level) -> float:
    """L3 of a linear classifier fitted to the training split; its weight decay is the best of four."""
    net, splits = training.net, training.splits
    probes = lbfgs_probes(*features(net, theta.params, splits.train), len(splits.class_names))
    inputs, labels = features(net, theta.params, splits.val)
    return min(F.cross_entropy(probe(inputs), labels).item() for probe in probes.values())


def derivative(training: Training, steps_ahead: int, look: int) -> float:
    """The exact derivative of L3 by the weight of an object's patch less that by another patch's, through `steps_ahead`
    steps: below 0 where objects should weigh more."""
    net = training.net
    theta, steps = go_on(training, "all alike", steps_ahead, order=1 + look)
    batches = labelled(training, 100 + look)
    of_a, of_b = mlo_mae.exact(net, theta, torch.zeros(2), training.head, batches, steps).hypergradient
    objects = torch.cat([call(net.masking, torch.tensor([50.0, -50.0]), step.images) for step in steps]).mean()
    return ((of_a / objects - of_b / (1 - objects)) / steps_ahead).item()


def measure(seed: int, number: int, total: int) -> dict[int, tuple[dict[str, float], list[float]]]:
    """One seed's {steps ahead: ({weighting: fitted L3}, [derivatives])}."""
    training, found = begin(seed, number, total), {}
    for steps_ahead, looks in tqdm(LOOKS.items(), desc=f"seed {seed}"):
        losses = {way: fitted_loss3(training, go_on(training, way, steps_ahead, order=1)[0]) for way in WEIGHTED}
        found[steps_ahead] = losses, [derivative(training, steps_ahead, look) for look in range(looks)]
    return found


def table(runs: list[dict[int, tuple[dict[str, float], list[float]]]]) -> tuple[list[str], list[dict]]:
    """What `measure` found for each seed as markdown lines, and as rows for JSON."""
    lines = [f"| {TITLES} | exact derivative along objects |", "|--:|--:|--:|--:|--:|--:|--:|"]
    rows = []
    for steps_ahead in LOOKS:
        losses = np.array([list(run[steps_ahead][0].values()) for run in runs])  # [seeds, 3]
        looks = np.array([look for run in runs for look in run[steps_ahead][1]])
        gaps = losses - losses[:, 1:2]
        columns = [f"{x.mean():.3f}" for x in losses.T] + [f"{x.mean():+.3f} ± {deviation(x):.3f}" for x in gaps[:, ::2].T]
        error = deviation(looks) / len(looks) ** 0.5
        columns.append(f"{looks.mean():+.1e} ± {error:.0e} ({len(looks)} looks)")
        lines.append(f"| {steps_ahead} | {' | '.join(columns)} |")
        rows.append({"steps_ahead": steps_ahead, "loss3": losses.tolist(), "derivatives": looks.tolist()})
    return lines, rows


def deviation(values: np.ndarray) -> float:
    """Standard deviation; 0 of a single value."""
    return values.std(ddof=min(1, len(values) - 1))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = cli.Parser(prog="mlo_mae.py horizon", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    parser.add_argument("--after", type=int, default=500, help="level-1 steps before the ways part (default 500)")
    parser.add_argument("--of", type=int, default=1800, help="level-1 steps of the whole run (default 1800)")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/horizon.md")
    options = parser.parse_args(argv)
    if not 1 <= options.seeds <= 100 or not 0 < options.after < options.of:
        raise UserError("--seeds must be 1 to 100, and --after less than --of")
    return options


def run_command(argv: list[str]) -> dict:
    """Run `horizon` with these flags; prints the table, and returns what its last line reports."""
    options = parse(argv)
    lines, rows = table([measure(seed, options.after, options.of) for seed in range(options.seeds)])
    facts = machine(torch.device("cpu")) | {"seeds": options.seeds, "after": f"{options.after} of {options.of} steps"}
    heading = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    text = "\n".join([f"`python mlo_mae.py {shlex.join(['horizon', *argv])}`", "", heading, "", *lines, "", NOTE])
    print(text)
    if options.save:
        write_whole(BENCHMARKS / "horizon.md", (text + "\n").encode())
    return {"verb": "horizon", "machine": facts, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
