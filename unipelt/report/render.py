"""Two ways to write the blocks of a report: one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from unipelt.files.messages import printable
from unipelt.report.blocks import Block, Entry, Grid, Heading, Items, Panels, Paragraph
from unipelt.report.page import PAPER
from unipelt.report.pictures import Picture

# HTML

_STYLE = """
:root { color-scheme: light; --line: #d5d9e0; --soft: #5b6472; --warn: #9a3412; --back: #f6f7f9; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 96rem; background: #fff; color: #1b1f27;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p, ul { max-width: 52rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; }
a { color: #1d4ed8; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .9rem; }
.warn { color: var(--warn); }
p.warn { border-left: 3px solid var(--warn); padding-left: .7rem; }
.scroll { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible { outline: 2px solid #1d4ed8; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; line-height: 1.35; overflow-wrap: normal; }
th, td { padding: .4rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.words { white-space: normal; text-align: left; min-width: 10rem; }
thead th { background: var(--back); vertical-align: bottom; font-weight: 600; }
th[scope=row] { position: sticky; left: 0; background: #fff; font-weight: 600; min-width: 6.2rem;
  max-width: 11rem; overflow-wrap: break-word; border-right: 1px solid var(--line); }
th[scope=row], thead th:first-child { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
.minor { color: var(--soft); font-size: .92em; }
td div.warn { font-size: .92em; white-space: normal; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
img { display: block; max-width: 100%; height: auto; }
@media (max-width: 40rem) { body { padding: .7rem; } th[scope=row] { max-width: 8rem; } }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; }
  th[scope=row] { position: static; }
  p, ul { max-width: none; }
  .panels { display: block; }
  figure { display: inline-block; vertical-align: top; }
  tr, figure { break-inside: avoid; }
  h2, h3, h2 + p { break-after: avoid; }
}
"""


def to_html(blocks: Sequence[Block]) -> str:
    """One page with its style and its pictures inside: nothing is fetched, and no script runs."""
    heads = [block for block in blocks if isinstance(block, Heading)]
    links = "".join(
        f'<a href="#s{index}">{_escape(head.text)}</a>' for index, head in enumerate(heads) if head.level == 2
    )
    body, index = [], 0
    for block in blocks:
        if isinstance(block, Heading):
            body.append(f'<h{block.level} id="s{index}">{_escape(block.text)}</h{block.level}>')
            if block.level == 1:
                body.append(f'<nav aria-label="Sections">{links}</nav>')
            index += 1
        else:
            body.append(_block_html(block))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # what comes from files could ask for something else, were it not escaped
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
            f"<title>{_escape(heads[0].text)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _block_html(block: Block) -> str:
    if isinstance(block, Paragraph):
        text = _escape(block.text).replace(PAPER, f'<a href="{PAPER}">{PAPER}</a>')
        return f'<p class="warn">{text}</p>' if block.warn else f"<p>{text}</p>"
    if isinstance(block, Items):
        return "<ul>\n" + "\n".join(f"<li>{_escape(item)}</li>" for item in block.items) + "\n</ul>"
    if isinstance(block, Grid):
        head = "".join(f'<th scope="col">{_escape(name)}</th>' for name in block.head)
        longest = [max(len(text) for entry in column for text, _ in entry) for column in zip(*block.rows, strict=True)]
        kinds = [' class="words"' if length > 34 else "" for length in longest]
        rows = "\n".join(
            f'<tr><th scope="row">{_entry_html(row[0])}</th>'
            + "".join(f"<td{kind}>{_entry_html(entry)}</td>" for kind, entry in zip(kinds[1:], row[1:], strict=True))
            + "</tr>"
            for row in block.rows
        )
        # a box that scrolls must take the focus, or a keyboard cannot scroll it
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="Table">\n<table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
        )
    assert isinstance(block, Panels)
    return '<div class="panels">\n' + "\n".join(map(_picture_html, block.pictures)) + "\n</div>"


def _entry_html(entry: Entry) -> str:
    tags = {"best": ("<strong>", "</strong>"), "second": ("<u>", "</u>")}
    lines = []
    for text, mark in entry:
        before, after = tags.get(mark, ("", ""))
        kind = f' class="{mark}"' if mark in ("minor", "warn") else ""
        lines.append(f"<div{kind}>{before}{_escape(text)}{after}</div>")
    return "".join(lines)


def _picture_html(picture: Picture) -> str:
    # as an image the picture can neither run a script nor clash with another's ids
    data = base64.b64encode(picture.svg).decode()
    label = _escape(f"{picture.section}: {picture.title}")
    return f'<figure><img alt="{label}" src="data:image/svg+xml;base64,{data}"></figure>'


def _escape(text: str) -> str:
    # lone surrogates come out of JSON, and no UTF-8 holds them
    return html.escape(printable(text).encode("utf-8", "replace").decode("utf-8"))


# Markdown


def to_markdown(blocks: Sequence[Block], folder: str) -> str:
    """The same in Markdown (GitHub's); pictures are files in `folder`."""
    return "\n\n".join(_block_markdown(block, folder) for block in blocks) + "\n"


def _block_markdown(block: Block, folder: str) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Paragraph):
        return f"**Note:** {_plain(block.text)}" if block.warn else _plain(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_plain(item)}" for item in block.items)
    if isinstance(block, Grid):
        lines = ["| " + " | ".join(map(_plain, block.head)) + " |", "|" + " --- |" * len(block.head)]
        lines += ["| " + " | ".join(map(_entry_markdown, row)) + " |" for row in block.rows]
        return "\n".join(lines)
    return "\n".join(f"![{_plain(picture.title)}]({folder}/{picture.name}.svg)" for picture in block.pictures)


def _entry_markdown(entry: Entry) -> str:
    tags = {"best": ("**", "**"), "second": ("<u>", "</u>"), "warn": ("*", "*")}
    return "<br>".join(f"{tags.get(m, ('', ''))[0]}{_plain(text)}{tags.get(m, ('', ''))[1]}" for text, m in entry)


def _plain(text: str) -> str:
    text = html.escape(printable(text).encode("utf-8", "replace").decode("utf-8"), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split()))
