"""The table of a study for a paper."""

from __future__ import annotations

from collections.abc import Sequence

from kdx.formats import NONE
from kdx.study_table import HEADS, MARK, Line, cells, remarks

SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    MARK: r"$^\dagger$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def study_latex(name: str, lines: Sequence[Line], reference: str) -> str:
    """A `table` for `\\input`; it needs the package booktabs. What the numbers are stands below it as a comment."""
    rows = [" & ".join(_cell(cell) for cell in row) + r" \\" for row in (HEADS, *(cells(line) for line in lines))]
    label = "".join(letter if letter.isalnum() else "-" for letter in name)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{escaped(name)}: test accuracy (\\%), mean $\\pm$ standard deviation over seeds.}}",
            f"  \\label{{tab:{label}}}",
            f"  \\begin{{tabular}}{{l{'r' * (len(HEADS) - 1)}}}",
            r"    \toprule",
            f"    {rows[0]}",
            r"    \midrule",
            *(f"    {row}" for row in rows[1:]),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            *(f"% {' '.join(remark.split())}" for remark in remarks(lines, reference)),
            "",
        ]
    )


def escaped(text: str) -> str:
    """Text of a user that LaTeX is to show as it is, in one line."""
    return "".join(SIGNS.get(letter, letter) for letter in text.replace("\n", " "))


def _cell(text: str) -> str:
    """A cell with a minus in the place of a hyphen that stands for one."""
    if text == NONE:
        return "--"
    return f"$-${escaped(text[1:])}" if text.startswith("-") else escaped(text)
