"""A table as CSV, Markdown, HTML and LaTeX, from one description; and the tables of a run in the terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from gmp_atl.errors import UserError

SHOWN = ("table1", "table2", "table3", "table4", "effects", "claims")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
}
_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff; margin: 1.5rem; }
h1 { font-size: 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ccc; text-align: left; }
thead th { border-bottom: 2px solid #111; position: sticky; top: 0; background: #fff; vertical-align: bottom; }
tbody tr:hover { background: #f2f2f2; }
.figure { text-align: right; white-space: nowrap; }
ul { padding-left: 1.2rem; color: #444; font-size: 0.85rem; max-width: 60rem; }
"""
_WIDTH = 120
"""Columns of text below which the widest table would lose digits."""
_NO_ROWS = "no rows"
_FIGURE = re.compile(r"[-+]?\d|-$|n/a|none|not run|\[")


@dataclass(frozen=True)
class Cell:
    """What a reader sees in one way and a program in another."""

    text: str
    parts: Mapping[str, str] | str = field(default_factory=dict)
    """Of the CSV: values by the names of their columns, or one that stands in the column of the heading."""


@dataclass(frozen=True)
class Table:
    """A table with what must be known to read it."""

    name: str
    """File name without suffix."""
    caption: str
    rows: Sequence[Mapping[str, str | Cell]]
    """Heading: cell. Every row has the headings of the first, and a heading's cells are of one kind.

    Without a row there are no headings: the table then says that it has no rows.
    """
    notices: Sequence[str] = ()
    """Warnings, printed before the table."""
    footer: Sequence[str] = ()

    def csv(self) -> str:
        """Comment lines (`pandas.read_csv(comment="#")` skips them), then plain columns, unless there are no rows."""
        stream = io.StringIO()
        for line in (self.caption, *self.notices, *self.footer):
            stream.write(f"# {line}\n")
        if rows := [_flat(row) for row in self.rows]:
            # What is not quoted would be read as a comment from a # on.
            comments = any("#" in text for row in rows for text in (*row, *row.values()))
            writer = csv.DictWriter(
                stream, list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_ALL if comments else csv.QUOTE_MINIMAL
            )
            writer.writeheader()
            writer.writerows(rows)
        return stream.getvalue()

    def markdown(self) -> str:
        """A pipe table whose columns are aligned in plain text too."""
        headings, body = self._texts()
        headings, *body = [[text.replace("|", r"\|") for text in row] for row in (headings, *body)]
        widths = [max(map(len, column)) for column in zip(headings, *body, strict=True)]
        right = [_holds_figures(column) for column in zip(headings, *body, strict=True)]
        rule = [("-" * (w - 1) + ":" if r else ":" + "-" * (w - 1)) for w, r in zip(widths, right, strict=True)]
        lines = [
            "| "
            + " | ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True))
            + " |"
            for row in [headings, rule, *body]
        ]
        notices = [f"\n**{notice}**" for notice in self.notices]
        footer = [f"- {line}" for line in self.footer]
        return "\n".join([f"### {self.caption}", *notices, "", *lines, "", *footer]) + "\n"

    def html(self) -> str:
        """A page that needs nothing else."""
        headings, body = self._texts()
        kinds = [' class="figure"' if _holds_figures(column) else "" for column in zip(headings, *body, strict=True)]

        def row(tag: str, texts: Sequence[str]) -> str:
            cells = (f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True))
            return f"<tr>{''.join(cells)}</tr>"

        return "\n".join(
            [
                '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
                f"<title>{escape(self.caption)}</title>\n<style>\n{_STYLE}</style>",
                f"<h1>{escape(self.caption)}</h1>",
                *(f"<p><strong>{escape(notice)}</strong></p>" for notice in self.notices),
                f"<table>\n<thead>{row('th', headings)}</thead>\n<tbody>",
                *(row("td", texts) for texts in body),
                "</tbody>\n</table>\n<ul>",
                *(f"<li>{escape(line)}</li>" for line in self.footer),
                "</ul>\n</html>\n",
            ]
        )

    def latex(self) -> str:
        """A floating table; needs the package booktabs."""
        headings, body = self._texts()
        kinds = "".join("r" if _holds_figures(column) else "l" for column in zip(headings, *body, strict=True))
        # The document that the table goes into numbers it.
        title = re.sub(r"^Table \d+: ", "", self.caption)
        caption = " ".join([_escape(f"{title}."), *(rf"\textbf{{{_escape(notice)}}}" for notice in self.notices)])
        lines = [" & ".join(map(_escape, row)) + r" \\" for row in (headings, *body)]
        return "\n".join(
            [
                r"% Needs \usepackage{booktabs}.",
                r"\begin{table}",
                r"\centering\small",
                rf"\caption{{{caption}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{kinds}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                r"\par\smallskip\begin{minipage}{\linewidth}\footnotesize",
                *(_escape(line) + r"\par" for line in self.footer),
                r"\end{minipage}",
                r"\end{table}",
                "",
            ]
        )

    def _texts(self) -> tuple[list[str], list[list[str]]]:
        body = [[cell.text if isinstance(cell, Cell) else cell for cell in row.values()] for row in self.rows]
        return list(self.rows[0]) if self.rows else [_NO_ROWS], body


def show(folder: Path) -> None:
    """Print Tables 1 to 4, the effects and the claims, as far as `folder` has them, to the terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=max(_WIDTH, Console().width))
    paths = [path for name in SHOWN if (path := folder / f"{name}.md").is_file()]
    if not paths:
        raise UserError(f"{folder} holds no tables, such as {SHOWN[0]}.md; expected results/<name>/tables of a run.")
    for path in paths:
        console.print(Markdown(path.read_text(encoding="utf-8")))


def _flat(row: Mapping[str, str | Cell]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for heading, cell in row.items():
        parts = cell.parts if isinstance(cell, Cell) else cell
        flat.update({_identifier(heading): parts} if isinstance(parts, str) else parts)
    return flat


def _identifier(heading: str) -> str:
    return re.sub(r"\W+", "_", heading.lower()).strip("_")


def _holds_figures(column: Sequence[str]) -> bool:
    """Whether all below the heading are figures."""
    return len(column) > 1 and all(_FIGURE.match(text) for text in column[1:])


def _escape(text: str) -> str:
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)
