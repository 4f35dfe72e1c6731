"""The presets side by side; and what a run is going to be, which every run says before it begins.

python mlo_mae.py presets
python mlo_mae.py pretrain --preset cifar100 --data-dir DIR --dry-run    # says it, and stops
"""

import dataclasses
import sys
from pathlib import Path

from torch import Tensor

import mlo_mae
from data import Images, Splits
from experiments import trial_batch
from harness import cli
from harness.measure import seconds, table
from harness.processes import world
from harness.vectors import size_of
from mlo_mae import Config, Networks, Rates, State

MANY = 1024  # patches of an image, from which on attention is most of the work
SLOW = 3.0  # seconds of a step, from which on a trial of a look would be long to wait for


def side_by_side() -> list[list[str]]:
    """Each field of Config that a preset sets: its flag, and its value in all presets."""
    rows = [["flag", *mlo_mae.PRESETS]]
    for field in dataclasses.fields(Config):
        if any(field.name in preset for preset in mlo_mae.PRESETS.values()):
            values = [preset.get(field.name, field.default) for preset in mlo_mae.PRESETS.values()]
            rows.append([cli.flag_name(field.name), *map(str, values)])
    return rows


def announce(out: Path, net: Networks, state: State, splits: Splits, total: int, decay: list[Tensor]) -> None:
    """Say what a run is going to be; as `mlo_mae.train` calls it. Raises DryRun where that is all that is asked for."""
    cfg, device, (start, end) = net.cfg, state.theta.params.device, mlo_mae.window(net.cfg, total, state.waited)
    # by its fields, since a program that is run has a Config of its own
    plain = len(dataclasses.fields(cfg)) == len(dataclasses.fields(Config))
    encoder, decoder, masking = (f"{size_of(module):,}" for module in (net.encoder, net.decoder, net.masking))
    model = f"encoder of {encoder} weights (width {cfg.width}, depth {cfg.depth}), decoder of {decoder}"
    patches = f"{net.patches - net.visible} of {net.patches} patches ({cfg.patch_size} x {cfg.patch_size} pixels) hidden"
    if net.patches > MANY:
        patches += f" (many: a --patch-size of {4 * cfg.patch_size} would make {net.patches // 16})"
    method = f"{total} x {cfg.level1_steps} steps of {cfg.batch_size} images, {patches}"
    if mlo_mae.is_given(cfg):
        method += f", weighed by the T of {cfg.masking_from}"
    elif cfg.masking == "learned":
        model += f", T ({cfg.masking_network}) of {masking}"
        later = ", or later if it has to wait" if cfg.mask_wait and cfg.mask_until < 1 else ""
        method += f"; T learns from mask update {start + 1} to {end}{later}, by dL3/dT {cfg.hypergradient}"
    else:
        method += f"; {'MAE: all patches count alike' if plain else type(cfg).__doc__.splitlines()[0]}"
    machine = f"{cli.described(device)}, {cfg.precision}" + (f", {world()} processes" if world() > 1 else "")
    time = cli.ENDED
    if state.iteration < total:
        besides = "" if plain else ", and what this command does besides"
        time = foretold(net, state, splits, total, decay) + besides
    cli.announce({"model": model, "method": method, "machine": machine, "time": time, "files": str(out)})


def foretold(net: Networks, state: State, splits: Splits, total: int, decay: list[Tensor]) -> str:
    """How long the rest of a run takes, in words: by a trial of a step and of a look of T, which leave nothing behind. Reading
    images, which may go on meanwhile, is not counted."""
    cfg, looks = net.cfg, sum(mlo_mae.learns_at(net.cfg, n, total, state.waited) for n in range(state.iteration, total))
    if world() > 1:  # a trial would be an exchange
        return "as the bar will tell"

    theta = mlo_mae.copied(state.theta)

    def step(in_place: bool = True, progress: float = 0.0):
        problem = theta, state.psi.params, images, Rates(0.0, decay[0])
        return mlo_mae.level1_step(net, *problem, 0, progress=progress, eyes=state.eyes, in_place=in_place)[1]

    def asks(n: int) -> bool:  # T in each step of this outer iteration
        known = isinstance(splits.train, Images) and mlo_mae.stays(cfg, n, total, state.waited)
        return mlo_mae.weighed_by(cfg, n / total) and not known

    def look():
        labelled = mlo_mae.labelled_of(cfg, *pairs, Rates(cfg.head_lr, decay[1]), 0)
        steps = [made] * (cfg.level1_steps if cfg.unroll == "full" else min(cfg.mask_batches, cfg.level1_steps))
        steps = steps if cfg.unroll == "full" else [mlo_mae.joined(steps)]
        form = mlo_mae.HYPERGRADIENTS.get(cfg.hypergradient, mlo_mae.exact)  # experiments have forms of their own
        form(net, state.theta, state.psi.params, state.head, labelled, steps)

    images, steps = trial_batch(splits.train, cfg.batch_size).images, (total - state.iteration) * cfg.level1_steps
    device = images.device
    if (first := min(seconds(step, device) for _ in range(2))) > SLOW:  # the first of all is slower than others
        return f"at least {cli.duration(steps * first)}" if looks else f"about {cli.duration(steps * first)}"
    made, of_step = step(in_place=False), seconds(step, device)
    rest = steps * of_step
    if looks:
        pairs = [trial_batch(split, cfg.labelled_batch_size) for split in (splits.train, splits.val)]
        if device.type != "cpu":
            look()  # the first of all compiles kernels
        rest += looks * seconds(look, device)
    if asking := cfg.level1_steps * sum(map(asks, range(state.iteration, total))):
        rest += asking * max(0.0, seconds(lambda: step(progress=1.0), device) - of_step)
    return f"about {cli.duration(rest)}"


def run_command(argv: list[str] | None) -> dict:
    """Run `presets`; prints the table, and returns what its last line reports: their names."""
    parser = cli.Parser(prog="mlo_mae.py presets", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    print(table(side_by_side()), end="\n\n")
    return {"command": "presets", "presets": list(mlo_mae.PRESETS)}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
