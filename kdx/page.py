"""A report as one HTML file: text from Markdown, pictures inside, own style, nothing fetched and no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt


def page(title: str, markdown: str, cards: Sequence[tuple[str, str, str]], pictures: Mapping[str, Path]) -> str:
    """The text of an HTML file.

    `cards` are (label, value, note) and stand above the text after its first heading; `pictures` maps the target of
    an image in the text to its PNG file. HTML inside the Markdown is shown as it is written, never taken as HTML.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    for name, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        body = body.replace(f'src="{html.escape(name)}"', f'src="data:image/png;base64,{data}"')
    heading, end, rest = body.partition("</h1>")
    row = "".join(_card(*card) for card in cards)
    content = f'{heading}{end}\n<div class="cards">{row}</div>\n{rest}' if cards else body
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{content}</main>\n</body>\n</html>\n"
    )


def _card(label: str, value: str, note: str) -> str:
    parts = (("label", label), ("value", value), ("note", note))
    return '<div class="card">' + "".join(f'<div class="{k}">{html.escape(text)}</div>' for k, text in parts) + "</div>"


STYLE = """
:root {
  --paper: #ffffff; --sheet: #f5f7f9; --ink: #1c2733; --soft: #5b6875; --line: #dde3e9; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14191f; --sheet: #1d242c; --ink: #e3e8ed; --soft: #9aa7b4; --line: #323c47; --accent: #56b4e9;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
}
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
p, li { max-width: 48rem; }
p:has(img) { max-width: none; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.2rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
code, pre { font-family: ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Consolas, monospace; font-size: .86em; }
code { background: var(--sheet); border-radius: 4px; padding: .1em .35em; }
pre {
  background: var(--sheet); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1.1rem;
  overflow: auto; max-height: 30rem; line-height: 1.45;
}
pre code { background: none; padding: 0; }
a { color: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem; margin: 0 0 1.6rem; }
.card { background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; }
.card .label, .card .note { color: var(--soft); font-size: .84rem; line-height: 1.4; }
.card .value { font-size: 1.6rem; font-weight: 650; line-height: 1.35; font-variant-numeric: tabular-nums; }
.card:first-child .value { color: var(--accent); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 50%; }
th { color: var(--soft); font-weight: 600; text-align: left; vertical-align: bottom; }
th, td { padding: .42rem .7rem; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
.wide td:last-child:not([style]) { white-space: normal; overflow-wrap: anywhere; }
tbody tr:hover { background: var(--sheet); }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; padding: .8rem; }
img[alt^=Confusion] { max-width: min(100%, 42rem); }
@media (prefers-color-scheme: dark) { img { filter: brightness(.92); } }
@media print { main { max-width: none; padding: 0; } pre { max-height: none; } }
"""
