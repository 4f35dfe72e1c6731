"""The published code's way to the hypergradient: central differences, whose dropout it draws anew for each evaluation.

    python mlo_mae.py published                                             # a run, with the default run's sizes
    python mlo_mae.py published --preset cifar100-paper --data-dir DIR      # its other choices too; wants a GPU
    python mlo_mae.py published hypergradient                               # bench.py's table, with Betty where it is there

A run is one of mlo_mae.py's in all but `form`, what it takes for dL3/dpsi; probe, finetune and the other programs read it.
Betty (PyPI: betty-ml) is the engine under the published code. Where it can be imported, the table has a row of it.
"""

import argparse
import contextlib
import functools
import logging
import shlex
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import bench
import mlo_mae
from bench import Method, finite_difference
from harness import UserError, cli, measure
from harness.cli import flag
from harness.processes import world
from harness.randomness import REDRAWN, draw_dropout
from harness.run import add_run_flags, settings_of
from mlo_mae import CIFAR, Config, Labelled, Level, Networks, Result, Step

with contextlib.suppress(ImportError):
    import betty
    import betty.configs
    import betty.engine
    import betty.problems

# --------------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Published(Config):
    """A run whose hypergradient is the published code's."""

    preset: Literal["shapes", "cifar10", "cifar100", "cifar100-paper", "imagenet", "imagenet-large"] = flag(
        "shapes", "settings to start from; cifar100-paper: the published code's choices"
    )
    hypergradient: Literal["finite-difference"] = flag("finite-difference", "form of dL3/dpsi")
    redraw_dropout: bool = flag(True, "redraw dropout between the two evaluations, as the published code does")
    unroll: Literal["last"] = flag("last", "differentiate the last level-1 step")
    mask_wait: float = flag(0.0, "as in pretrain; the published method never waits", least=0, most=1)
    level2: Literal["steps"] = flag("steps", "the head: AdamW steps, which the published form differentiates")
    head_steps: int = flag(1, "head steps a mask update; the published form differentiates one", least=1, most=1)


PRESETS = mlo_mae.PRESETS | {
    "cifar100-paper": CIFAR | {"data": "cifar100", "masking_input": "embeddings", "update_jacobian": "identity"}
}


def check(cfg: Published) -> None:
    """Raise UserError for a configuration that cannot run, naming the flag to change."""
    mlo_mae.check(cfg)
    if world() * cfg.accumulate > 1:
        raise UserError("finite differences, as published, go with one process and --accumulate 1")
    if cfg.checkpoint_activations:
        raise UserError("finite differences, as published, go without --checkpoint-activations")


def form(net: Networks, theta: Level, psi: Tensor, head: Level, labelled: Labelled, steps: list[Step]) -> Result:
    """`bench.finite_difference` as a run of Published has it: a form for `mlo_mae.train`.

    The steps that the head has made number the draws of dropout: a mask update makes one."""
    cfg, redrawn = net.cfg, None
    if cfg.redraw_dropout:
        shape = (2, cfg.labelled_batch_size, cfg.width)
        redrawn = draw_dropout(cfg.dropout, shape, cfg.seed, REDRAWN, head.t).to(labelled.dropout)
    return finite_difference(net, theta, psi, head, labelled, steps, redrawn=redrawn)


def train(argv: list[str]) -> dict | None:
    """Run `published` with these flags; returns what its last line reports."""
    others = "published hypergradient --help: the table of forms, with Betty's"
    parser = cli.Parser(prog="mlo_mae.py published", description=__doc__.splitlines()[0], epilog=others)
    add_run_flags(parser, Published, "published")
    cfg, out, resume = settings_of(vars(parser.parse_args(argv)), Published, PRESETS, "published")
    check(cfg)
    return mlo_mae.reported_run(cfg, out, resume, hypergradient=form)


# ------------------------------------------------------------------------------------------------------- the table


def by_betty(net: Networks, theta: Level, psi: Tensor, head: Level, labelled: Labelled, steps: list[Step]) -> Result:
    """The hypergradient as Betty's engine computes it on our networks, losses, masks, dropout and AdamW steps; the engine
    is entered where the level-1 step has been made. Takes what the forms of mlo_mae.py do; of the Result, only the
    hypergradient is there.

    Betty puts -1 for dU/dg, takes central differences around the parameters after the steps, and follows the path from
    L3 through the head and the path past it one after the other, each with its own differences at level 1."""
    logging.getLogger("betty").disabled = True  # it reports on stdout
    head_before, step, split, found = head, steps[-1], net.encoder_size, []
    theta, phi, psi = (torch.nn.Parameter(x) for x in (theta.params.clone(), head.params.clone(), psi))  # T stays put

    def loss1(_):
        prob = mlo_mae.weights_of(net, psi, step)
        return mlo_mae.level1_loss(prob, step.mask, mlo_mae.patch_errors(net, theta[:split], theta[split:], step))

    def loss2(_):
        features = mlo_mae.encode(net, theta[:split], labelled.images2)
        return mlo_mae.head_loss(net, phi, features, labelled.labels2, labelled.dropout[0])

    def loss3(_):
        return mlo_mae.head_loss(net, phi, mlo_mae.encode(net, theta[:split], labelled.images3), labelled.labels3)

    def head_step():
        phi.data = mlo_mae.adamw(head_before, phi.grad, labelled.rates).params

    def level(name, params, loss, update):
        module = torch.nn.ParameterList([params])
        module.to = lambda _: module  # Betty would choose the device
        optimizer = torch.optim.SGD([params], lr=0)  # a stand-in: Betty rebuilds AdamW with arguments that torch now refuses
        made = betty.problems.ImplicitProblem(name, betty.configs.Config(retain_graph=True), module, optimizer)
        made.get_batch, made.training_step, made.custom_optimizer_step = tuple, loss, update
        return made

    pretrain, finetune = level("pretrain", theta, loss1, None), level("finetune", phi, loss2, head_step)
    mask = level("mask", psi, loss3, lambda: found.append(psi.grad))
    above, below = {pretrain: [finetune, mask], finetune: [mask]}, {mask: [pretrain]}
    betty.engine.Engine([pretrain, finetune, mask], betty.configs.EngineConfig(), {"l2u": above, "u2l": below})
    mask.ready[mask.children.index(pretrain)], finetune.ready[0] = True, True  # as Betty sets them after a level-1 step
    finetune.step_normal()  # and then it calls this, which calls T's
    return Result(found[0], None, None, None)


def compare(argv: list[str]) -> int:
    """Run `published hypergradient` with these flags: the exit status of `bench.py hypergradient`."""
    more, note = {}, ""
    if "betty.problems" in sys.modules:
        more["betty"] = Method("Betty's finite differences, dU/dg = -1", by_betty, solved=False)
        note = (
            f" Betty {betty.__version__} runs our networks, batches, masks and AdamW steps, with dropout held. Its own are "
            "dU/dg = -1, differences around the parameters after the steps, and a pass of level 1 for each of two paths. Its "
            "MiB include a copy of the parameters, which it overwrites."
        )
    work = functools.partial(bench.run_hypergradient, more=more, note=note)

    def parse() -> argparse.Namespace:
        parser = cli.Parser(prog="mlo_mae.py published hypergradient", description=work.func.__doc__)
        measure.add_flags(parser, "hypergradient", work)
        bench.add_hypergradient_flags(parser, more)
        return parser.parse_args(argv)

    command = shlex.join(["python", "mlo_mae.py", "published", "hypergradient", *argv])
    return measure.run("mlo_mae", command, parse)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 1 where the table finds `exact` wrong; 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["hypergradient"]:
        return compare(argv[1:])
    return cli.reported("mlo_mae", lambda: train(argv), cli.LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
