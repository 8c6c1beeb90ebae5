"""Hooks of the docs site: tables made from the library, and mathematics rendered by KaTeX while the site is built.

Formulas need `npm` and `node`. KaTeX (MIT) is fetched once into `.cache/katex` and renders every formula to HTML and
MathML. Its style sheet and fonts are copied into the site, so pages load nothing from elsewhere and run no script for
formulas. Without `npm` formulas stay as TeX.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent.parent
KATEX = "0.19.1"
KATEX_FOLDER = HOME / ".cache" / "katex"
_STYLE = "assets/katex/katex.min.css"
_LOG = logging.getLogger("mkdocs.hooks")
_RENDER = """
const katex = require(process.argv[1]);
const formulas = JSON.parse(require("fs").readFileSync(0, "utf8"));
const made = formulas.map(([tex, displayMode]) => katex.renderToString(tex, {displayMode, throwOnError: true}));
process.stdout.write(JSON.stringify(made));
"""


def on_config(config: Any) -> Any:
    """Import this package, whichever else is installed; add KaTeX's style sheet where KaTeX is there."""
    sys.path.insert(0, str(HOME))
    if katex_folder() is not None:
        config["extra_css"].append(_STYLE)
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables that a page asks for into it."""
    for name, make in {"presets": presets, "commands": commands}.items():
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Render a page's formulas."""
    folder = katex_folder()
    pattern = r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>'
    formulas = [(html.unescape(tex), kind == "[") for _, kind, tex in re.findall(pattern, content, re.S)]
    if folder is None or not formulas:
        return content
    command = ["node", "-e", _RENDER, str(folder / "katex.min.js")]
    done = subprocess.run(command, input=json.dumps(formulas), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"a formula is not TeX that KaTeX knows: {done.stderr[-600:]}")
    made = iter(json.loads(done.stdout))

    def put(match: re.Match[str]) -> str:
        return f'<{match[1]} class="arithmatex">{next(made)}</{match[1]}>'

    return re.sub(pattern, put, content, flags=re.S)


def on_post_build(config: Any) -> None:
    """Copy KaTeX's style sheet, fonts and licence into the site."""
    folder = katex_folder()
    if folder is None:
        return
    place = Path(config["site_dir"]) / Path(_STYLE).parent
    place.mkdir(parents=True, exist_ok=True)
    for name in ("katex.min.css", "LICENSE"):
        shutil.copy(folder / name, place / name)
    shutil.copytree(folder / "fonts", place / "fonts", dirs_exist_ok=True)


@cache
def katex_folder() -> Path | None:
    """The folder with KaTeX, fetched if it is not there; None where it cannot be had."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        _LOG.info("formulas stay as TeX: there is no npm")
        return None
    folder = KATEX_FOLDER / KATEX
    if not (folder / "katex.min.js").is_file():
        KATEX_FOLDER.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"katex@{KATEX}"]
        done = subprocess.run(command, cwd=KATEX_FOLDER, capture_output=True, text=True, check=False)
        if done.returncode:
            _LOG.info("formulas stay as TeX: npm cannot fetch KaTeX")
            return None
        wanted = re.compile(r"package/(?:dist/(katex\.min\.(?:js|css)|fonts/[\w-]+\.woff2)|(LICENSE))")
        with tarfile.open(KATEX_FOLDER / done.stdout.strip().splitlines()[-1]) as archive:
            for member in archive:
                if match := wanted.fullmatch(member.name):
                    file = archive.extractfile(member)
                    assert file is not None
                    path = folder / (match[1] or match[2])
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(file.read())
    return folder


def presets() -> str:
    """The presets with their parts and their parameter counts on BERT-base."""
    import torch
    from transformers import BertConfig, BertModel

    import unipelt
    from unipelt.config import SUBMODULES

    with torch.device("meta"):
        model = BertModel(BertConfig())
    rows = ["| preset | parts | gates | trained | deployed |", "| --- | --- | --- | ---: | ---: |"]
    for name, config in unipelt.PRESETS.items():
        names = ("adapter", "prefix", "lora", "prompt", *SUBMODULES)
        parts = {part: value for part in names if (value := config.part(part)) is not None}
        what = ", ".join(parts) or ("biases" if config.bitfit else "every weight")
        gates = "yes" if any(part.gate for part in parts.values()) else ""
        with torch.device("meta"):
            unipelt.inject(model, config)
        counts = unipelt.parameter_counts(model)
        unipelt.remove(model)
        rows.append(f"| `{name}` | {what} | {gates} | {counts.trained:,} | {counts.deployed:,} |")
    return "\n".join(rows)


def commands() -> str:
    """What each command says of itself."""
    from unipelt import cli

    sections = []
    running = ("demo", "run", "configs", "sweep", "status")
    with sample_terminal():
        for name in (*running, "report", "collect", "fold", "rerun", "export", "push"):
            sections.append((f"unipelt {name}", help_of(cli.main, [name, "--help"])))
    return "\n\n".join(f"## `{title}`\n\n```text\n{text.strip()}\n```" for title, text in sections)


def help_of(function: Any, argument: Any) -> str:
    """What a function prints before it leaves."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        function(argument)
    return output.getvalue()


@contextlib.contextmanager
def sample_terminal() -> Any:
    """Lines of 96 characters, whatever the terminal's width."""
    import os

    before, old = os.environ.get("COLUMNS"), sys.argv
    os.environ["COLUMNS"] = "96"
    try:
        yield
    finally:
        sys.argv = old
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
