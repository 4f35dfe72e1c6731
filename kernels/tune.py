"""Attention in the tiles in use against the neighbouring ones, on the GPU at hand.

    python -m kernels.tune [--shapes cifar imagenet] [--dtypes bf16] [--batch-size 128] [--save]

Each direction of the kernels runs at a ViT-B's shapes in the tiles that kernels/attention.py chooses, and in neighbours:
half or twice as many queries, keys or warps, no small tile for a short rest of the queries, several programs a row. Prints the
machine, a row a shape and direction, and one last line of JSON.
Exit status: 0; 1 where a choice of tiles gives wrong results; 2 for what the user can mend.
"""

import argparse
import functools
import shlex
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernels
from harness import UserError, cli, measure
from harness.measure import in_a_row, input_sets, interleaved, largest_error, quartiles, repeats_of, to_double
from kernels.attention import Tiles, _parts, backward_triton, forward_triton, jvp_triton, shared_tiles, tiles_in_use
from kernels.race import DTYPES, GEOMETRY, Case, cases, drawn, maker


def named(tiles: Tiles) -> str:
    """The tiles as a row names them."""
    scheme = ", a row" if tiles.alone else "" if tiles.rest else ", no short rest"
    return f"{tiles.queries} x {tiles.keys}, {tiles.warps} warps{scheme}"


def tile_choices(qkv: Tensor, direction: str) -> list[Tiles]:
    """Those in use, then those with half or twice as many of one thing, those that give a short rest of the queries a whole
    tile, and the backward's other scheme."""
    chosen = tiles_in_use(qkv, direction)
    choices = [chosen]
    for field, least in (("queries", 16), ("keys", 16), ("warps", 1)):
        if chosen.alone and field == "queries":
            continue  # it holds them all
        size = getattr(chosen, field)
        choices += [chosen._replace(**{field: other}) for other in (size // 2, 2 * size) if other >= least]
    if not chosen.alone and _parts(qkv, chosen)[1]["REST"]:
        choices.append(chosen._replace(rest=False))
    return choices + ([shared_tiles(qkv, direction)] if chosen.alone and qkv.shape[1] > chosen.keys else [])


def launches(direction: str, tiles: Tiles) -> Callable[..., Callable[[], Any]]:
    """As `race.maker`: a function of what `drawn` returns, which makes a call of this direction's kernel in these tiles."""
    if direction == "forward":
        return lambda tensors, _: lambda: forward_triton(*tensors, tiles)[0]
    if direction == "jvp":
        return lambda tensors, tangents: lambda: jvp_triton(*tensors, *tangents, tiles)

    def backward(tensors, cotangent):
        saved = *forward_triton(*tensors), *tensors
        return lambda: backward_triton(*saved, cotangent, tiles)

    return backward


def race(case: Case, direction: str, repeats: int, device: torch.device) -> list[dict]:
    """One row a choice of tiles, those in use first; of the others, those that the chip has room for. ValueError where a
    choice errs more than twice as much as eager PyTorch."""
    inputs = drawn(case, direction)
    judge, plain = (maker(direction, case.eager, 1)(*x)() for x in (to_double(inputs), inputs))
    allowed, makers, count = 2 * largest_error(plain, judge), {}, 1
    for tiles in tile_choices(case.tensors[0], direction):
        make = launches(direction, tiles)
        try:
            found = largest_error(make(*inputs)(), judge)
        except Exception:
            if not makers:
                raise
            continue  # too much shared memory, or a tile that the compiler cannot cut
        if not found <= allowed:  # NaN is not
            raise ValueError(f"{case.shape} {direction} in {named(tiles)}: relative error {found:.1e}")
        if not makers:
            count = repeats_of(make(*inputs), device)
        makers[tiles] = make

    def fresh():
        inputs = input_sets(functools.partial(drawn, case, direction), count, device)
        return {tiles: in_a_row(make, inputs, count, device) for tiles, make in makers.items()}

    times = interleaved(fresh, repeats, device)
    return [{"tiles": named(tiles), **quartiles([t / count for t in times[tiles]])} for tiles in makers]


def tune(options: argparse.Namespace, device: torch.device, page: measure.Page) -> dict:
    """Attention at every shape, dtype and direction, in the tiles in use and in the neighbouring ones."""
    if device.type not in kernels.backend.DEVICES:
        raise UserError("tiles are of Triton's kernels, which need a GPU here; run it where there is one")
    titles = ["shape", "dtype", "direction", "in use", "ms", "fastest neighbour", "ms", "in use takes"]
    page.start(titles, [39, 5, 9, 33, 6, 33, 6, 12])
    torch.manual_seed(0)
    for dtype in options.dtypes or ["bf16"]:
        for name in options.shapes or ["cifar", "imagenet"]:
            for case in cases(name, options.batch_size or 128, DTYPES[dtype], device):
                for direction in case.work if case.kernel == "attention" else ():
                    what = {"shape": case.shape, "dtype": dtype, "direction": direction}
                    try:
                        found = race(case, direction, options.repeats, device)
                    except ValueError as error:
                        page.wrong.append(f"{dtype} {error}")
                        continue
                    page.record(*(what | row for row in found))
                    ours, best = found[0], min(found[1:], key=lambda row: row["seconds"], default=found[0])
                    shown = [text for row in (ours, best) for text in (row["tiles"], f"{1e3 * row['seconds']:.3g}")]
                    page.row([*what.values(), *shown, f"{ours['seconds'] / best['seconds']:.2f}x"])
    page.say(
        "",
        "ms: medians of calls in a row. Queries a program x keys a step. A neighbour has half or twice as many of one, gives "
        "a short rest of the queries a whole tile, or has several programs a row.",
    )
    return {"rows": page.rows}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = cli.Parser(prog="kernels.tune", description=__doc__.splitlines()[0])
    measure.add_flags(parser, "tiles", tune)
    parser.add_argument("--shapes", nargs="+", choices=list(GEOMETRY), help="default: cifar imagenet")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: bf16")
    parser.add_argument("--batch-size", type=measure.positive, help="default 128")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 1 after a wrong result, 2 after one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return measure.run("kernels.tune", f"python -m kernels.tune {shlex.join(argv)}".strip(), lambda: parse(argv))


if __name__ == "__main__":
    sys.exit(main())
