"""The T of another run (--masking-from): what it sees, that a run keeps it, and what cannot be used."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this file is a script as well
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import (
    arguments,
    checkpoint_of,
    copied,
    finished_run,
    memory_is_bounded,
    refused,
    same,
    stopped,
    weights,
    write_npz,
    write_sides,
)

import mlo_mae
from experiments import open_run
from harness.files import read_rows
from harness.run import read_metrics
from mlo_mae import main

pytestmark = pytest.mark.usefixtures("bare_runs")


def begun_from(source, *more):
    """Flags of a run under the T of another."""
    return ["--masking-from", source, *more]


@pytest.fixture(scope="module")
def source(sides, tmp_path_factory):
    """A run whose T stays as it is from update 5 of 15 on, and so does what it reads."""
    return finished_run(sides, tmp_path_factory.mktemp("source") / "run", "--epochs", 10, "--mask-until", 0.3)


@pytest.fixture(scope="module")
def follower(source, sides, tmp_path_factory):
    """A run under that T."""
    more = ["--epochs", 10, "--lr", 0.001, *begun_from(source)]
    return finished_run(sides, tmp_path_factory.mktemp("follower") / "run", *more)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Other images than the runs' above, darker and redder."""
    path = tmp_path_factory.mktemp("data") / "other.npz"
    arrays = dict(np.load(write_sides(path, (("train", 48), ("test", 9)))))
    for name in ("train_images", "test_images"):
        arrays[name] = (arrays[name] * np.array([0.8, 0.5, 0.3])).astype(np.uint8)
    np.savez(path, **arrays)
    return path


def p_of(run, images):
    net, state, _ = open_run(run, "cpu")
    return mlo_mae.masking_probability(net, state.psi.params, images, mlo_mae.eyes_of(net, state)).detach()


# ------------------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("kept", [True, False])
def test_a_t_that_is_given_weighs_as_in_its_run_and_does_not_change(source, whole_run, follower, sides, tmp_path, kept):
    """A run whose T still reads the encoder that learns gives that encoder as it was at its end."""
    given, run = (source, follower) if kept else (whole_run[0], tmp_path / "run")
    assert kept or main(arguments(sides, run, "--epochs", 10, "--lr", 0.001, *begun_from(given))) == 0
    assert ("weights" in checkpoint_of(given)["eyes"]) == kept
    images = open_run(given, "cpu")[2].watched(30)[0]
    p = p_of(given, images)
    assert torch.equal(p_of(run, images), p) and p.std(1).min() > 1e-3
    content = checkpoint_of(run)
    assert same(content["masking"], checkpoint_of(given)["masking"])
    assert content["moments"]["masking"]["t"] == content["moments"]["head"]["t"] == 0
    rows = read_metrics(run / "metrics.jsonl")
    assert all("level3_loss" not in row and row["p_mean"] < 1 for row in rows)
    assert all(row["level1_loss"] < row["reconstruction_error"] for row in rows)  # it weighs from the first step on
    assert checkpoint_of(run)["config"]["mask_restart"] and content["moments"]["model"]["t"] == 30


def test_a_t_that_is_given_does_not_have_to_learn(source, sides, tmp_path):
    """Two updates: too few for T's part of a run."""
    assert main(arguments(sides, tmp_path / "run", "--epochs", 1, "--mask-start", 0.8, *begun_from(source))) == 0
    assert same(checkpoint_of(tmp_path / "run")["masking"], checkpoint_of(source)["masking"])


def test_weights_go_with_the_images(source, sides, tmp_path, monkeypatch):
    """Maps that are the images' own brightness, in a run of three parts and in one whose T is given, begun or resumed."""
    seen, real, step = [], mlo_mae.data.Images.accompanied, mlo_mae.level1_step

    def brightness(net, state, images):
        return real(images, images.images.float().mean(1) / 255)

    def watched(net, theta, psi, images, *rest, known=None, **how):
        mean, std = (torch.tensor(colour)[:, None, None] for colour in (splits.mean, splits.std))
        shown = F.avg_pool2d((images * std + mean).mean(1), net.cfg.patch_size).flatten(1)
        seen.append(None if known is None else (known - shown).abs().max().item())
        return step(net, theta, psi, images, *rest, known=known, **how)

    splits = open_run(source, "cpu")[2]
    monkeypatch.setattr(mlo_mae, "weight_maps", brightness)
    monkeypatch.setattr(mlo_mae, "level1_step", watched)
    assert main(arguments(sides, tmp_path / "own", "--epochs", 10, "--mask-until", 0.4)) == 0
    assert [gap is None for gap in seen] == [True] * 12 + [False] * 18 and max(seen[12:]) < 1e-3
    seen.clear()
    flags = ["--epochs", 10, *begun_from(source)]
    at = stopped(sides, tmp_path / "given", monkeypatch, 2, *flags)["iteration"]
    assert main(arguments(sides, tmp_path / "given", *flags, "--resume")) == 0
    assert 0 < at < 15 and len(seen) == 30 and max(seen) < 1e-3
    seen.clear()
    flags = ["--masking-learns", "--mask-start", 0.2, "--mask-until", 0.6]
    assert main(arguments(sides, tmp_path / "learns", "--epochs", 10, *begun_from(source), *flags)) == 0
    assert [gap is None for gap in seen] == [True] * 18 + [False] * 12


def test_a_t_that_is_given_may_learn_further(source, sides, tmp_path):
    flags = ["--epochs", 10, *begun_from(source, "--masking-learns", "--mask-start", 0.2, "--mask-until", 0.6)]
    assert main(arguments(sides, tmp_path / "run", *flags)) == 0
    ours, theirs = checkpoint_of(tmp_path / "run"), checkpoint_of(source)
    assert ours["moments"]["masking"]["t"] == ours["moments"]["head"]["t"] == 6  # updates 4 to 9 of 15
    assert not same(ours["masking"], theirs["masking"]) and same(ours["eyes"]["weights"], theirs["eyes"]["weights"])
    recorded = {row["iteration"]: row["p"] for row in read_rows(tmp_path / "run" / "masks.jsonl")}
    assert list(recorded) == [4, 5, 6, 7, 8, 9] and recorded[4] != recorded[9]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(row["p_mean"] < 1 and ("level3_loss" in row) == (3 < row["iteration"] <= 10) for row in rows)


@pytest.mark.parametrize(
    "flags, patches",
    [
        (["--width", 24, "--heads", 3, "--depth", 2, "--masking-blocks", 0], 16),
        (["--patch-size", 2, "--batch-size", 8], 64),
        (["--image-size", 32], 64),
        (["--image-size", 32, "--patch-size", 8], 16),
        (["--decoder-width", 16, "--level2", "steps", "--pooling", "cls"], 16),
    ],
    ids=lambda flags: " ".join(map(str, flags)) if isinstance(flags, list) else "",
)
def test_a_t_serves_runs_of_other_sizes_and_other_images(source, other, tmp_path, flags, patches):
    assert main(arguments(other, tmp_path / "run", "--epochs", 2, *flags, *begun_from(source))) == 0
    net, state, splits = open_run(tmp_path / "run", "cpu")
    given, its_state, its_splits = open_run(source, "cpu")
    assert torch.equal(state.eyes, its_state.eyes) and torch.equal(state.psi.params, its_state.psi.params)
    images = splits.watched(9)[0]
    p = mlo_mae.masking_probability(net, state.psi.params, images, state.eyes)
    assert p.shape == (9, patches) and p.std(1).min() > 1e-3
    (mean, std), (its_mean, its_std) = (
        [torch.tensor(values)[:, None, None] for values in (each.mean, each.std)] for each in (splits, its_splits)
    )
    there = (images * std + mean - its_mean) / its_std  # the pixels as its run has them
    assert (there - images).abs().mean() > 0.1
    if (net.patches, images.shape[-1]) == (given.patches, 16):
        expected = mlo_mae.masking_probability(given, its_state.psi.params, there, its_state.eyes)
        assert torch.allclose(p, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------- resumed and handed on


@pytest.mark.parametrize(
    "learns", [[], ["--masking-learns", "--mask-start", 0.2, "--mask-until", 0.6]], ids=["kept", "learns"]
)
def test_a_run_needs_the_other_no_more_once_it_has_begun(source, sides, tmp_path, monkeypatch, learns):
    given = copied(source, tmp_path / "given")
    flags = ["--epochs", 10, "--seed", 3, *begun_from(given, *learns)]
    assert main(arguments(sides, tmp_path / "whole", *flags)) == 0
    content = stopped(sides, tmp_path / "cut", monkeypatch, 2, *flags)
    assert content["iteration"] == 5
    for path in given.iterdir():
        path.unlink()
    given.rmdir()
    assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    ours, theirs = (checkpoint_of(tmp_path / name)["eyes"] for name in ("cut", "whole"))
    assert same(ours["weights"], theirs["weights"]) and ours["facts"] == theirs["facts"]
    assert p_of(tmp_path / "cut", torch.zeros(2, 3, 16, 16)).shape == (2, 16)


def test_a_t_is_handed_on(source, follower, sides, tmp_path):
    """From a run that has it from another, whose own encoder has another width."""
    third = tmp_path / "third"
    sizes = ["--width", 24, "--heads", 3, "--depth", 2]
    assert main(arguments(sides, tmp_path / "second", "--epochs", 1, *sizes, *begun_from(follower))) == 0
    assert main(arguments(sides, third, "--epochs", 1, *begun_from(tmp_path / "second"))) == 0
    images = torch.randn(5, 3, 16, 16)
    assert torch.equal(p_of(third, images), p_of(source, images))
    assert checkpoint_of(third)["eyes"]["facts"] == checkpoint_of(source)["eyes"]["facts"]


# ------------------------------------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--masking", "random"], "take a run with"),
        (["--masking-network", "mlp"], "take a run with --masking-network tokens"),
        (["--masking-network", "shared"], "take a run with --masking-network tokens"),
    ],
    ids=["random", "mlp", "shared"],
)
def test_runs_that_have_no_such_t_are_refused(sides, tmp_path, capsys, flags, words):
    assert main(arguments(sides, tmp_path / "given", "--epochs", 1, *flags)) == 0
    refused(arguments(sides, tmp_path / "out", *begun_from(tmp_path / "given")), capsys, "given", words)
    assert not (tmp_path / "out").exists()


def test_a_t_that_has_not_learned_is_refused(source, sides, tmp_path, capsys):
    """All patches would count alike: MAE, without a word."""
    shutil.copytree(source, tmp_path / "given")
    content = checkpoint_of(tmp_path / "given")
    content["masking"] = {name: 0 * weight for name, weight in content["masking"].items()}
    torch.save(content, tmp_path / "given" / "checkpoint.pt")
    refused(arguments(sides, tmp_path / "out", *begun_from(tmp_path / "given")), capsys, "its T has not learned")
    assert not (tmp_path / "out").exists()
    choose = ["--masking-learns", "--mask-choice", "highest"]  # the same patches of every image, until it moves
    refused(arguments(sides, tmp_path / "out", *begun_from(tmp_path / "given"), *choose), capsys, "its T has not learned")
    further = arguments(sides, tmp_path / "further", *begun_from(tmp_path / "given"), "--masking-learns", "--epochs", 1)
    assert main(further) == 0


@pytest.mark.parametrize(
    "name, words", [("absent", "does not exist"), ("empty", "does not exist"), ("text", "cannot be read")]
)
def test_what_is_no_run_is_refused(sides, tmp_path, capsys, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "checkpoint.pt").write_text("not a checkpoint")
    refused(arguments(sides, tmp_path / "out", *begun_from(tmp_path / name)), capsys, tmp_path / name, words)
    assert not (tmp_path / "out").exists()


def test_images_of_other_channels_are_refused(source, tmp_path, capsys):
    grey = write_npz(tmp_path / "grey.npz", 40, 16, colour=False)
    refused(arguments(grey, tmp_path / "out", *begun_from(source)), capsys, "3 channels", "these have 1")
    assert not (tmp_path / "out").exists()


def test_another_t_is_not_taken_up_when_a_run_is_resumed(source, follower, whole_run, capsys):
    argv = ["pretrain", "--out", follower, "--resume", "--masking-from", whole_run[0]]
    refused(argv, capsys, f"--masking-from {source}, not {whole_run[0]}")


FACTS = {  # what may stand in a damaged file
    "width absent": {"width": None},
    "width absurd": {"width": 2**40},
    "width of a page": {"width": 2**30},
    "width no multiple": {"width": 18},
    "width no number": {"width": "16"},
    "depth absurd": {"depth": 2**40},
    "depth 0": {"depth": 0},
    "heads 0": {"heads": 0},
    "heads 3": {"heads": 3},
    "patch size 0": {"patch_size": 0},
    "patch size 3": {"patch_size": 3},
    "patch size absurd": {"patch_size": 2**40, "image_size": 2**40},
    "image size absurd": {"image_size": 2**40},
    "image size large": {"image_size": 2**18},
    "channels absurd": {"channels": 2**40},
    "channels a tensor": {"channels": torch.ones(3)},
    "blocks no number": {"masking_blocks": "two"},
    "blocks below 0": {"masking_blocks": -1},
    "blocks absent": {"masking_blocks": None},
    "no mean": {"mean": []},
    "mean of words": {"mean": ["a", "b", "c"]},
    "two means": {"mean": [0.5, 0.5]},
    "mean not finite": {"mean": [0.5, 0.5, float("nan")]},
    "deviation 0": {"std": [0.0, 0.0, 0.0]},
    "deviation below 0": {"std": [-1.0, 0.5, 0.5]},
    "deviation not finite": {"std": [0.5, 0.5, float("inf")]},
}


def damaged(content, kind):
    """The content of a checkpoint with other "eyes"."""
    eyes = {"facts": dict(content["eyes"]["facts"]), "weights": dict(content["eyes"]["weights"])}
    table = eyes["weights"]["pos_embed"]
    if kind in FACTS:
        eyes["facts"] = {name: value for name, value in (eyes["facts"] | FACTS[kind]).items() if value is not None}
    match kind:
        case "absent":
            return {name: value for name, value in content.items() if name != "eyes"}
        case "nothing":
            eyes = None
        case "a list":
            eyes = [1]
        case "facts absent":
            del eyes["facts"]
        case "facts a list":
            eyes["facts"] = [1]
        case "no weights":
            eyes["weights"] = {}
        case "weights nothing":
            eyes["weights"] = None
        case "weights a list":
            eyes["weights"] = [1]
        case "weight absent":
            del eyes["weights"]["cls_token"]
        case "weight too many":
            eyes["weights"]["more"] = torch.ones(1)
        case "weight of another shape":
            eyes["weights"]["cls_token"] = torch.ones(1, 1, 24)
        case "weight not finite":
            eyes["weights"]["cls_token"] = torch.full((1, 1, 16), torch.nan)
        case "weight of no bytes":  # and of images that size
            side = 2**14
            eyes["facts"] |= {"image_size": 4 * side}
            eyes["weights"]["pos_embed"] = table[:, :1].expand(1, 1 + side**2, -1)
    return content | {"eyes": eyes}


OTHERS = ["absent", "nothing", "a list", "facts absent", "facts a list", "no weights", "weights a list", "weight absent"]
OTHERS += ["weights nothing", "weight too many", "weight of another shape", "weight not finite", "weight of no bytes"]


def hostile(folder):
    """Each kind of damage in each place where a T is read from: [kind, command, status, stderr, whether a folder was made], a
    line each as it goes."""

    class Late(BaseException):
        pass

    def ring(number, frame):
        raise Late

    signal.signal(signal.SIGALRM, ring)
    content = {name: torch.load(folder / name / "checkpoint.pt", weights_only=True) for name in ("source", "follower")}
    for kind in [*FACTS, *OTHERS]:
        for name in content:
            torch.save(damaged(content[name], kind), folder / name / "checkpoint.pt")
        commands = {
            "--masking-from": arguments(folder / "sides.npz", folder / "out", *begun_from(folder / "source")),
            "--resume": ["pretrain", "--out", str(folder / "follower"), "--resume"],
            "probe": ["probe", str(folder / "follower")],
        }
        for name, argv in commands.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            err = io.StringIO()
            signal.alarm(10)
            try:
                with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                    status = main(argv)
                memory_is_bounded()
            except BaseException as error:
                status = repr(error)[:300]
            signal.alarm(0)
            print(json.dumps([kind, name, status, err.getvalue(), (folder / "out").exists()]), flush=True)


if __name__ == "__main__":
    hostile(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def outcomes(source, follower, sides, tmp_path_factory):
    """{(kind, command): (status, stderr, whether a folder was made)}, of a process of its own, which may be killed."""
    folder = tmp_path_factory.mktemp("hostile")
    for run, name in ((source, "source"), (follower, "follower")):
        copied(run, folder / name)
    (folder / "sides.npz").write_bytes(sides.read_bytes())
    limited = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30,) * 2); import runpy, sys; "
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", limited, __file__, folder], capture_output=True, text=True, timeout=500)
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    return {(kind, name): rest for kind, name, *rest in rows}, ended.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits")
@pytest.mark.parametrize("command", ["--masking-from", "--resume", "probe"])
@pytest.mark.parametrize("kind", [*FACTS, *OTHERS])
def test_damaged_eyes_are_one_line(outcomes, kind, command):
    if (kind, command) == ("weights nothing", "--masking-from"):
        pytest.skip("a run whose T reads the encoder that learns has none")
    found, err = outcomes
    assert (kind, command) in found, err
    status, err, made = found[kind, command]
    lines = [line for line in err.splitlines() if line.startswith("mlo_mae: ")]
    assert (status, len(lines), made) == (2, 1, False), (status, err)
    assert "checkpoint.pt" in lines[0] and "allocate" not in lines[0]
