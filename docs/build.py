"""Make what goes with hypergradient.md, the one place where its words and its code are edited: python docs/build.py

The page's Python blocks, one after the other, are toy.py; with the text between them they are hypergradient.ipynb. What a
block prints is put below it, in both. toy.png is drawn by the toy's own functions."""

import contextlib
import io
import json
import re
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PAGE = HERE / "hypergradient.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
ABOUT = '"""The hypergradient on a toy. hypergradient.md explains each piece; docs/build.py makes this file of it."""\n\n'
CELLS_ARE = "Run the cells in order. Words and code are those of [hypergradient.md](hypergradient.md), part 1.\n\n"


def run(pieces: list[str]) -> tuple[list[str], dict]:
    """What each piece prints, run in order, and the names that they leave behind."""
    names, printed = {"__name__": "__main__"}, []
    for piece in pieces:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(piece, names)
        printed.append(out.getvalue())
    return printed, names


def made(page: str) -> tuple[dict[str, str], dict]:
    """The text of each file, the page's own included, and the names that the toy leaves behind."""
    first, rest = page.split("\n## Part 2", 1)
    between, pieces = BLOCK.split(first)[::3], BLOCK.split(first)[1::3]
    printed, names = run(pieces)
    below = [f"\n```text\n{out}```\n" if out else "" for out in printed]
    blocks = [f"```python\n{piece}```\n{out}" for piece, out in zip(pieces, below)]
    whole = "".join(text + block for text, block in zip(between, [*blocks, ""])) + "\n## Part 2" + rest
    toy = ABOUT + "\n\n".join(pieces)
    between[0] = between[0].replace("\n\n", "\n\n" + CELLS_ARE, 1)
    cells = [cell("markdown", between[0])]
    for piece, out, text in zip(pieces, printed, between[1:]):
        cells += [cell("code", piece, out), cell("markdown", text)]
    return {PAGE.name: whole, "toy.py": toy, "hypergradient.ipynb": notebook(cells)}, names


def cell(kind: str, source: str, printed: str = "") -> dict:
    source = source.replace("](#", f"]({PAGE.name}#") if kind == "markdown" else source  # the notebook has no Part 2
    made = {"cell_type": kind, "metadata": {}, "source": source.strip("\n").splitlines(keepends=True)}
    if kind == "markdown":
        return made
    outputs = [{"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}] if printed else []
    return made | {"execution_count": None, "outputs": outputs}


def notebook(cells: list[dict]) -> str:
    """A notebook of format 4.5."""
    numbered = [{"id": f"cell-{number}"} | content for number, content in enumerate(cells)]
    language = {"name": "python"}
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": language}
    return json.dumps({"cells": numbered, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def draw(toy: dict) -> Figure:
    """L3 of the toy over psi, at the two ends of the table of (12) against -1, with three tangents."""
    figure = Figure((8, 3.2), layout="constrained")
    torch, lr = toy["torch"], toy["lr"]
    theta, mu, nu, t = usual = toy["start"]
    titles = "a gradient against the remembered ones", "a gradient with the remembered ones,\n8 times as large"
    for axes, title, memory, where in zip(figure.subplots(1, 2), titles, (1.0, 0.3), (0.5, 3.0)):
        toy["start"] = theta, memory * mu, memory**2 * nu, t
        psi, line = torch.tensor(where), torch.linspace(-3, 5, 161)
        height, curve = toy["outer"](psi), [float(toy["outer"](at)) for at in line]
        axes.plot(line, curve, color="black", linewidth=1.5, label="$L_3$, each point a turn made again")
        step = toy["adamw"](toy["start"], toy["gradient1"](theta, psi))[0]
        a = toy["cotangent_of"](step)
        minus_one = toy["of_masking"](psi, toy["directional_errors"](theta, -lr * a))
        slopes = {"exact": toy["exact"](psi), "dU/dg = -1, times lr": minus_one}
        for (name, slope), color, style in zip(slopes.items(), ("tab:blue", "tab:red"), ("-", "--")):
            ends = torch.stack([psi - 1.5, psi + 1.5])
            axes.plot(ends, height + slope * (ends - psi), style, color=color, linewidth=2, label=name)
        axes.plot(psi, height, "o", color="tab:blue")
        axes.set(title=title, xlabel="psi")
        axes.title.set_fontsize(10)
    figure.axes[0].set_ylabel("$L_3$")
    figure.axes[0].legend(fontsize=8, frameon=False)
    toy["start"] = usual
    return figure


def main() -> None:
    files, toy = made(PAGE.read_text("utf-8"))
    for name, text in files.items():
        (HERE / name).write_text(text, "utf-8", newline="\n")
    draw(toy).savefig(HERE / "toy.png", dpi=100)


if __name__ == "__main__":
    main()
