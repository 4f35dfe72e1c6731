"""What is T told, and is it true? Measured on `shapes`, whose objects are known, with weights that are placed by hand.

    python mlo_mae.py horizon --save   # ten minutes on a CPU core; --save also writes benchmarks/horizon.md

p is one number for what lies in objects and another for the rest; masks are random. An MAE is trained for some steps with
all alike, and then goes on in three ways: objects 1 and the rest 0.2, all alike, the rest 1 and objects 0.2. Some steps later
a linear classifier is fitted to the features of all training images, the mean of the patches' tokens, and its cross-entropy
on the validation images, L3, says which way was the better one, had one looked that far ahead.

Beside it stands what T is told instead: the exact derivative of L3 through as many level-1 steps along the weight of objects,
as a run asks for it by default (level 2 solved, on the mean token) and as it was asked for before (ten steps of the head, on
the CLS token).
"""

import argparse
import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm

import mlo_mae
from data import Splits
from experiments import features
from harness import UserError, cli
from harness.dense import IGNORED, Masked, load_dense
from harness.measure import machine, markdown, show_page
from harness.probe import lbfgs_probes
from harness.schedule import schedule
from harness.vectors import weight_decays
from mlo_mae import Config, Labelled, Level, Networks, Rates, Step

WEIGHTED = {"objects": (1.0, 0.2), "all alike": (1.0, 1.0), "background": (0.2, 1.0)}  # p of objects, and of the rest
LOOKS = {1: 32, 64: 1, 256: 0}  # steps ahead, and how many derivatives through as many steps are taken a seed
CONFIG = Config(masking_network="shared", mask_start=0.0)  # a T that reads images, which `ObjectWeights` takes the place of
QUESTIONS = {  # how levels 2 and 3 are asked
    "closed form, mean token": {"level2": "ridge", "pooling": "mean"},
    "ten head steps, CLS token": {"level2": "steps", "pooling": "cls"},
}
HEAD_LOOKS = 10  # T's looks before the ways part, which leave a head that has learned
NOTE = """\
L3: cross-entropy on validation images of a linear classifier fitted to the training images, mean over seeds;
differences ± standard deviation over seeds. Derivative: by the weight of an object's pixels less that of others, a step,
mean ± standard error over looks, and t, their ratio; below 0 where T is told to weigh objects more."""


class ObjectWeights(nn.Module):
    """T of the weights of objects and of the rest. What it knows of images is told it: {images: share of what they cover of
    each patch that is an object's, [B, N]}."""

    def __init__(self):
        super().__init__()
        self.weights, self.objects = nn.Parameter(torch.ones(2)), WeakTensorKeyDictionary()

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> p [B, N]
        share = self.objects[images]
        return share * self.weights[0] + (1 - share) * self.weights[1]


class Training(NamedTuple):
    """Level 1 at one point of a run, from where it can go on in several ways."""

    asked: dict[str, Networks]  # by each of QUESTIONS
    heads: dict[str, Level]  # their heads
    masked: Masked  # the training images, with their objects, which move along
    splits: Splits
    decay: Tensor  # weight decay of theta
    total: int  # level-1 steps of the whole run, which the learning rate follows
    number: int  # level-1 steps made
    theta: Level

    @property
    def net(self) -> Networks:
        """Of level 1, which is the same for every question."""
        return next(iter(self.asked.values()))


def begin(seed: int, number: int, total: int) -> Training:
    """The Training of a seed after `number` of `total` steps with all patches alike."""
    cfg, asked, heads = replace(CONFIG, seed=seed), {}, {}
    splits = mlo_mae.load_data(cfg, torch.device("cpu"))
    masked = load_dense(cfg.data, "masks", limit=cfg.images, val_fraction=cfg.val_fraction, seed=seed).train
    masking = ObjectWeights()
    for question, settings in QUESTIONS.items():
        net, (theta, phi, _) = mlo_mae.build(
            replace(cfg, **settings), splits.image_size, splits.channels, len(splits.class_names)
        )
        net.masking, asked[question], heads[question] = masking, net, mlo_mae.fresh_level(phi, "cpu")
    decay = weight_decays([net.encoder, net.decoder], cfg.weight_decay)
    start = Training(asked, heads, masked, splits, decay, total, 0, mlo_mae.fresh_level(theta, "cpu"))
    theta, _ = go_on(start, "all alike", number)
    for question, net in asked.items():
        for look in range(HEAD_LOOKS if net.cfg.level2 == "steps" else 0):  # a solved head does not depend on those before
            batches = labelled(start, question, look)
            _, head, _ = mlo_mae.upper_levels(net, theta.params[: net.encoder_size], heads[question], batches)
            heads[question] = mlo_mae.detached(head)
    return start._replace(number=number, theta=theta)


def go_on(training: Training, weighted: str, count: int, order: int = 0) -> tuple[Level, list[Step]]:
    """theta after `count` more steps, and those Steps; `order` changes images and masks."""
    net, cfg, theta, made = training.net, training.net.cfg, training.theta, []
    psi = torch.tensor(WEIGHTED[weighted])
    batches = training.masked.stream(cfg.batch_size, 1000 * order + cfg.seed, start=training.number)
    for number, (images, classes) in zip(range(training.number, training.number + count), batches):
        known = classes != IGNORED  # the others are beside the image
        pixels, patch = torch.stack([known, known & (classes > 0)]).float(), {"p": cfg.patch_size, "q": cfg.patch_size}
        covered, inside = reduce(pixels, "n b (h p) (w q) -> n b (h w)", "mean", **patch)  # class 0 is the background
        net.masking.objects[images] = inside / covered.clamp_min(1e-6)
        rates = Rates(cfg.lr * schedule(number, training.total, cfg.warmup * training.total), training.decay)
        theta, step, _, _ = mlo_mae.level1_step(net, theta, psi, images, rates, cfg.seed, order, number, covered=covered)
        made.append(step)
    return theta, made


def labelled(training: Training, question: str, look: int) -> Labelled:
    """Batches, dropout and rates of levels 2 and 3 for one look."""
    net, splits = training.asked[question], training.splits
    cfg, size, seed = net.cfg, net.cfg.labelled_batch_size, 1000 * look + net.cfg.seed
    batch2, batch3 = (next(iter(split.stream(size, seed))) for split in (splits.train, splits.val))
    return mlo_mae.labelled_of(cfg, batch2, batch3, Rates(cfg.head_lr, weight_decays([net.head], cfg.weight_decay)), look)


def fitted_loss3(training: Training) -> float:
    """L3 of a linear classifier fitted to the training split; its weight decay is the best of four."""
    net, splits, theta = training.net, training.splits, training.theta
    probes = lbfgs_probes(*features(net, theta.params, splits.train, "mean"), len(splits.class_names))
    inputs, labels = features(net, theta.params, splits.val, "mean")
    return min(F.cross_entropy(probe(inputs), labels).item() for probe in probes.values())


def derivatives(training: Training, steps_ahead: int, look: int) -> dict[str, float]:
    """By each question, the exact derivative of L3 by the weight of an object's pixels less that by the others', through
    `steps_ahead` steps (through one, over the latest batches, as in a run): below 0 where objects should weigh more."""
    known, batches = training.net.masking.objects, CONFIG.mask_batches if steps_ahead == 1 else steps_ahead
    theta, steps = go_on(training, "all alike", batches, order=1 + look)
    share, covered = torch.cat([known[step.images] for step in steps]), torch.cat([step.covered for step in steps])
    if steps_ahead == 1:
        steps = [mlo_mae.joined(steps)]
        known[steps[0].images] = share
    objects, others, found = (share * covered).mean(), ((1 - share) * covered).mean(), {}
    for question, net in training.asked.items():
        batches = labelled(training, question, 100 + look)
        psi = torch.tensor(WEIGHTED["all alike"])
        of_a, of_b = mlo_mae.exact(net, theta, psi, training.heads[question], batches, steps).hypergradient
        found[question] = ((of_a / objects - of_b / others) / steps_ahead).item()
    return found


Found = dict[int, tuple[dict[str, float], list[dict[str, float]]]]


def measure(seed: int, number: int, total: int) -> Found:
    """One seed's {steps ahead: ({weighting: fitted L3}, [{question: derivative}])}."""
    training, found = begin(seed, number, total), {}
    ways = dict.fromkeys(WEIGHTED, training)
    for steps_ahead, looks in tqdm(LOOKS.items(), desc=f"seed {seed}"):
        for way, there in ways.items():
            theta, _ = go_on(there, way, number + steps_ahead - there.number, order=1)
            ways[way] = there._replace(number=number + steps_ahead, theta=theta)
        losses = {way: fitted_loss3(there) for way, there in ways.items()}
        found[steps_ahead] = losses, [derivatives(training, steps_ahead, look) for look in range(looks)]
    return found


def table(runs: list[Found]) -> tuple[list[str], list[dict]]:
    """What `measure` found for each seed as markdown lines, and as rows for JSON."""
    titles = ["steps ahead", "L3, objects up", "all alike", "background up", "objects up - alike", "background up - alike"]
    titles += [f"derivative: {question}" for question in QUESTIONS]
    shown, rows = [], []
    for steps_ahead in LOOKS:
        losses = np.array([list(run[steps_ahead][0].values()) for run in runs])  # [seeds, 3]
        gaps = losses - losses[:, 1:2]
        columns = [f"{x.mean():.3f}" for x in losses.T]
        columns += [f"{x.mean():+.3f}" + f" ± {deviation(x):.3f}" * (len(x) > 1) for x in gaps[:, ::2].T]
        told = {name: np.array([look[name] for run in runs for look in run[steps_ahead][1]]) for name in QUESTIONS}
        columns += map(told_text, told.values())
        shown.append([str(steps_ahead), *columns])
        told = {name: looks.tolist() for name, looks in told.items()}
        rows.append({"steps_ahead": steps_ahead, "loss3": losses.tolist(), "derivatives": told})
    return markdown(titles, shown, left=0), rows


def told_text(looks: np.ndarray) -> str:
    """Mean, standard error and t of some derivatives; nothing of none."""
    if len(looks) == 0:
        return ""
    if len(looks) == 1:
        return f"{looks.mean():+.1e} (1 look)"
    error = deviation(looks) / len(looks) ** 0.5
    ratio = f", t {looks.mean() / error:+.1f}" if error else ""
    return f"{looks.mean():+.1e} ± {error:.0e}{ratio} ({len(looks)} looks)"


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
    show_page(["horizon", *argv], facts, lines, [NOTE], "horizon" if options.save else "")
    return {"command": "horizon", "machine": facts, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
