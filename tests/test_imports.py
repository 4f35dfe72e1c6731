"""Who imports whom. One rule keeps the method readable: experiments > bench > mlo_mae > harness, data and kernels; nothing
imports upward, and nothing is imported inside a function but what may not be installed."""

import ast
import graphlib
import importlib
import itertools
import os
import subprocess
import sys

import pytest
from helpers import SCRIPT

from harness import cli

ROOT = SCRIPT.parent
LAYERS = [{"harness", "data", "kernels"}, {"mlo_mae"}, {"bench"}, {"experiments"}]  # from below; those of one may meet
OPTIONAL = {"matplotlib", "timm", "betty", "pycocotools", "triton", "tensorboard", "resource"}  # packages; Windows lacks one
PROGRAMS = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))


def name_of(path):
    """harness/run.py -> harness.run, kernels/__init__.py -> kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = [*ROOT.glob("*.py"), *(path for room in ("harness", "kernels", "experiments") for path in (ROOT / room).rglob("*.py"))]
FILES = {name_of(path): path for path in PATHS}
TESTS = {name_of(path): path for path in (ROOT / "tests").rglob("*.py")}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in (FILES | TESTS).items()}


def imported(node, module, is_package):
    """The full names that an import statement of a module names; "x.y" for `from x import y`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = module.split(".") if is_package else module.split(".")[:-1]
    base = package[: len(package) + 1 - node.level] if node.level else []
    base = ".".join([*base, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def imports_of(module, known):
    """{name as in `imported`: the module of `known` that it is in, or None}, wherever in the file the import stands."""
    is_package = (FILES | TESTS)[module].name == "__init__.py"
    found = {}
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in imported(node, module, is_package):
                prefixes = (".".join(name.split(".")[:n]) for n in range(name.count(".") + 1, 0, -1))
                found[name] = next((prefix for prefix in prefixes if prefix in known), None)
    return found


def layer_of(module):
    return next((number for number, names in enumerate(LAYERS) if module.split(".")[0] in names), None)


def test_every_file_has_its_place():
    assert {name.split(".")[0] for name in FILES} == set().union(*LAYERS)
    assert {"harness.run", "kernels.attention", "experiments.probe", "mlo_mae", "data"} <= set(FILES)


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_upward(module):
    upward = {name for name, other in imports_of(module, FILES).items() if other and layer_of(other) > layer_of(module)}
    assert not upward, f"{module} imports {upward}, which stand above it"
    tests = {name for name in imports_of(module, TESTS) if name.split(".")[0] in ("tests", "helpers", "conftest", "pytest")}
    assert not tests, f"{module} imports {tests}"


def test_imports_form_no_cycle():
    graph = {module: set(filter(None, imports_of(module, FILES).values())) - {module} for module in FILES}
    assert graph["harness.dense"] >= {"data", "harness.readers"} and graph["mlo_mae"] >= {"kernels", "harness.run"}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("harness") < order.index("data") < order.index("mlo_mae")


@pytest.mark.parametrize("module", [*FILES, *TESTS])
def test_only_what_may_be_absent_is_imported_inside_a_function(module):
    is_package = (FILES | TESTS)[module].name == "__init__.py"
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = [node for function in functions for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        name.replace("torch.utils.tensorboard", "tensorboard")
        for node in inside
        for name in imported(node, module, is_package)
    }
    hidden = {name for name in names if name.split(".")[0] not in OPTIONAL}
    assert not hidden, f"{module} imports {hidden} inside a function"


def test_a_module_is_found_by_its_name_in_one_place():
    """`harness.cli.command`, which runs the programs: everywhere else an import is an import, for all to see."""
    by_name = {"import_module", "__import__", "runpy", "exec", "eval", "spec_from_file_location"}
    users = set()
    for module in FILES:
        names = {node.id for node in ast.walk(TREES[module]) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)} - {"eval"}  # modules' mode
        users |= {module} if names & by_name else set()
    assert users == {"harness.cli"}


@pytest.mark.parametrize("module", TESTS)
def test_no_test_imports_from_another(module):
    others = {name for name in imports_of(module, {}) if name.split(".")[0].startswith(("test_", "tests", "conftest"))}
    assert not others, f"{module} imports {others}; what tests share stands in helpers.py"


# ------------------------------------------------------------------------------------------------------- programs


def python(*argv, cwd, **env):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd, env=os.environ | env)


def test_a_program_is_what_ends_in_main():
    assert PROGRAMS == cli.commands() and len(PROGRAMS) >= 5
    for name in PROGRAMS:
        body = TREES[f"experiments.{name}"].body
        (main,) = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        assert [argument.arg for argument in main.args.args] == ["argv"] and len(main.args.defaults) == 1, name
        assert ast.unparse(body[-1]) == "if __name__ == '__main__':\n    sys.exit(main())", name
        assert ast.get_docstring(TREES[f"experiments.{name}"]), name


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_help_and_one_line_for_a_wrong_flag(name, capsys):
    main = importlib.import_module(f"experiments.{name}").main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    printed = capsys.readouterr()
    assert (
        stop.value.code == 0 and printed.out.startswith("usage: ") and name in printed.out.split("\n")[0] and not printed.err
    )
    assert main(["--no-such-flag"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("mlo_mae: ") and printed.err.count("\n") == 1 and not printed.out


STARTED = """
import os, runpy, sys
import torch  # once: it takes most of the time that a program needs to start
folder, script, *names = sys.argv[1:]
for name in names:
    for way in ("module", "command"):
        if (child := os.fork()) == 0:
            for number in (1, 2):
                os.dup2(os.open(f"{folder}/{name}-{way}-{number}", os.O_CREAT | os.O_WRONLY), number)
            if way == "module":
                sys.argv = ["", "--help"]
                runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
            else:
                sys.argv = [script, name, "--help"]
                runpy.run_path(script, run_name="__main__")
            raise AssertionError("it did not end")
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"{name} as a {way}: {status}")
"""


@pytest.mark.slow
def test_a_program_runs_as_a_module_and_as_a_command(tmp_path):
    """From another folder too, where the project is on the path."""
    (printed := tmp_path / "printed").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    if sys.platform == "linux":
        ended = python("-c", STARTED, printed, SCRIPT, *PROGRAMS, cwd=elsewhere, PYTHONPATH=str(ROOT))
        assert ended.returncode == 0, ended.stderr
    else:  # where a process that has imported torch cannot be forked, or not safely
        for name, way in itertools.product(PROGRAMS, ("module", "command")):
            argv = ["-m", f"experiments.{name}"] if way == "module" else [SCRIPT, name]
            ended = python(*argv, "--help", cwd=elsewhere, PYTHONPATH=str(ROOT))
            assert ended.returncode == 0, ended.stderr
            for number, text in enumerate((ended.stdout, ended.stderr), 1):
                (printed / f"{name}-{way}-{number}").write_text(text, "utf-8")
    said = {path.name: path.read_text("utf-8") for path in printed.iterdir()}
    assert len(said) == 4 * len(PROGRAMS) and not any(text for name, text in said.items() if name.endswith("2")), said
    for name in PROGRAMS:
        assert said[f"{name}-module-1"] == said[f"{name}-command-1"] and said[f"{name}-module-1"].startswith("usage: "), name
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
def test_the_method_is_imported_from_another_folder(tmp_path):
    program = "import mlo_mae, experiments.probe; print(mlo_mae.build(mlo_mae.Config(), 32, 3, 8)[0].patches)"
    ended = python("-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (ended.returncode, ended.stdout) == (0, "64\n"), ended.stderr
