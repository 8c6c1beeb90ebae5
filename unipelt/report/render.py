"""Write the blocks of a report in two formats: one HTML page that needs no other file, and Markdown."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from unipelt.files.messages import printable
from unipelt.report.blocks import Block, Entry, Fold, Grid, Heading, Items, Panels, Paragraph
from unipelt.report.page import PAPER
from unipelt.report.pictures import Picture

# HTML

_STYLE = """
:root { color-scheme: light; --line: #d5d9e0; --soft: #5b6472; --warn: #9a3412; --back: #f6f7f9;
  --name: 13rem; --pinned: 4.6rem; }
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
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; margin: .8rem 0; border: 1px solid var(--line);
  border-radius: 6px; }
.scroll:focus-visible { outline: 2px solid #1d4ed8; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.35; overflow-wrap: normal; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.words { white-space: normal; text-align: left; min-width: 10rem; }
thead th { background: var(--back); vertical-align: bottom; font-weight: 600; max-width: 6.5rem; }
th[scope=row], thead th:first-child { position: sticky; left: 0; z-index: 1; text-align: left; font-weight: 600;
  width: var(--name); min-width: var(--name); max-width: var(--name); overflow-wrap: break-word;
  border-right: 1px solid var(--line); }
th[scope=row] { background: #fff; }
.two td:nth-child(2), .two thead th:nth-child(2) { position: sticky; left: var(--name); z-index: 1;
  width: var(--pinned); min-width: var(--pinned); border-right: 1px solid var(--line); }
.two td:nth-child(2) { background: #fff; }
tbody tr:last-child > * { border-bottom: 0; }
.minor { color: var(--soft); font-size: .92em; font-weight: 400; }
.chance { color: #6b7280; font-style: italic; }
.chance + .minor { font-style: italic; }
td[title] { cursor: help; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: #1d4ed8; padding: .3rem 0; }
.lead { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: center; }
.lead .panels { flex: 0 1 auto; min-width: 0; }
.lead > ul { flex: 1 1 20rem; min-width: 0; font-size: 1.08rem; list-style: none; padding: 0; }
.lead li { margin: .6rem 0; }
td div.warn { font-size: .92em; white-space: normal; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
img { display: block; max-width: 100%; height: auto; }
@media (max-width: 40rem) { :root { --name: 7.2rem; } body { padding: .7rem; } table { font-size: .8rem; } }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; }
  thead th, th[scope=row], .two td:nth-child(2) { position: static !important; }
  details::details-content { content-visibility: visible; height: auto; }
  p, ul { max-width: none; }
  .panels { display: block; }
  figure { display: inline-block; vertical-align: top; }
  tr, figure { break-inside: avoid; }
  h2, h3, h2 + p { break-after: avoid; }
}
"""


def to_html(blocks: Sequence[Block]) -> str:
    """Return one page with its style and its pictures inside. The page fetches no file and runs no script."""
    heads = [block for block in blocks if isinstance(block, Heading)]
    links = "".join(
        f'<a href="#s{index}">{_escape(head.text)}</a>' for index, head in enumerate(heads) if head.level == 2
    )
    body: list[str] = []
    index, first = 0, True
    for place, block in enumerate(blocks):
        if isinstance(block, Heading):
            body.append(f'<h{block.level} id="s{index}">{_escape(block.text)}</h{block.level}>')
            index += 1
        elif first and isinstance(block, Panels) and isinstance(blocks[place + 1], Items):
            body.append(f'<div class="lead">\n{_block_html(block)}')
        elif first and isinstance(block, Items):
            end = "\n</div>" if isinstance(blocks[place - 1], Panels) else ""
            body.append(f'{_block_html(block)}{end}\n<nav aria-label="Sections">{links}</nav>')
            first = False
        else:
            body.append(_block_html(block))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # a second protection besides escaping: text from the records cannot load anything
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
        text = _linked(block.text)
        return f'<p class="warn">{text}</p>' if block.warn else f"<p>{text}</p>"
    if isinstance(block, Items):
        return "<ul>\n" + "\n".join(f"<li>{_linked(item)}</li>" for item in block.items) + "\n</ul>"
    if isinstance(block, Grid):
        return _grid_html(block)
    if isinstance(block, Fold):
        inner = "\n".join(map(_block_html, block.blocks))
        return f"<details>\n<summary>{_escape(block.title)}</summary>\n{inner}\n</details>"
    assert isinstance(block, Panels)
    return '<div class="panels">\n' + "\n".join(map(_picture_html, block.pictures)) + "\n</div>"


def _grid_html(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{_head_html(name)}</th>' for name in grid.head)
    kinds = ["" if short else ' class="words"' for short in _numeric(grid)]
    rows = "\n".join(
        f'<tr><th scope="row">{_breakable(_entry_html(row[0]))}</th>'
        + "".join(
            f"<td{kind}{_hover(entry)}>{_entry_html(entry)}</td>"
            for kind, entry in zip(kinds[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in grid.rows
    )
    # a keyboard can scroll a box only if the box can take the focus
    pinned = ' class="two"' if grid.pinned == 2 else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table">\n'
        f"<table{pinned}>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _numeric(grid: Grid) -> list[bool]:
    """Return, for each column, whether the column holds numbers or short words, and not names or running text."""
    columns = zip(*grid.rows, strict=True)
    longest = [max((len(text) for entry in c for text, mark in entry if mark != "hover"), default=0) for c in columns]
    return [index > 0 and length <= 34 for index, length in enumerate(longest)]


def _breakable(name: str) -> str:
    """Return the name with places where a long method name may continue on the next line."""
    return re.sub(r"(?<=[a-z])([=.])(?=[\w&])", r"\1<wbr>", name)


def _head_html(name: str) -> str:
    first, _, rest = name.partition("\n")
    return _escape(first) + (f'<div class="minor">{_escape(rest)}</div>' if rest else "")


def _hover(entry: Entry) -> str:
    text = "; ".join(text for text, mark in entry if mark == "hover")
    return f' title="{_escape(text)}"' if text else ""


def _entry_html(entry: Entry) -> str:
    tags = {"best": ("<strong>", "</strong>"), "clear": ("<strong>", "</strong>"), "second": ("<u>", "</u>")}
    lines = []
    for text, mark in entry:
        if mark == "hover":
            continue
        before, after = tags.get(mark, ("", ""))
        kind = f' class="{mark}"' if mark in ("minor", "warn", "chance") else ""
        lines.append(f"<div{kind}>{before}{_escape(text)}{after}</div>")
    return "".join(lines)


def _picture_html(picture: Picture) -> str:
    # a picture in an `img` cannot run a script, and its ids cannot clash with those of another picture
    data = base64.b64encode(picture.svg).decode()
    return f'<figure><img alt="{_escape(picture.alt)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _linked(text: str) -> str:
    return _escape(text).replace(PAPER, f'<a href="{PAPER}">{PAPER}</a>')


def _escape(text: str) -> str:
    # JSON can hold lone surrogates, and UTF-8 cannot
    return html.escape(printable(text).encode("utf-8", "replace").decode("utf-8"))


# Markdown


def to_markdown(blocks: Sequence[Block], folder: str) -> str:
    """Return the report in GitHub's Markdown. The pictures are files in `folder`."""
    return "\n\n".join(_block_markdown(block, folder) for block in blocks) + "\n"


def _block_markdown(block: Block, folder: str) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Paragraph):
        return f"**Note:** {_plain(block.text)}" if block.warn else _plain(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_plain(item)}" for item in block.items)
    if isinstance(block, Grid):
        marks = " | ".join("---:" if short else "---" for short in _numeric(block))
        lines = ["| " + " | ".join(map(_head_markdown, block.head)) + " |", f"| {marks} |"]
        lines += ["| " + " | ".join(map(_entry_markdown, row)) + " |" for row in block.rows]
        return "\n".join(lines)
    if isinstance(block, Fold):
        inner = "\n\n".join(_block_markdown(one, folder) for one in block.blocks)
        return f'<details markdown="1">\n<summary>{_plain(block.title)}</summary>\n\n{inner}\n\n</details>'
    return "\n".join(f"![{_plain(picture.alt)}]({folder}/{picture.name}.svg)" for picture in block.pictures)


def _head_markdown(name: str) -> str:
    return "<br>".join(map(_plain, name.split("\n")))


def _entry_markdown(entry: Entry) -> str:
    tags = {
        "best": ("**", "**"),
        "clear": ("**", "**"),
        "second": ("<u>", "</u>"),
        "warn": ("*", "*"),
        "chance": ("<i>", "</i>"),
    }
    shown = [(text, *tags.get(mark, ("", ""))) for text, mark in entry if mark != "hover"]
    return "<br>".join(f"{before}{_plain(text)}{after}" for text, before, after in shown)


def _plain(text: str) -> str:
    text = html.escape(printable(text).encode("utf-8", "replace").decode("utf-8"), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split()))
