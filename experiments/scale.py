"""What pretraining costs at scale, by arithmetic: operations, bytes exchanged, memory, time; beside plain MAE. Nothing runs.

    python mlo_mae.py scale --preset imagenet --gpus 64 512       # and any flags of pretrain; by default ViT-L/16 as published

docs/scale.md says what is left out. Operations are those of matrix products. Images are in a folder, as ImageNet's are.
"""

import math
import operator
import sys
from dataclasses import asdict, dataclass, fields, replace

import mlo_mae
from bench import TRAINING_IMAGES
from harness import UserError, cli
from harness.measure import positive, show_page, table

# An H100 SXM by its data sheet: dense operations a second, bytes a second; four fifths of its 80 GB. Bytes a second that it
# sends: half of NVLink's 900 GB/s within a machine of 8, InfiniBand NDR's 400 Gb/s beyond (data sheet of the DGX H100).
PEAK, HBM, MEMORY, NVLINK, INFINIBAND, MACHINE = {"bf16": 989e12, "fp32": 67e12}, 3.35e12, 64e9, 450e9, 50e9, 8
KNOWN = {"shapes": (32, 8), "cifar10": (32, 10), "cifar100": (32, 100), "imagenet": (224, 1000)}  # pixels, classes
SHARE, CHANNELS = 0.18, 3  # share of PEAK: 62.9 TFLOP in 347 ms, benchmarks/step-cifar100-bf16-nvidia-h100-80gb-hbm3.md


@dataclass(frozen=True)
class Settings(mlo_mae.Config):
    """Of a run, and what else it is priced by."""

    classes: int = cli.flag(0, "of the labels (0: as the data has it)", least=0)
    share: float = cli.flag(SHARE, "of the peak rate that is reached", above=0, most=1)


def tokens_of(cfg: Settings) -> tuple[int, int, int]:
    """Tokens of the visible patches and of the whole image, CLS included, and values of a patch."""
    patches = (cfg.image_size // cfg.patch_size) ** 2
    return 1 + int(patches * (1 - cfg.mask_ratio)), 1 + patches, CHANNELS * cfg.patch_size**2


def parameters(cfg: Settings) -> dict[str, int]:
    """Lengths of the vectors: encoder, decoder, head (solved: its moments), T."""
    D, W, hidden, (_, whole, values) = cfg.width, cfg.decoder_width, cfg.masking_width, tokens_of(cfg)
    inputs = mlo_mae.read_by_masking(cfg, whole - 1, CHANNELS)[2]
    of_t = {"tokens": inputs, "shared": (inputs + 2) * hidden, "mlp": (inputs + 1) * hidden + (hidden + 1) * (whole - 1)}
    blocks, of_decoder = (depth * (12 * w**2 + 13 * w) for depth, w in ((cfg.depth, D), (cfg.decoder_depth, W)))
    head = (D + 1) * cfg.classes + 2 * D * (cfg.head_norm == "layer")
    return {
        "encoder": (values + 1) * D + (1 + whole) * D + blocks + 2 * D,
        "decoder": (D + 1) * W + (1 + whole) * W + of_decoder + 2 * W + (W + 1) * values,
        "head": (1 + D) * (D + cfg.classes) if cfg.level2 == "ridge" else head,
        "masking": of_t[cfg.masking_network],
    }


def operations(cfg: Settings) -> dict[str, tuple[int, int]]:
    """{part of an outer iteration in which T learns: (operations an image, images)}; the head's are of the whole batch."""
    D, W, hidden, (seen, whole, values) = cfg.width, cfg.decoder_width, cfg.masking_width, tokens_of(cfg)
    passes, again, by_tokens = 3 + (cfg.accumulate > 1), cfg.checkpoint_activations, cfg.masking_network == "tokens"

    def block(tokens: int, width: int, linears: int = 1, attention: int = 1) -> int:
        return linears * 24 * tokens * width**2 + attention * 4 * tokens**2 * width

    def trained(depth: int, tokens: int, width: int) -> int:  # a block that is made again stops before its last product
        return depth * (block(tokens, width, passes + again, passes + again) - again * 8 * tokens * width**2)

    embedding, embedding_whole = (2 * (tokens - 1) * values * D for tokens in (seen, whole))  # no gradient of its input
    ends = 2 * seen * D * W + 2 * whole * W * values  # of the decoder
    moved = cfg.depth * block(seen, D, 3, 3) + 2 * embedding  # by the jvp: weights of E, not those of D
    read = (by_tokens or cfg.masking_input == "embeddings") * embedding_whole
    read += by_tokens * min(cfg.masking_blocks, cfg.depth) * block(whole, D)
    inputs = mlo_mae.read_by_masking(cfg, whole - 1, CHANNELS)[2]
    first = 2 * inputs * (1 if by_tokens else hidden) * (1 if cfg.masking_network == "mlp" else whole - 1)  # T's layers
    second = 0 if by_tokens else 2 * hidden * (whole - 1)
    labelled, classes, steps, layer = cfg.labelled_batch_size, cfg.classes, cfg.head_steps, cfg.head_norm == "layer"
    stepped = 2 * labelled * D * classes * (6 * steps + 2 + layer * (3 * steps - 1))
    solved = 6 * labelled * D * (D + classes) + 8 * labelled * D * classes + 2 * D**2 * classes  # linalg.solve left out
    level1 = trained(cfg.depth, seen, D) + trained(cfg.decoder_depth, whole, W) + passes * ends + (passes - 1) * embedding
    images, looked_at = (cfg.batch_size * count for count in (cfg.level1_steps, min(cfg.mask_batches, cfg.level1_steps)))
    return {
        "level 1": (level1, images),
        "T weighs": (read + first + second, images),
        "levels 2 and 3": (trained(cfg.depth, whole, D) + (passes - 1) * embedding_whole, 2 * labelled),
        "jvp of (9)": (moved + cfg.decoder_depth * block(whole, W, 2, 3) + 2 * ends, looked_at),
        "T, (10)": (read + 2 * first + 3 * second, looked_at),
        "head": (solved if cfg.level2 == "ridge" else stepped, 1),
    }


def exchanged(cfg: Settings) -> dict[str, int]:
    """Bytes of what is exchanged: the gradient of theta in every step of level 1, the rest where T learns."""
    encoder, decoder, _, masking = parameters(cfg).values()
    return {
        "gradient of theta, a step": 4 * (encoder + decoder),
        "a of (7)": 4 * encoder,
        "hypergradient": 4 * masking,
        "whether T waits": 8 * (cfg.mask_wait > 0),
        "features and labels": 2 * cfg.labelled_batch_size * (4 * cfg.width + 8),  # gathered; all others are summed
    }


def activations(cfg: Settings) -> dict[str, int]:
    """Bytes of an image that are held for the backward pass, with the Triton kernels."""
    low = 2 if cfg.precision == "bf16" else 4  # bytes of what products read and write
    D, W, (seen, whole, values) = cfg.width, cfg.decoder_width, tokens_of(cfg)

    def blocks(depth: int, tokens: int, width: int, heads: int) -> int:
        # Two norms' inputs; four products' inputs, qkv and fc1's output; log-sum-exps, and the norms' means and deviations.
        one = tokens * (8 * width + 14 * width * low + 4 * heads + 16)
        return depth * 4 * tokens * width + one if cfg.checkpoint_activations else depth * one

    encoder = [(t - 1) * values * low + blocks(cfg.depth, t, D, cfg.heads) + t * (4 * D + 8) for t in (seen, whole)]
    decoder = blocks(cfg.decoder_depth, whole, W, cfg.decoder_heads) + whole * (4 * W + 8) + low * (seen * D + whole * W)
    loss = whole * values * low + 4 * CHANNELS * cfg.image_size**2  # predictions; images
    return {"level 1": encoder[0] + decoder + loss, "levels 2 and 3": encoder[1]}


def memory(cfg: Settings, gpus: int) -> dict[str, int]:
    """Bytes on each GPU, temporaries left out. Weights and moments: of now, the iteration's start, the last step's start."""
    (encoder, decoder, head, masking), learned = parameters(cfg).values(), cfg.masking == "learned"
    theta, levels = encoder + decoder, min(2 + learned, cfg.level1_steps + 1)  # of three vectors each
    return {
        "vectors of theta": 4 * theta * (3 * levels + 2 + learned),  # decays, a gradient, and the one that T is told of
        "bfloat16 copies": 2 * theta * (cfg.precision == "bf16"),
        "vectors of head and T": 4 * (4 * head + 6 * masking),
        "activations": max(map(operator.mul, activations(cfg).values(), mlo_mae.held_at_once(cfg, gpus))),
    }


def fitting(cfg: Settings, gpus: int) -> Settings:
    """With the least --accumulate, from cfg's own on, that fits in MEMORY. Raises UserError where none does."""
    own = (n for n in range(cfg.accumulate, cfg.batch_size // gpus + 1) if cfg.batch_size % (gpus * n) == 0)
    way = next((way for n in own if sum(memory(way := replace(cfg, accumulate=n), gpus).values()) <= MEMORY), None)
    if not way or cfg.labelled_batch_size % gpus:
        raise UserError(f"--gpus {gpus} does not divide the batch sizes, or they do not fit; give others, see --batch-size")
    return way


def seconds(cfg: Settings, gpus: int) -> dict[str, tuple[float, float]]:
    """{part of a run: (seconds of an outer iteration, those of exchanges among them)}, if nothing ran beside anything."""
    cost, (gradient, *summed, gathered) = operations(cfg), exchanged(cfg).values()
    rate, found = PEAK[cfg.precision] * cfg.share, {}
    ring = (gpus - 1) / gpus / (NVLINK if gpus <= MACHINE else INFINIBAND)  # a sum goes round twice
    for part, names in {"MAE": ["level 1"], "T learns": list(cost), "T weighs": ["level 1", "T weighs"]}.items():
        compute = sum(math.prod(cost[name]) / (1 if name == "head" else gpus) for name in names) / rate
        exchange = ring * (2 * gradient * cfg.level1_steps + (2 * sum(summed) + gathered) * (part == "T learns"))
        found[part] = compute + exchange + 7 * gradient * cfg.level1_steps / HBM, exchange  # AdamW reads 4 vectors, writes 3
    return found


def iterations(cfg: Settings) -> dict[str, int]:
    """Outer iterations of a whole run by its parts, of a T that never waits."""
    total = math.ceil(cfg.epochs * cfg.images * (1 - cfg.val_fraction) / (cfg.batch_size * cfg.level1_steps))
    start, end = mlo_mae.window(cfg, total)
    return {"MAE": start, "T learns": end - start, "T weighs": total - end}


def row_of(cfg: Settings, gpus: int) -> dict[str, float]:
    """What the last table says of so many GPUs. Raises UserError."""
    way, count, rival = fitting(cfg, gpus), iterations(cfg), fitting(replace(cfg, masking="random"), gpus)
    times, (mae, _) = seconds(way, gpus), seconds(rival, gpus)["MAE"]
    hours = [mae * sum(count.values()), sum(times[part][0] * number for part, number in count.items())]
    learns, exchange = times["T learns"]
    row = {"GPUs": gpus, "GB": sum(memory(way, gpus).values()) / 1e9, "--accumulate": way.accumulate, "s, MAE": mae}
    row |= {"s, T learns": learns, "exchange": exchange / learns, "s, T weighs": times["T weighs"][0]}
    return row | {"hours, MAE": hours[0] / 3600, "hours": hours[1] / 3600, "ratio": hours[1] / hours[0]}


def run_command(argv: list[str]) -> dict:
    """Run `scale` with these flags; prints the tables, and returns what its last line reports."""
    parser = cli.Parser(prog="mlo_mae.py scale", description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=positive, nargs="+", default=[8, 64], help="how many (default 8 64)")
    cli.add_flags(parser, fields(Settings))
    flags = vars(parser.parse_args(argv))
    gpus, preset = flags.pop("gpus"), flags.get("preset", "imagenet-large")
    cfg = Settings(**{"preset": preset, "precision": "bf16"} | mlo_mae.PRESETS[preset] | flags)
    if cfg.data in KNOWN:
        pixels, classes = KNOWN[cfg.data]
        own = {"images": TRAINING_IMAGES[cfg.data], "image_size": pixels, "classes": classes}
        cfg = replace(cfg, **{name: value for name, value in own.items() if not getattr(cfg, name)})
    if not cfg.images or not cfg.image_size or not cfg.classes:
        raise UserError(f"--data {cfg.data} is not looked into: give its --images, --image-size and --classes")
    cfg = replace(cfg, precision="bf16") if cfg.precision == "auto" else cfg  # these GPUs have it
    mlo_mae.check(cfg)
    mlo_mae.check_size(cfg, cfg.image_size, CHANNELS)
    if cfg.masking != "learned" or cfg.masking_from or cfg.unroll == "full" or cfg.hypergradient == "unrolled":
        raise UserError("only a run that learns a T of its own, by its last step, is priced; plain MAE stands beside it")
    cost = operations(cfg) | {
        "p maps, once (not of folders)": (operations(cfg)["T weighs"][0], round(cfg.images * (1 - cfg.val_fraction)))
    }
    parts = [{"part": n, "GFLOP an image": one / 1e9, "images": k, "TFLOP": one * k / 1e12} for n, (one, k) in cost.items()]
    kinds = {"exchanged": exchanged(cfg), "of an image": activations(cfg), "on a GPU": memory(fitting(cfg, gpus[0]), gpus[0])}
    sizes = [{"bytes": f"{kind}: {name}", "MB": size / 1e6} for kind, of in kinds.items() for name, size in of.items()]
    tables = parts, sizes, [row_of(cfg, n) for n in gpus]
    cells = [[[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows] for rows in tables]
    text = [line for rows, of in zip(tables, cells) for line in ("", *table([list(rows[0]), *of]).splitlines())]
    facts = {"arithmetic, share of peak": cfg.share} | parameters(cfg) | iterations(cfg)
    show_page(["scale", *argv], facts, text, ["The last three facts: outer iterations. s: of one. hours: of a run."])
    return {"command": "scale", "settings": asdict(cfg), "parts": parts, "bytes": sizes, "rows": tables[2]}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line for what the user can mend."""
    return cli.reported("mlo_mae", lambda: run_command(sys.argv[1:] if argv is None else list(argv)), cli.LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
