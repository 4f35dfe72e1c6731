"""U-MAE's uniformity term and SemMAE's parts and masks: each formula by loops, and runs that use them."""

import itertools
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import SMALL, bare, refused, same

import mlo_mae
from data import Images
from experiments import baselines, open_run
from experiments.baselines import (
    PARTS_FORMAT,
    UMAE,
    PartLearner,
    SemMAE,
    blur,
    learn_parts,
    moved_ids,
    overlap,
    part_maps,
    prepare,
    read_parts,
    semantic_masks,
    semantic_quota,
    semantic_scores,
    uniformity,
)
from harness import UserError
from harness.run import read_metrics
from harness.vectors import call
from kernels import gather_patches, select_patches
from mlo_mae import build, fresh_level, level1_step, main

# ------------------------------------------------------------------------------------------------------- U-MAE


def by_loops(features):
    total, pairs = 0.0, 0
    for i, first in enumerate(features.tolist()):
        for j, second in enumerate(features.tolist()):
            if i == j:
                continue
            norms = math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))
            total, pairs = total + (sum(a * b for a, b in zip(first, second)) / norms) ** 2, pairs + 1
    return total / pairs


def test_uniformity_is_the_mean_squared_cosine_over_different_images():
    torch.manual_seed(0)
    features = torch.randn(6, 5, dtype=torch.float64) * torch.rand(6, 1, dtype=torch.float64)
    assert uniformity(features).item() == pytest.approx(by_loops(features), rel=1e-12)
    assert uniformity(3 * torch.eye(4)).item() == pytest.approx(0, abs=1e-7)
    assert uniformity(torch.randn(1, 5).expand(4, -1)).item() == pytest.approx(1, abs=1e-6)


def test_gradient_of_uniformity_by_finite_differences():
    torch.manual_seed(1)
    features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(uniformity(features), features)
    step = torch.eye(12, dtype=torch.float64).view(12, 4, 3) * 1e-5
    differences = [(by_loops(features + e) - by_loops(features - e)) / 2e-5 for e in step]
    assert torch.allclose(gradient.flatten(), torch.tensor(differences, dtype=torch.float64), atol=1e-9)


def test_level_1_adds_the_weighted_term_of_masked_cls_tokens():
    """The same step with and without the term: losses and gradients differ by it, and by nothing else."""
    found = {}
    for weight in (0.0, 0.7):
        net, (theta, _, psi) = build(UMAE(uniformity=weight, width=16, depth=1, heads=2, decoder_width=8), 16, 3, 2)
        prepare(net, None, None, None)  # which needs data, device and folder for parts alone
        images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
        rates = mlo_mae.Rates(1e-3, torch.zeros(len(theta)).double())
        _, step, loss, error = level1_step(net, fresh_level(theta.double(), "cpu"), psi, images, rates, 0, 0)
        found[weight] = step.gradient, loss, error
    params = theta.double().requires_grad_()
    term = uniformity(call(net.encoder, params[: net.encoder_size], images, step.keep)[:, 0])
    (gradient,) = torch.autograd.grad(term, params)
    assert found[0.7][1] - found[0.0][1] == pytest.approx(0.7 * term.item(), rel=1e-9) and term > 1e-3
    assert torch.allclose(found[0.7][0] - found[0.0][0], 0.7 * gradient, atol=1e-10)
    assert found[0.7][2] == found[0.0][2]  # the reconstruction error is reported without it


# ------------------------------------------------------------------------------------------------ SemMAE: masks


def part_lists(batch, patches, parts, seed=0):
    """Part ids of uneven parts, [B, L]; some images lack some parts."""
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(parts, 0.5), batch)
    return torch.tensor(np.stack([random.choice(parts, patches, p=share) for share in shares]))


def hidden_of(ids, parts, progress, hidden, seed):
    scores = semantic_scores(ids, parts, progress, hidden, torch.Generator().manual_seed(seed))
    return select_patches(scores, ids.shape[1] - hidden)[2]  # [B, L]


def counts(ids, parts, where=None):
    one_hot = torch.nn.functional.one_hot(ids, parts).double()
    return (one_hot if where is None else one_hot * where[..., None]).sum(1)  # [B, N]


@pytest.mark.parametrize("patches, hidden, parts", [(64, 48, 7), (49, 37, 6), (16, 3, 2), (9, 8, 7)])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 1.0])
def test_quotas_follow_the_formula_and_the_total_is_exact(patches, hidden, parts, progress):
    ids = part_lists(200, patches, parts)
    mask = hidden_of(ids, parts, progress, hidden, seed=3)
    assert torch.equal(mask.sum(1), torch.full((200,), float(hidden)))
    taken, lam = counts(ids, parts, mask), 1 - progress**2
    # The order in which parts are filled is drawn first: the same draw, and then the formula by loops.
    orders = torch.rand(200, parts, generator=torch.Generator().manual_seed(3)).argsort(1).tolist()
    for n, got, order in zip(counts(ids, parts).tolist(), taken.tolist(), orders):
        filled, left = [0] * parts, hidden
        for part in order:
            filled[part] = min(int(n[part]), left)
            left -= filled[part]
        quota = [lam * n[k] * hidden / patches + (1 - lam) * filled[k] for k in range(parts)]
        assert sum(quota) == pytest.approx(hidden)
        assert all(abs(got[k] - quota[k]) < 1 - 1e-6 or got[k] == round(quota[k]) for k in range(parts)), (got, quota)


def test_at_first_a_share_of_every_part_at_last_whole_parts():
    ids = part_lists(300, 64, 7)
    n = counts(ids, 7)
    first, last = (counts(ids, 7, hidden_of(ids, 7, progress, 48, seed=0)) for progress in (0.0, 1.0))
    assert ((first - 0.75 * n).abs() < 1).all()
    cut = (last > 0) & (last < n)  # parts that are hidden in part
    assert (cut.sum(1) <= 1).all() and (last == n).any(1).all()
    halfway = counts(ids, 7, hidden_of(ids, 7, 0.5, 48, seed=0))
    assert ((halfway - 0.75 * n).abs() > 1.5).any() and ((halfway > 0) & (halfway < n)).sum(1).max() > 1


def test_inside_a_part_every_patch_is_as_likely():
    ids = torch.arange(16).expand(4000, -1) // 10  # parts of 10 and 6 patches
    for progress in (0.0, 1.0):
        often = hidden_of(ids, 2, progress, 8, seed=1).mean(0)  # [L]; standard error below 0.008
        assert often[:10].std() < 0.02 and often[10:].std() < 0.02


def test_scores_are_a_function_of_the_generator():
    ids = part_lists(50, 64, 7)
    assert torch.equal(hidden_of(ids, 7, 0.4, 48, seed=5), hidden_of(ids, 7, 0.4, 48, seed=5))
    assert not torch.equal(hidden_of(ids, 7, 0.4, 48, seed=5), hidden_of(ids, 7, 0.4, 48, seed=6))
    n = counts(ids, 7).float()
    assert torch.equal(semantic_quota(n, 1.0, 48, torch.Generator().manual_seed(2)).sum(1), torch.full((50,), 48.0))


# ------------------------------------------------------------------------------------------------ SemMAE: parts


def test_overlap_is_0_for_disjoint_maps_and_1_for_equal_ones():
    assert overlap(torch.eye(4).repeat_interleave(4, 1)[None]).item() == pytest.approx(0, abs=1e-6)
    shape = torch.rand(2, 1, 16)
    assert overlap(shape * torch.tensor([1.0, 0.2, 0.01])[:, None]).item() == pytest.approx(1, abs=1e-6)
    maps = torch.rand(3, 4, 9, dtype=torch.float64)
    order = list(itertools.permutations(range(4), 2))
    pairs = [torch.cosine_similarity(row[i], row[j], dim=0) for row in maps for i, j in order]
    assert overlap(maps).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-12)


@pytest.mark.slow
def test_minimising_the_overlap_sets_maps_apart():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 9, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        overlap(logits.softmax(1)).backward()
        optimizer.step()
    maps = logits.softmax(1)
    assert overlap(maps) < 0.01 and (maps.max(1).values > 0.9).all() and len(maps.argmax(1).unique()) == 3


def test_maps_are_blurred_attention_of_part_tokens_over_patches():
    torch.manual_seed(0)
    learner, tokens = PartLearner(8, 3, 12), torch.randn(2, 17, 8)
    maps = learner.maps(tokens)
    weight, bias = learner.part_tokens.weight.view(3, 8, 8), learner.part_tokens.bias.view(3, 8)
    for image, part in itertools.product(range(2), range(3)):
        token = weight[part] @ tokens[image, 0] + bias[part]
        logits = [(token @ tokens[image, 1 + patch]).item() / math.sqrt(8) for patch in range(16)]
        attention = [16 * math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        assert torch.allclose(maps[image, part], blur(torch.tensor([[attention]]))[0, 0], atol=1e-5)


def test_blur_is_binomial_and_keeps_a_constant():
    spot = torch.zeros(1, 1, 25)
    spot[0, 0, 12] = 16
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(blur(spot).view(5, 5), expected)
    assert torch.allclose(blur(torch.full((2, 3, 16), 0.7)), torch.full((2, 3, 16), 0.7))


def test_the_class_token_says_how_parts_look_and_the_maps_where():
    """AdaIN: maps and class token both matter, and what a map is scaled by does not."""
    torch.manual_seed(0)
    learner, maps, cls = PartLearner(8, 3, 12), torch.rand(2, 3, 16), torch.randn(2, 8)
    assert learner.draw(maps, cls).shape == (2, 16, 12)
    assert not torch.allclose(learner.draw(maps, cls), learner.draw(maps, cls.flip(0)), atol=1e-3)
    assert not torch.allclose(learner.draw(maps, cls), learner.draw(maps.flip(2), cls), atol=1e-3)
    torch.nn.init.zeros_(learner.convolutions[0].bias)
    assert torch.allclose(learner.draw(maps, cls), learner.draw(5 * maps, cls), atol=1e-3)


def clusters(batch, seed):
    """Tokens of an 8x8 grid cut into three regions of clearly different tokens and colours, and the regions [B, L]."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(99))  # three kinds of patch, the class token
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    across, down = torch.randint(3, 6, (2, batch, 1, 1), generator=random)
    regions = torch.where(column < across, 0, torch.where(row < down, 1, 2)).flatten(1)  # [B, L]
    tokens = torch.cat([centres[3].expand(batch, 1, -1), centres[regions]], dim=1)
    tokens = tokens + 0.3 * torch.randn(tokens.shape, generator=random)
    tokens[:, 1:] /= 4
    colours = torch.tensor([[1.0, -1, 0], [-1.0, 0, 1], [0.0, 1, -1]])
    return tokens, colours[regions], regions


@pytest.mark.slow
def test_parts_are_the_clusters_of_a_toy_set(monkeypatch):
    """Three regions: by chance a third of the patches agree, and one part for all agrees with half of them."""
    monkeypatch.setattr(baselines, "LEARNING_RATE", 3e-3)  # fewer steps
    torch.manual_seed(3)
    learner = PartLearner(16, 3, 3)
    tokens, _, regions = clusters(64, 10**6)

    def agreement():
        ids = learner.maps(tokens).argmax(1)
        named = (torch.tensor(order)[ids] for order in itertools.permutations(range(3)))
        return max((guess == regions).double().mean().item() for guess in named)

    before = agreement()
    learn_parts(learner, (clusters(16, number)[:2] for number in itertools.count()), 150)
    assert before < 0.8 and agreement() > 0.9
    assert not any(parameter.requires_grad for parameter in learner.parameters())


# -------------------------------------------------------------------------------------------------- whole runs

FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
PARTS = ["--parts", "3", "--parts-steps", "5"]


def write_npz(path, size):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 255, (80, size, size, 3)).astype(np.uint8), np.arange(80) % 2
    np.savez(path, train_images=images[:60], train_labels=labels[:60], test_images=images[60:], test_labels=labels[60:])
    return path


def arguments(folder, out, *command, images="small.npz"):
    """`command` and the flags of a small run on the images in `folder`, without --image-size."""
    name = 1 + (command[0] == "baselines")
    common = ["--data", folder / images, *FLAGS, "--image-size", 0, "--log-every", 1, "--out", folder / out]
    return [str(word) for word in (*command[:name], *common, *command[name:])]


def semmae(folder):
    return "baselines", "semmae", *PARTS, "--parts-from", folder / "mae", "--epochs", 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a run of random masks on them whose encoder is wider, and a run of SemMAE on that encoder."""
    folder = tmp_path_factory.mktemp("semantic")
    write_npz(folder / "small.npz", 16)
    wider = "--masking", "random", "--width", "32", "--depth", "2", "--epochs", "1"
    with bare():
        assert main(arguments(folder, "mae", "pretrain", *wider)) == 0
    assert main(arguments(folder, "semantic", *semmae(folder))) == 0
    return folder


def tensors(run):
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    return {(part, name): tensor for part in ("model", "moments") for name, tensor in flat(content[part])}


def flat(tree, path=""):
    for name, value in tree.items():
        yield from flat(value, path + name) if isinstance(value, dict) else [(path + name, torch.as_tensor(value))]


def test_a_run_with_uniformity(folder, bare_runs, tmp_path):
    shutil.copy(folder / "small.npz", tmp_path)
    assert main(arguments(tmp_path, "run", "baselines", "u-mae", "--uniformity", 0.5, "--epochs", 5, "--no-crop")) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    terms = [row["level1_loss"] - row["reconstruction_error"] for row in rows]  # p is 1: what L1 has beyond the error
    assert all(0 < term <= 0.5 + 1e-6 for term in terms) and terms[-1] < terms[0]
    assert all("level3_loss" not in row and row["p_mean"] == 1 for row in rows)


def test_semmae_may_have_the_term_as_well(folder, bare_runs, tmp_path):
    shutil.copy(folder / "small.npz", tmp_path)
    flags = *semmae(folder), "--uniformity", 0.5, "--epochs", 1, "--no-crop"
    assert main(arguments(tmp_path, "run", *flags)) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < row["level1_loss"] - row["reconstruction_error"] <= 0.5 + 1e-6 for row in rows)


def test_a_semantic_run_keeps_its_parts(folder, tmp_path, capsys):
    run = tmp_path / "moved"
    shutil.copytree(folder / "semantic", run)
    content = torch.load(run / "parts.pt", weights_only=True)
    assert content["encoder_shape"] == [32, 2, 2]
    frozen = torch.load(folder / "mae" / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in content["encoder"].items())
    rows = read_metrics(run / "metrics.jsonl")
    assert all(math.isfinite(row["level1_loss"]) and row["mask_overlap"] < 1 and "level3_loss" not in row for row in rows)
    (run / "masks.png").unlink()
    assert main(["show", str(run), "--device", "cpu"]) == 0
    assert (run / "masks.png").read_bytes() == (folder / "semantic" / "masks.png").read_bytes()
    assert main(["probe", str(run), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["command"] == "probe"


def test_masks_go_to_whole_parts_and_follow_step_and_image(folder):
    net, _, splits = open_run(folder / "semantic", "cpu")
    parts = read_parts(net.cfg, splits, folder / "semantic" / "parts.pt", torch.device("cpu"))
    assert parts.learner.parts == 3
    images = next(splits.train.ordered(48)).images
    known = torch.arange(16).expand(48, -1) // 6  # parts as they should be used: 6, 6, 4 patches
    net.score = semantic_masks(net, parts._replace(learner=KnownParts(known)))
    for progress, cut in ((0.0, 3), (1.0, 1)):
        prob, keep, _, mask = mlo_mae.draw_masks(net, None, images, None, 0, 0, 7, progress=progress)
        taken, n = counts(known, 3, mask), counts(known, 3)
        assert keep.shape == (48, 4) and torch.equal(prob, torch.ones(48, 16)) and torch.equal(mask.sum(1), 12 * prob[:, 0])
        assert ((taken > 0) & (taken < n)).sum(1).max() <= cut
    assert ((taken == 0) | (taken == n)).sum(1).min() >= 2
    again, other = (mlo_mae.draw_masks(net, None, images, None, 0, 0, key)[3] for key in (7, 8))
    assert torch.equal(mask, again) and not torch.equal(mask, other)


class ByBrightness:
    """The part of a patch is how bright it is: 0, 1, 2."""

    parts = 3

    def maps(self, tokens):
        return torch.nn.functional.one_hot(tokens.long(), 3).float().mT


def test_parts_move_with_the_crops_and_flips_of_their_images(folder, monkeypatch):
    """Each patch belongs to what covers most of it; beside the image that is part number 3."""
    net, _, splits = open_run(folder / "semantic", "cpu")
    parts = read_parts(net.cfg, splits, folder / "semantic" / "parts.pt", torch.device("cpu"))
    parts = parts._replace(learner=ByBrightness())
    monkeypatch.setattr(baselines, "frozen_tokens", lambda net, encoder, images: images[:, 0, ::4, ::4].flatten(1))
    cells = torch.randint(0, 3, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = Images(cells.repeat_interleave(4, 2).repeat_interleave(4, 3), np.zeros(40), (0.0,), (1 / 255,))
    maps, seen = part_maps(net, parts, images), set()
    assert len(maps) == 40 and maps.images.shape == (40, 3, 4, 4)
    shares = mlo_mae.moved_weights(maps.stream(10, 5), 4)
    images.images += 1  # black, which is around, is now none of them
    net.score = semantic_masks(net, parts)
    for batch, known, _ in zip(images.stream(10, 5), shares, range(8)):
        patches = gather_patches(batch.images, None, 4).long()  # [B, L, 16]
        covered = torch.stack([(patches == one).sum(2) for one in (1, 2, 3, 0)], 2)
        most = covered.sort(2).values
        clear = most[..., 3] > most[..., 2]
        ids = moved_ids(known, 3)
        assert torch.equal(ids[clear], covered.argmax(2)[clear]) and clear.float().mean() > 0.4
        counts = mlo_mae.draw_masks(net, None, batch.images, None, 0, known=known)[0]  # what is beside the image does not
        assert torch.allclose(counts, covered[..., :3].sum(2) / 16) and counts.min() < 1
        seen |= set(ids.unique().tolist())
    assert seen == {0, 1, 2, 3}


@pytest.mark.slow
def test_the_frozen_encoder_looks_at_each_image_once(folder, monkeypatch):
    """Of images as they are, these are the masks that it would give looking at each batch."""
    looks, ready, found = baselines.frozen_tokens, baselines.prepare, []
    monkeypatch.setattr(baselines, "frozen_tokens", lambda *given: calls.append(len(given[2])) or looks(*given))
    for name in "once", "anew":
        calls = []
        assert main(arguments(folder, name, *semmae(folder), "--no-crop", "--no-flip")) == 0
        found.append((tensors(folder / name), sum(calls)))

        def without_maps(net, *given):
            ready(net, *given)
            net.maps = None

        monkeypatch.setattr(baselines, "prepare", without_maps)
    (once, seen), (anew, seen_anew) = found
    assert same(once, anew)
    _, _, splits = open_run(folder / "once", "cpu")
    cfg = json.loads((folder / "once" / "config.json").read_text())
    updates = math.ceil(cfg["epochs"] * len(splits.train) / (cfg["batch_size"] * cfg["level1_steps"]))
    assert seen_anew - seen == updates * cfg["level1_steps"] * cfg["batch_size"] - len(splits.train)


class KnownParts:
    parts = 3

    def __init__(self, ids):
        self.ids = ids

    def maps(self, tokens):
        return torch.nn.functional.one_hot(self.ids, 3).float().mT


@pytest.mark.slow
def test_level_1_masks_move_with_the_run(folder, monkeypatch):
    seen = []
    real = baselines.semantic_scores
    monkeypatch.setattr(baselines, "semantic_scores", lambda *given: seen.append(given[2]) or real(*given))
    assert main(arguments(folder, "moving", *semmae(folder))) == 0
    steps = [share for share in seen if share < 1]  # 6 updates of 2 steps, each with a line of metrics after it
    assert steps == [share / 6 for update in range(6) for share in [update, update, update + 1] if share < 6]
    assert seen[-2:] == [1, 1]  # the last line of metrics, and the picture


@pytest.mark.slow
def test_resumed_runs_end_with_the_same_weights(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "mae", tmp_path / "mae")
    shutil.copy(folder / "small.npz", tmp_path)
    real, calls = mlo_mae.mask_statistics, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(mlo_mae, "mask_statistics", interrupted)
    assert main(arguments(tmp_path, "cut", *semmae(tmp_path))) == 130
    assert not (tmp_path / "cut" / "probe.json").exists()
    shutil.rmtree(tmp_path / "mae")  # parts.pt is enough
    refused(["pretrain", "--out", tmp_path / "cut", "--resume"], capsys, "parts_from")  # another command began it
    refused(["baselines", "u-mae", "--out", tmp_path / "cut", "--resume"], capsys, "parts_from")
    assert main(["baselines", "semmae", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert same(tensors(tmp_path / "cut"), tensors(folder / "semantic"))
    first, second = ((run / "parts.pt").read_bytes() for run in (tmp_path / "cut", folder / "semantic"))
    assert first == second


@pytest.mark.parametrize("steps", [1, 5])  # of one step it finds the last one under way
def test_a_stop_during_part_learning_leaves_nothing(folder, tmp_path, monkeypatch, capsys, steps):
    real = baselines.frozen_tokens

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(baselines, "frozen_tokens", interrupted)
    assert main(arguments(folder, tmp_path / "run", *semmae(folder), "--parts-steps", steps)) == 130
    assert not (tmp_path / "run").exists()
    assert "start again" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        (["baselines"], ["u-mae", "semmae"]),
        (["baselines", "mae"], ["mae", "u-mae", "semmae"]),
        (["baselines", "semmae"], ["--parts-from"]),
        (["pretrain", "--parts-from", "mae"], ["--parts-from"]),
        (["pretrain", "--masking", "random", "--parts-from", "mae"], ["--parts-from"]),
        (["baselines", "u-mae", "--parts-from", "mae"], ["--parts-from"]),
        (["baselines", "semmae", "--parts-from", "nothing"], ["nothing", "does not exist"]),
        (["baselines", "semmae", "--parts-from", "nothing", "--dry-run"], ["nothing", "does not exist"]),
        (["baselines", "semmae", "--parts-from", "."], ["checkpoint.pt", "does not exist"]),
        (["baselines", "semmae", "--parts-from", "small.npz"], ["small.npz", "cannot be read"]),
        (["baselines", "semmae", "--parts-from", "semantic/parts.pt"], ["parts.pt", mlo_mae.FORMAT]),
        (["baselines", "semmae", "--parts-from", "mae", "--patch-size", "2"], ["mae", "4 pixels a patch", "2"]),
        (["baselines", "semmae", "--parts-from", "mae", "--parts", "1"], ["--parts", "2"]),
        (["baselines", "semmae", "--parts-from", "mae", "--parts-steps", "0"], ["--parts-steps", "1"]),
        (["baselines", "semmae", "--parts-from", "mae", "--masking", "learned"], ["--masking", "random"]),
        (["pretrain", "--uniformity", "0.01"], ["--uniformity"]),
        (["baselines", "u-mae", "--masking", "learned"], ["--masking", "random"]),
        (["baselines", "u-mae", "--uniformity", "-1"], ["--uniformity", "at least 0"]),
        (["baselines", "u-mae", "--uniformity", "nan"], ["--uniformity"]),
        (["baselines", "u-mae", "--uniformity", "0.01", "--batch-size", "1"], ["--batch-size", "2"]),
    ],
)
def test_what_does_not_go_together_ends_in_one_line(folder, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(folder)
    refused(flags if len(flags) == 1 else arguments(folder, "refused", *flags), capsys, *words)
    assert not (folder / "refused").exists()


def test_parts_of_other_images_are_refused(folder, capsys):
    write_npz(folder / "large.npz", 24)
    refused(arguments(folder, "refused", *semmae(folder), images="large.npz"), capsys, "16 pixels")
    assert not (folder / "refused").exists()


def test_damaged_or_missing_parts_end_in_one_line(folder, tmp_path, capsys):
    net, _, splits = open_run(folder / "semantic", "cpu")
    path = tmp_path / "run" / "parts.pt"
    with pytest.raises(UserError, match="does not exist"):
        read_parts(net.cfg, splits, path, torch.device("cpu"))
    shutil.copytree(folder / "semantic", tmp_path / "run")
    content = torch.load(path, weights_only=True)
    encoder, learner = content["encoder"], content["learner"]
    nan = torch.full_like(learner["pixels.bias"], math.nan)
    changes = [("learner", value) for value in ({}, 3, None, learner | {"pixels.bias": nan})]
    changes += [("encoder", value) for value in (None, [1, 2], encoder | {"cls_token": "x"})]
    shapes = None, [16, 2, 2], [32, 2], [32, 2, 0], [32, 2, 5], ["a", 2, 2], 7, [32, 10**9, 2], [0, 2, 2]
    for name, value in [*changes, *(("encoder_shape", shape) for shape in shapes)]:
        changed = content | {name: value}
        torch.save(changed if value is not None else {key: changed[key] for key in changed if key != name}, path)
        with pytest.raises(UserError, match="parts.pt (does not fit: |is damaged or of another version)"):
            read_parts(net.cfg, splits, path, torch.device("cpu"))
    refused(["show", tmp_path / "run"], capsys, "parts.pt")
    torch.save(torch.load(folder / "mae" / "checkpoint.pt", weights_only=True), path)
    with pytest.raises(UserError, match=f"parts.pt is no file of the kind '{PARTS_FORMAT}'$"):
        read_parts(net.cfg, splits, path, torch.device("cpu"))


def test_a_damaged_run_gives_no_parts(folder, tmp_path):
    net, _, splits = open_run(folder / "semantic", "cpu")
    content = torch.load(folder / "mae" / "checkpoint.pt", weights_only=True)
    for change in (
        {"config": 7},
        {"config": content["config"] | {"depth": 10**9}},
        {"config": content["config"] | {"width": 16}},
        {"data": {}},
        {"model": {}},
        {"model": content["model"] | {"cls_token": content["model"]["cls_token"] * math.inf}},
    ):
        torch.save(content | change, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="bad.pt (does not fit: |is damaged or of another version)"):
            baselines.frozen_encoder(net.cfg, splits, tmp_path / "bad.pt")


def test_an_encoder_of_pixels_normalised_otherwise_sees_the_same(folder, tmp_path, capsys):
    """And where the newest checkpoint of its run is damaged, it is that of the one before."""
    net, _, splits = open_run(folder / "semantic", "cpu")
    content = torch.load(folder / "mae" / "checkpoint.pt", weights_only=True)
    facts, images = content["data"], next(iter(splits.val.ordered(4))).images
    plain = baselines.frozen_encoder(net.cfg, splits, folder / "mae")
    assert all(torch.equal(weight, content["model"][name]) for name, weight in plain.state_dict().items())
    mean, std = ([value + shift for value in facts[name]] for name, shift in (("mean", 0.1), ("std", 0.2)))
    (tmp_path / "other").mkdir()
    torch.save(content | {"data": facts | {"mean": mean, "std": std}}, tmp_path / "other" / "checkpoint.previous.pt")
    (tmp_path / "other" / "checkpoint.pt").write_bytes(b"damaged")
    other = baselines.frozen_encoder(net.cfg, splits, tmp_path / "other")
    assert "checkpoint.previous.pt" in capsys.readouterr().err
    raw = images * torch.tensor(facts["std"])[:, None, None] + torch.tensor(facts["mean"])[:, None, None]
    theirs = (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(other(images), plain(theirs))
        assert not torch.allclose(other(images), plain(images), atol=1e-2)


def test_baselines_that_need_the_whole_batch_say_so(monkeypatch):
    sizes = dict.fromkeys(("width", "decoder_width", "masking_width"), 16)
    sizes |= {"depth": 2, "heads": 2, "batch_size": 12, "labelled_batch_size": 8}
    semantic = SemMAE(parts_from="run", **sizes)
    baselines.check(UMAE(**sizes))
    baselines.check(semantic)
    with pytest.raises(UserError, match="--uniformity .* one process and --accumulate 1"):
        baselines.check(UMAE(**sizes, accumulate=2))
    for module in (mlo_mae, baselines):
        monkeypatch.setattr(module, "world", lambda: 2)
    for cfg, words in ((UMAE(**sizes), "--uniformity"), (semantic, "semmae goes with one process")):
        with pytest.raises(UserError, match=words):
            baselines.check(cfg)
