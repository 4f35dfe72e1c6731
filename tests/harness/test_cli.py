"""The command line: flags of a dataclass, checks of their values, and one line for what the user can mend."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from helpers import SCRIPT, arguments, refused

import mlo_mae
from harness import UserError, cli, printable, processes
from harness.cli import flag


@dataclass(frozen=True)
class Settings:
    kind: Literal["plain", "fancy"] = flag("plain", "what kind")
    name: str = flag("", "of the thing")
    count: int = flag(3, "how many", least=1, most=10, group="numbers")
    share: float = flag(0.5, "of them", above=0, below=1)
    free: float = flag(0.0, "without bounds")
    dry_run: bool = flag(False, "write nothing")


@pytest.mark.parametrize(
    "changes",
    [{}, {"count": 1}, {"count": 10}, {"share": 1e-300}, {"share": 0.999}, {"free": -1e300}, {"free": 7}, {"dry_run": True}],
    ids=str,
)
def test_values_within_their_bounds_pass(changes):
    cli.check(Settings(**changes))


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"kind": "odd"}, "--kind 'odd': choose from plain, fancy"),
        ({"kind": 3}, "--kind 3: choose from plain, fancy"),
        ({"kind": None}, "--kind None: choose from plain, fancy"),
        ({"kind": []}, "--kind []: choose from plain, fancy"),
        ({"name": 3}, "--name 3: must be of type str"),
        ({"count": 0}, "--count 0: must be at least 1 and at most 10"),
        ({"count": 11}, "--count 11: must be at least 1 and at most 10"),
        ({"count": 3.0}, "--count 3.0: must be of type int"),
        ({"count": True}, "--count True: must be of type int"),
        ({"count": "3"}, "--count 3: must be of type int"),
        ({"count": None}, "--count None: must be of type int"),
        ({"count": 10**4000}, "--count 1" + 79 * "0" + ": must be at least 1 and at most 10"),
        ({"share": 0}, "--share 0: must be above 0 and below 1"),
        ({"share": 1.0}, "--share 1.0: must be above 0 and below 1"),
        ({"share": math.nan}, "--share nan: must be finite and above 0 and below 1"),
        ({"share": False}, "--share False: must be of type float"),
        ({"free": math.nan}, "--free nan: must be finite"),
        ({"free": -math.inf}, "--free -inf: must be finite"),
        ({"free": 10**400}, "--free 1" + 79 * "0" + ": must be finite"),
        ({"dry_run": 1}, "--dry-run 1: must be of type bool"),
        ({"dry_run": "x" * 1000}, "--dry-run " + 80 * "x" + ": must be of type bool"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_out_of_its_bounds_names_its_flag(changes, line):
    with pytest.raises(UserError) as caught:
        cli.check(Settings(**changes))
    assert str(caught.value) == line


def test_flags_are_those_of_the_fields():
    parser = cli.Parser(prog="program")
    cli.add_flags(parser, dataclasses.fields(Settings), grouped=True)
    assert vars(parser.parse_args([])) == {}  # what the user leaves out stays out
    argv = "--kind fancy --name x --count 4 --share 0.25 --dry-run".split()
    found = vars(parser.parse_args(argv))
    assert found == {"kind": "fancy", "name": "x", "count": 4, "share": 0.25, "dry_run": True}
    assert vars(parser.parse_args(["--no-dry-run"])) == {"dry_run": False}
    text = parser.format_help()
    defaults = {"kind": "plain", "name": "none", "count": "3", "share": "0.5", "free": "0.0", "dry_run": "off"}
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"{field.metadata['help']} (default {defaults[field.name]})" in text
    options, numbers = text.split("\nnumbers:\n")  # the heading holds for what follows
    assert [f"--{name}" in options.split("options:")[1] for name in ("kind", "name", "count", "free")] == [
        True,
        True,
        False,
        False,
    ]
    assert "--count" in numbers and "--dry-run" in numbers


def test_every_command_is_described():
    text = cli.described_commands()
    found = re.findall(r"^  (\w+) +(\w.{20})", text, re.MULTILINE)
    assert [name for name, _ in found] == cli.commands() and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--count", "many"], ["--count", "many"]),
        (["--kind", "odd"], ["--kind", "odd", "plain", "fancy"]),
        (["--length", "3"], ["--length"]),
        (["extra"], ["extra"]),
        (["--count"], ["--count", "expected one argument"]),
    ],
    ids=str,
)
def test_a_flag_that_is_wrong_points_to_the_help(argv, words):
    parser = cli.Parser(prog="program")
    cli.add_flags(parser, dataclasses.fields(Settings))
    with pytest.raises(UserError) as caught:
        parser.parse_args(argv)
    assert all(word in str(caught.value) for word in [*words, "see program --help"]), caught.value


def failing(error):
    def work(*_):
        raise error

    return work


def test_what_work_returns_is_one_line_of_json(capsys):
    assert cli.reported("program", lambda: {"command": "try", "loss": 0.5}) == 0
    assert json.loads(capsys.readouterr().out) == {"command": "try", "loss": 0.5}
    assert cli.reported("program", lambda: None) == 0 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("--count 0: must be at least 1"), "program: --count 0: must be at least 1"),
        (UserError("two\nlines\x1b[2J"), "program: two?lines?[2J"),
        (torch.OutOfMemoryError("2 GiB of 1 GiB.\nmore"), f"program: out of memory (2 GiB of 1 GiB); {cli.MORE_MEMORY}"),
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 8 GB, max allowed: 9 GB). Tried to allocate 2 GB."),
            "program: out of memory (MPS backend out of memory (MPS allocated: 8 GB, max allowed: 9 GB). "
            f"Tried to allocate 2 GB); {cli.MORE_MEMORY}",
        ),
        (MemoryError(), f"program: out of memory; {cli.MORE_MEMORY}"),
        (MemoryError("Unable to allocate 3. GiB"), f"program: out of memory (Unable to allocate 3. GiB); {cli.MORE_MEMORY}"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "program: No such file or directory: a/b"),
        (PermissionError(13, "Permission denied", "a\nb"), "program: Permission denied: a?b"),
        (OSError("socket is closed"), "program: socket is closed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_user_can_mend_is_one_line_and_status_2(capsys, error, line):
    assert cli.reported("program", failing(error)) == 2
    printed = capsys.readouterr()
    assert printed.err == line + "\n" and printed.out == ""


def test_a_cpu_out_of_memory_is_one_line(capsys):
    assert cli.reported("program", lambda: torch.empty(2**55)) == 2
    told = capsys.readouterr().err
    assert told.startswith("program: out of memory (") and "allocate" in told and told.endswith(f"; {cli.MORE_MEMORY}\n")
    assert "alloc_cpu" not in told and told.count("\n") == 1


@pytest.mark.parametrize("name", ["pretrain", *cli.commands()])
def test_a_remedy_names_flags_that_the_program_has(monkeypatch, capsys, name):
    """And the sizes that a program takes are among them."""
    module = mlo_mae if name == "pretrain" else cli.command(name)
    words = {"baselines": ["u-mae"], "transfer": ["segment"]}.get(name, [])
    with pytest.raises(SystemExit):
        mlo_mae.main([name, *words, "--help"])
    has = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    work = {"pretrain": "pretrain", "published": "train"}.get(name, "run_command")
    monkeypatch.setattr(module, work, failing(MemoryError()))
    assert mlo_mae.main([name]) == 2
    told = capsys.readouterr().err
    sizes = {"--batch-size", "--labelled-batch-size", "--patch-size", "--image-size", "--accumulate"}
    assert "out of memory" in told and set(re.findall(r"--[a-z-]+", told)) == sizes & has


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["WORLD_SIZE is 2", "MASTER_ADDR and MASTER_PORT absent", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here"}, ["WORLD_SIZE is 2", "but MASTER_PORT absent"]),
        ({"WORLD_SIZE": "many"}, ["WORLD_SIZE is 'many'", "unset it"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE is '0'", "at least 1"]),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, ["RANK is '-1'"]),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, ["RANK is 2, but WORLD_SIZE is 2"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "http"}, ["MASTER_PORT is 'http'"]),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "x"}, ["LOCAL_RANK is 'x'"]),
    ],
)
@pytest.mark.parametrize("command", [["--epochs", "1"], ["show", "RUN"]], ids=["pretrain", "show"])
def test_an_environment_that_is_not_torchruns_is_one_line(monkeypatch, capsys, variables, words, command):
    for name in (*processes.NUMBERS, "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(command, capsys, *words)


def test_variables_that_are_empty_are_absent(monkeypatch):
    for name in (*processes.NUMBERS, "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
    assert processes.started() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # of a batch system; without a rank this is one process of its own
    assert processes.started() == 1


@pytest.mark.parametrize("count", ["", "1"])
def test_one_process_does_not_read_the_others_variables(monkeypatch, count):
    for name, value in {"WORLD_SIZE": count, "RANK": "0", "MASTER_PORT": "tcp://10.0.0.1:80"}.items():
        monkeypatch.setenv(name, value)
    assert processes.started() == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), SystemExit(130)], ids=repr)
def test_a_bug_is_not_hidden(error):
    with pytest.raises(type(error)):
        cli.reported("program", failing(error))


def test_ctrl_c_outside_of_a_loop_is_one_line(capsys):
    assert cli.reported("program", failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "program: interrupted; what was written before is whole\n")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_a_loop_is_one_line_and_no_process_is_left(capsys, number):
    heeding, deaf = (multiprocessing.get_context("fork").Process(target=sleep, args=(how,)) for how in (False, True))

    def work():
        for process in (heeding, deaf):
            process.start()
        time.sleep(0.2)
        signal.raise_signal(number)

    before, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    assert cli.reported("program", work) == 128 + number
    assert time.monotonic() - began < 2 and not heeding.is_alive()
    deaf.join(1)
    assert not deaf.is_alive() and signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr() == ("", "program: interrupted; what was written before is whole\n")


def sleep(deaf):  # a process's work
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else signal.SIG_DFL)
    time.sleep(20)


def test_a_setting_is_named_as_a_command_line_gives_it():
    for value, words in ((True, "--dry-run"), (False, "--no-dry-run"), (3, "--dry-run 3"), ("a", "--dry-run a")):
        assert cli.given_as("dry_run", value) == words


def test_what_is_printed_cannot_steer_a_terminal():
    assert printable("a\x1b]0;b\x07\u202ec\n") == "a?]0;b??c?" and len(printable("x" * 10**6)) == 600
    assert str(UserError("a\r\x9bb" + "x" * 1000)).startswith("a??bx") and len(str(UserError("x" * 1000))) == 600


def test_the_device_is_cuda_else_mps_else_cpu(monkeypatch):
    for cuda, mps, chosen in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=cuda: here)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda here=mps: here)
        assert cli.choose_device("auto").type == chosen
    for name in ("mps", "cpu:x", "cpu:", "cpu:1", "cuda:", "gpu", "meta", "", "cuda:0"):
        with pytest.raises(UserError, match=f"--device {name} is not available here; this machine has: cpu$"):
            cli.choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert cli.choose_device("cuda:1").index == 1 and cli.choose_device("cpu:0").type == "cpu"
    assert chosen == [torch.device("cuda:1")]  # the current one, where streams, graphs and Triton's kernels go
    with pytest.raises(UserError, match=r"--device cuda:2 is not available here; this machine has: cpu, cuda \(0 to 1\)"):
        cli.choose_device("cuda:2")


def test_several_processes_have_a_gpu_each_or_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert cli.choose_device("cuda:1").index == 1
    monkeypatch.setattr(cli, "world", lambda: 2)
    assert cli.choose_device("cuda").type == "cuda" and cli.choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device cuda:1 does not go with several processes; choose cpu or cuda"):
        cli.choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cli.choose_device("auto").type == "cpu"  # which several processes can share


def test_the_device_is_that_of_the_run_that_goes_on(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"device": "cpu"}))
    assert cli.device_in(["--out", str(tmp_path), "--resume"]) == "cpu" and cli.device_in(["--out", str(tmp_path)]) is None
    assert cli.device_in(["--device=cuda", "--out", str(tmp_path), "--resume"]) == "cuda"
    for content in ("{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        assert cli.device_in(["--out", str(tmp_path), "--resume"]) is None


def test_flags_have_one_name_and_folders_a_name(capsys):
    refused(["pretrain", "--dev", "cpu"], capsys, "--dev")
    for words in (["pretrain", "--out", "", "--resume"], ["finetune", "RUN", "--out", ""]):
        refused(words, capsys, "--out", "it is empty; name a folder")


def test_a_report_outlives_an_encoding_that_lacks_its_characters():
    code = "from harness import cli; raise SystemExit(cli.reported('program', lambda: print('\u00b1 \u30c7')))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    root = os.path.dirname(SCRIPT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (0, "\\xb1 \\u30c7\n"), done.stderr


def test_kernels_that_there_are_not_are_one_line():
    run = [sys.executable, SCRIPT, "--epochs", "1", "--out", "nowhere"]
    done = subprocess.run(run, env=os.environ | {"MLO_MAE_KERNELS": "fast"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    line = "mlo_mae: environment variable MLO_MAE_KERNELS: 'fast' is not one of auto, triton, reference\n"
    assert done.stderr.endswith(line) and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------- the program's own flags


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--patch-size", "5"], ["16 pixels", "patches of 5"]),
        (["--width", "18", "--heads", "4"], ["--width 18", "4 heads"]),
        (["--width", "6", "--heads", "2"], ["--width 6", "multiple of 4"]),
        (["--decoder-width", "12", "--decoder-heads", "5"], ["--decoder-width 12", "5 heads"]),
        (["--mask-ratio", "1.5"], ["--mask-ratio 1.5: must be above 0 and below 1"]),
        (["--mask-ratio", "0.999"], ["--mask-ratio 0.999", "16 patches"]),
        (["--batch-size", "0"], ["--batch-size 0: must be at least 1"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--lr", "nan"], ["--lr nan: must be finite and at least 0"]),
        (["--masking", "semantic?"], ["--masking", "learned", "random"]),
        (["--preset", "cifar1000"], ["--preset", "cifar100"]),
        (["--learning-rate", "1"], ["--learning-rate"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--redraw-dropout"], ["--redraw-dropout"]),
        (["--hypergradient", "finite-difference"], ["--hypergradient", "exact", "unrolled", "first-order"]),
        (["--mask-choice", "highest"], ["--mask-choice highest", "--masking-network mlp"]),
        (["--masking-network", "shared", "--mask-choice", "highest"], ["--mask-choice highest", "--masking-network mlp"]),
        (["--mask-choice", "lowest"], ["--mask-choice", "random", "odds", "highest"]),
        (["--mask-noise", "1"], ["--mask-noise"]),
        (["--mask-until", "0"], ["--mask-until 0.0: must be at most 1 and above 0"]),
        (["--mask-until", "1.5"], ["--mask-until 1.5: must be at most 1 and above 0"]),
        (["--mask-start", "0.5", "--mask-until", "0.4"], ["--mask-start 0.5 must be below --mask-until 0.4"]),
        (["--mask-start", "0.5", "--mask-until", "0.5"], ["--mask-start 0.5 must be below --mask-until 0.5"]),
        (["--mask-start", "0.9", "--mask-until", "0.95", "--epochs", "4"], ["T would learn in none of 6 mask updates"]),
        (["--mask-batches", "2", "--unroll", "full"], ["--unroll full", "--mask-batches 1, not 2"]),
        (["--labelled-batch-size", "1"], ["--labelled-batch-size 1", "give 2 or more"]),
        (["--labelled-batch-size", "1", "--level2", "steps", "--head-norm", "batch"], ["--labelled-batch-size 1"]),
        (["--mask-batches", "0"], ["--mask-batches 0: must be at least 1"]),
        (["--masking-learns"], ["--masking-learns", "--masking-from"]),
        (["--masking-from", "RUN", "--masking", "random"], ["--masking-from", "--masking learned"]),
        (["--masking-from", "RUN", "--masking-network", "mlp"], ["--masking-from", "tokens"]),
        (["--masking-from", "no/such"], ["no/such", "does not exist"]),
        (["--ridge", "0"], ["--ridge 0.0: must be above 0"]),
        (["--warmup", "1"], ["--warmup 1.0: must be at least 0 and below 1"]),
        (["--level2", "exact"], ["--level2", "ridge", "steps"]),
        (["--pooling", "max"], ["--pooling", "mean", "cls"]),
        (["--masking-blocks", "-1"], ["--masking-blocks -1: must be at least 0"]),
        (["--mask-start", "1"], ["--mask-start 1.0: must be at least 0 and below 1"]),
        (["--hypergradient", "unrolled", "--accumulate", "2"], ["--hypergradient unrolled", "--accumulate 1"]),
        (
            ["--checkpoint-activations", "--unroll", "full", "--mask-batches", "1"],
            ["--checkpoint-activations", "--unroll last"],
        ),
        (["--checkpoint-activations", "--hypergradient", "unrolled"], ["--checkpoint-activations", "exact"]),
        (["--accumulate", "3"], ["--batch-size 16", "multiple of 3"]),
        (["--data", "no/such.npz"], ["no/such.npz"]),
        (["--images", "100000"], ["100000"]),
    ],
    ids=" ".join,
)
def test_bad_flags_end_in_one_line(sides, tmp_path, capsys, flags, words):
    refused(arguments(sides, tmp_path / "bad", *flags), capsys, *words)
    assert not (tmp_path / "bad").exists()  # so the mended command finds nothing in its way


@pytest.mark.parametrize(
    "settings",
    [
        {"masking": "random", "hypergradient": "unrolled", "accumulate": 2},
        {"masking": "random", "checkpoint_activations": True, "unroll": "full"},
        {"masking": "random", "mask_until": 0.1},
        {"masking_from": "a run", "mask_until": 0.1},
        {"masking_from": "a run", "mask_choice": "highest"},
        {"masking_from": "a run", "labelled_batch_size": 1},
    ],
    ids=str,
)
def test_what_a_run_without_levels_2_and_3_does_not_use_is_not_refused(settings):
    mlo_mae.check(mlo_mae.Config(**settings))


def test_every_field_has_a_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        mlo_mae.main(["pretrain", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(mlo_mae.Config):
        assert cli.flag_name(field.name) in text and field.metadata["help"] in text, field.name


def test_a_command_is_found_by_its_name(capsys, monkeypatch):
    monkeypatch.setattr(cli.command("probe"), "main", lambda argv: print(argv) or 7)
    assert mlo_mae.main(["probe", "RUN", "--recipe", "mae"]) == 7
    assert capsys.readouterr().out == "['RUN', '--recipe', 'mae']\n"
    assert {"probe", "show"} <= set(cli.commands()) and not any(name.startswith("_") for name in cli.commands())
    refused(["prbe"], capsys, "prbe is no command", "pretrain", "probe", "show")
    refused(["../probe"], capsys, "is no command")
    refused(["__init__"], capsys, "is no command")


def test_several_processes_are_for_pretraining(capsys, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "join", lambda gpu: None)
    refused(["probe", "RUN"], capsys, "probe runs as one process; start it without torchrun")


@pytest.mark.slow
def test_the_script_ends_with_its_status_and_one_line(tmp_path):
    def script(*argv):
        return subprocess.run([sys.executable, SCRIPT, *argv], capture_output=True, text=True, cwd=tmp_path, env=os.environ)

    ended = script("--lr", "-1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "mlo_mae: --lr -1.0: must be at least 0\n"
    ended = script("--help")
    assert ended.returncode == 0 and "--mask-choice" in ended.stdout and "probe" in ended.stdout
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- what people see


@pytest.mark.parametrize(
    "typed, words",
    [
        (["pretrain", "--eopchs", "3"], "unrecognized arguments: --eopchs 3; did you mean --epochs? see"),
        (["pretrain", "--masking-netwrok", "mlp"], "did you mean --masking-network?"),
        (["finetune", "RUN", "--layer-decy", "0.5"], "did you mean --layer-decay?"),
        (["pretrain", "--zzzzqqqq"], "unrecognized arguments: --zzzzqqqq; see"),
        (["pretrian"], "pretrian is no command; did you mean pretrain? choose from"),
        (["xyz"], "xyz is no command; choose from"),
    ],
)
def test_the_nearest_is_named(capsys, typed, words):
    assert words in refused(typed, capsys)


REPORT = {
    **{"command": "probe", "pictures": ["a.png", "b.png"], "probe": {"test_accuracy": 0.92612, "weight_decay": 1e-4}},
    **{"updates": 225, "object_auc": 0.94512, "rows": [{"a": 1}], "from_scratch": False, "p_mean": 0.2, "seconds": 150.2},
}
LINES = """pictures                    a.png, b.png
probe: test accuracy        92.6 %
probe: weight decay         0.0001
updates                     225
object auc                  0.9451   (chance: 0.5)
from scratch                False
time                        2.5 minutes
"""


@pytest.mark.parametrize("terminal, flags, people", [(True, [], True), (True, ["--json"], False), (False, [], False)])
def test_a_report_is_for_who_reads_it(capsys, monkeypatch, terminal, flags, people):
    """Lines on a terminal; for programs, or where asked for, one line of JSON, which has all."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    parser = cli.Parser(prog="x")

    def work():
        parser.parse_args(flags)
        return REPORT

    for _ in range(2):  # what one command asks for, the next does not
        assert cli.reported("x", work) == 0
        printed = capsys.readouterr().out
        assert printed == LINES if people else json.loads(printed) == REPORT and printed.count("\n") == 1
        assert cli.reported("x", lambda: REPORT) == 0
        assert (capsys.readouterr().out == LINES) == terminal


def test_what_was_said_may_be_all(capsys):
    parser = cli.Parser(prog="x")
    cli.add_dry_run(parser)

    def work(flags):
        parser.parse_args(flags)
        cli.announce({"model": "a line", "time": "another"})
        return {"done": True}

    assert cli.reported("x", lambda: work(["--dry-run"])) == 0
    assert capsys.readouterr() == ("", "model: a line\ntime: another\n")
    assert cli.reported("x", lambda: work([])) == 0
    assert capsys.readouterr() == ('{"done":true}\n', "model: a line\ntime: another\n")


def test_durations():
    for seconds, words in (
        *((0.1, "1 second"), (1.4, "1 second"), (89, "89 seconds"), (90, "1.5 minutes"), (569, "9.5 minutes")),
        *((600, "10 minutes"), (5399, "90 minutes"), (5400, "1.5 hours"), (36000, "10 hours"), (130000, "1.5 days")),
        (864000, "10 days"),
    ):
        assert cli.duration(seconds) == words


def test_a_value_among_flags():
    for words, value in (
        *((["--preset", "a"], "a"), (["--preset=a", "--lr", "1"], "a"), (["--lr", "1"], None), (["--preset"], "")),
        *((["--preset", "a", "--preset", "b"], "b"), (["--preset=a=b"], "a=b")),
    ):
        assert cli.value_in(words, "--preset") == value
