"""The report as one HTML page that needs nothing else: no script, no network.

Everything that a model wrote or a user named is escaped. Twin: tests/distill/evaluation/test_page.py.
"""

from html import escape

from .plots import LAYERS, NAMES, layer_picture, plots
from .sections import Section, Table, sections, title

STYLE = """
:root { color-scheme: light; --line: #d9dde3; --soft: #5a6472; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; color: #1b2027; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { margin: .35rem 0; max-width: 52rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
th { font-weight: 600; } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; padding-left: 0; min-width: 7rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; max-width: 34rem; }
.layers svg { max-width: 100%; height: 34px; }
.key { color: var(--soft); font-size: .85rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .9em; }
.key i:first-child { margin-left: 0; }
details { border-top: 1px solid var(--line); padding: .35rem 0; }
summary { cursor: pointer; font-weight: 600; font-size: .95rem; }
dl { border-left: 3px solid var(--line); margin: 1rem 0; padding-left: .9rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0 0 .4rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto; }
@media (max-width: 40rem) {
  body { padding: 1rem .75rem 3rem; } th, td { padding: .3rem .4rem; }
  table { font-size: .82rem; } th:first-child, td:first-child { min-width: 6rem; }
}
"""


def page(report: dict) -> str:
    """The page as text of an HTML file in UTF-8."""
    drawings = plots(report)
    head = escape(title(report))
    body = [f"<h1>{head}</h1>"]
    if report["layers"]:
        body.append(_layers(report["layers"]))
    body += [_section(section, drawings) for section in sections(report)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{head}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _layers(layers: list[str]) -> str:
    kinds = [kind for kind in LAYERS if kind in layers]
    key = "".join(f'<i style="background:{LAYERS[kind]}"></i>{layers.count(kind)} {NAMES[kind]}' for kind in kinds)
    return f'<div class="layers">{layer_picture(layers)}</div>\n<p class="key">{key}, of {len(layers)} layers</p>'


def _section(section: Section, drawings: dict[str, str]) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(line)}</p>" for line in section.prose]
    parts += map(_table, section.tables)
    if section.figures:
        parts.append('<div class="plots">' + "\n".join(drawings[name] for name in section.figures) + "</div>")
    parts += map(_sample, section.samples)
    for part in section.folded:
        inside = "\n".join([*map(_table, part.tables), *map(_sample, part.samples)])
        if inside:
            parts.append(f"<details><summary>{escape(part.title)}</summary>\n{inside}\n</details>")
    return "\n".join(parts)


def _sample(sample: dict[str, str]) -> str:
    pairs = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in sample.items())
    return f"<dl>{pairs}</dl>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'
