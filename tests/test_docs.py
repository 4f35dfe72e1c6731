"""The derivation in docs/hypergradient.md, its toy and its notebook: they run, they are one text, and they can fail."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import time
import types

import pytest
import torch
from helpers import SCRIPT

import mlo_mae
from mlo_mae import Level, Rates

DOCS = SCRIPT.parent / "docs"
build = types.SimpleNamespace(**runpy.run_path(str(DOCS / "build.py")))
PAGE = (DOCS / "hypergradient.md").read_text("utf-8")
PIECES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PRINTED = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
WRONG, OTHER = "the formula is wrong", "autograd was asked something else"


@pytest.fixture(autouse=True)
def usual_dtype():
    """The toy sets torch's default type of numbers."""
    yield
    torch.set_default_dtype(torch.float32)


def toy(*changes):
    """What the toy prints and the names that it leaves behind, with (old, new) pieces of it exchanged first."""
    text = (DOCS / "toy.py").read_text("utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(text, names)
        except AssertionError as error:
            names["stopped"] = str(error)
    return out.getvalue(), names


def test_the_files_are_made_of_the_page():
    begun = time.perf_counter()
    files, names = build.made(PAGE)  # which runs the cells of the notebook
    assert time.perf_counter() - begun < 60 and float(names["psi"]) == 0.5
    assert set(files) == {"hypergradient.md", "toy.py", "hypergradient.ipynb"}
    for name, text in files.items():
        assert (DOCS / name).read_text("utf-8") == text, f"{name} is not what hypergradient.md makes: python docs/build.py"


def test_the_toy_is_the_page_s_code_and_prints_what_stands_there():
    assert (DOCS / "toy.py").read_text("utf-8").split('"""\n\n', 1)[1] == "\n\n".join(PIECES) and len(PIECES) >= 9
    own = "ignore:`torch.jit.script` is deprecated:FutureWarning"  # torch 2.14 warns of what its own jvp calls
    command = [sys.executable, "-W", own, DOCS / "toy.py"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "".join(PRINTED) and ended.stdout.count("by hand") == 9


def test_the_notebook_holds_the_page_s_code_and_words():
    book = json.loads((DOCS / "hypergradient.ipynb").read_text("utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]) + "\n" for cell in code] == PIECES
    words = "".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown")
    assert "### (9) From the gradient" in words and "Part 2: measured" not in words
    assert "](#" not in words  # what it points at is on the page alone


@pytest.mark.parametrize(
    "what, old, new, why",
    [
        ("(7) a", "dphi_dz2 = (y2 - 2 *", "dphi_dz2 = (y2 - 1 *", WRONG),
        ("(7) a", "return 2 * r * phi * x3,", "return 2 * r * phi * x3 * (1 + 1e-11),", WRONG),
        ("(7) a", "slope(levels_2_and_3, after, along)", "slope(levels_2_and_3, theta, along)", OTHER),
        ("(8) c", "+ 2 * (1 - b2) * g * at_nu", "+ (1 - b2) * g * at_nu", WRONG),
        ("(8) c", "* root * (root + eps) ** 2)", "* root * (root + eps))", WRONG),
        ("(9) d", "(f * c[0] + e * c[1])\n\n\nd = ", "(f * c[0] - e * c[1] + c[0])\n\n\nd = ", WRONG),
        ("(10) dL3/dpsi", "return (mask * p * (1 - p) * image * d)", "return (mask * p * image * d)", WRONG),
        ("the whole chain", "slope(outer, psi))\n\n\ndef hess", "slope(outer, psi + 0.1))\n\n\ndef hess", OTHER),
        ("(13) H c", "(w * r).sum() * c.flip(0)", "(w * r).sum() * c", WRONG),
        ("through 2 step(s)", "cotangent = a + hessian_times(level[0], psi, c), a_mu", "cotangent = a, a_mu", WRONG),
        ("through 2 step(s)", "b1 * at_mu, b2 * at_nu", "at_mu, b2 * at_nu", WRONG),
        ("through 2 step(s)", "b1 * at_mu, b2 * at_nu", "b1 * at_mu, at_nu", WRONG),
        ("through 2 step(s)", "((1 - lr * decay) * a, b1", "(a, b1", WRONG),
    ],
)
def test_the_toy_stops_where_a_formula_is_broken(what, old, new, why):
    printed, names = toy((old, new))
    assert names["stopped"] == why
    assert printed.splitlines()[-3].startswith(what + " ")


def test_the_answers_are_true():
    """Those below "Try it"."""
    _, names = toy(("penalty = 0.1", "penalty = 0.0"))
    direct, through_head = names["paths_to_level3"](names["after"])
    assert "stopped" not in names and abs(names["a"]).max() < 1e-14 and direct < -0.5 and through_head > 0.5
    _, names = toy(("psi = torch.tensor(0.5)", "psi = torch.tensor(40.0)"))
    p = names["masking_probability"](names["psi"])
    assert "stopped" not in names and torch.minimum(p, 1 - p).max() < 1e-6 and 0 < abs(names["exact"](names["psi"])) < 1e-8
    usual = abs(toy()[1]["c"][0])
    _, names = toy(("start = theta, mu, nu, 9", "start = theta, 0 * mu, 0 * nu, 0"))
    assert "stopped" not in names and 0 < abs(names["c"][0]) < 1e-3 * usual


def test_what_the_page_says_in_words():
    _, names = toy()
    direct, through_head = names["paths_to_level3"](names["after"])
    assert 2.5 < direct / (direct + through_head) < 3  # nearly three times
    where, remembered = torch.tensor(3.0), 0.3 * names["nu"].sqrt()
    assert 7.5 < abs(names["gradient1"](names["theta"], where)[0]) / remembered[0] < 8.5  # eight times
    rows = [line.split() for line in PRINTED[-2].splitlines()[1:]]
    signs = [(float(row[2]) > 0, float(row[3]) > 0) for row in rows]
    assert signs == [(False, False), (False, False), (True, False)]  # -1 sends T the wrong way in the last row
    rows = [[float(word) for word in line.split()] for line in PRINTED[-1].splitlines()[1:]]
    assert rows[-2][1] == pytest.approx(100 * rows[-1][1], rel=0.05)  # ten times less, a hundred times more exact
    assert min(row[2] for row in rows) > 0.1 and rows[-1][2] == 1.0
    problem = "".join(PIECES[:2])
    counted = re.sub(r' *""".*?"""\n', "", problem, flags=re.DOTALL)
    assert sum(bool(line.strip()) for line in counted.splitlines()) <= 40


def test_the_toy_s_step_and_loss_are_the_script_s():
    """(2), (8) and (11) to (13), on numbers of no meaning."""
    _, names = toy()
    assert (names["b1"], names["b2"], names["eps"]) == (mlo_mae.BETA1, mlo_mae.BETA2, mlo_mae.EPS)
    theta, mu, nu, g, a, a_mu, a_nu = torch.randn(7, 2)
    rates, nu = Rates(names["lr"], torch.full((2,), names["decay"])), nu.square() + 0.1
    theirs, ours = mlo_mae.adamw(Level(theta, mu, nu, 4), g, rates), names["adamw"]((theta, mu, nu, 4), g)
    assert all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(theirs[:3], ours[:3])) and theirs.t == ours[3] == 5
    back, c = mlo_mae.adamw_pullback(Level(theta, mu, nu, 4), g, rates, "adamw", (a, a_mu, a_nu))
    our_back, our_c = names["adamw_pullback"]((theta, mu, nu, 4), g, (a, a_mu, a_nu))
    assert all(torch.allclose(x, y, rtol=1e-12) for x, y in zip((*back, c), (*our_back, our_c)))
    p, errors, mask = torch.rand(4), torch.rand(4), names["mask"]
    assert names["level1_loss"](p, errors) == mlo_mae.level1_loss(p, mask, errors)


def test_the_picture_has_the_slopes_of_the_toy():
    _, names = toy()
    start = names["start"]
    panels = build.draw(names).axes
    assert names["start"] is start
    for axes, sign in zip(panels, (-1, 1)):
        curve, exact, minus_one, _ = [line.get_xydata() for line in axes.lines]
        slopes = [float((line[-1, 1] - line[0, 1]) / (line[-1, 0] - line[0, 0])) for line in (exact, minus_one)]
        x = exact[:, 0].mean()
        near = curve[abs(curve[:, 0] - x) < 0.06]
        seen = (near[-1, 1] - near[0, 1]) / (near[-1, 0] - near[0, 0])
        assert slopes[0] == pytest.approx(float(seen), rel=1e-2) and slopes[0] * sign > 0 > slopes[1]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_the_pages_point_at_is_there():
    root, found = SCRIPT.parent, 0
    for page in (root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))):
        for name, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", page.read_text("utf-8")):
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name} points at {name}"
            assert not anchor or anchor in anchors(target), f"{page.name} points at {name}#{anchor}"
            found += bool(anchor)
    assert found > 20
