"""The report as Markdown, which reads well in a terminal too. Twin: tests/distill/evaluation/test_markdown.py."""

from convert.layouts import picture

from .sections import Section, Table, sections, title


def markdown(report: dict) -> str:
    """The whole report; plots, and sections that are nothing else, are on the page only."""
    parts = [f"# {title(report)}"]
    if report["layers"]:
        parts.append(f"Layers: `{picture(report['layers'])}`")
    for section in sections(report):
        if section.tables or section.samples or section.folded or not section.figures:
            parts.append(_section(section))
    return "\n\n".join(parts) + "\n"


def short(report: dict) -> str:
    """Everything in one figure each, as the last lines of a command."""
    return _section(sections(report)[0])


def _section(section: Section, mark: str = "##") -> str:
    parts = [f"{mark} {section.title}", *section.prose, *map(_table, section.tables)]
    for sample in section.samples:
        lines = [f"- {label}: {_inline(text)}" for label, text in sample.items()]
        parts.append("\n".join(lines))
    parts += [_section(part, mark + "#") for part in section.folded if part.tables]
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    rows = [[_cell(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(3, *(len(row[index]) for row in rows)) for index in range(len(table.columns))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _inline(text: str) -> str:
    """As one line of code that no backtick, newline or other mark in the text can break."""
    shown = text.replace("\n", "↵")
    fence = "`"
    while fence in shown:
        fence += "`"
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown or ' '}{space}{fence}"
