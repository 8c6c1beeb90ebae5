"""The results page of the docs site in a browser: its table is whole at 1300 px, and the average is always in sight."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
MEASURE = """<script>
const edges = item => { const box = item.getBoundingClientRect(); return [box.left, box.right, box.top] };
addEventListener("load", () => {
  const table = [...document.querySelectorAll("table")].find(one => one.rows[0].cells[1].innerText == "average");
  const seen = { chart: edges(document.querySelector("article img")), table: edges(table), inner: innerWidth,
                 wide: document.documentElement.scrollWidth };
  for (const name of ["before", "after"]) {
    seen[name] = [...table.rows].map(row => edges(row.cells[1]));
    for (let item = table; item != document.body; item = item.parentElement) item.scrollLeft = 9000;
  }
  seen.last = edges(table.rows[1].cells[9]);
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=HOME, check=True, capture_output=True, timeout=300)
    page = folder / "evidence" / "index.html"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [420, 1300])
def test_the_results_page_in_chromium(site: Path, tmp_path: Path, width: int) -> None:
    frame = tmp_path / "frame.html"
    address = (site / "evidence" / "index.html").as_uri()
    frame.write_text(
        '<body style="margin:0"><pre></pre><script>addEventListener("message", event => {'
        'if (typeof event.data == "string" && event.data[0] == "{") '
        'document.querySelector("pre").textContent = event.data})</script>'
        f'<iframe src="{address}" style="border:0;width:{width}px;height:2000px"></iframe></body>'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=6000", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *options, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"<pre>(\{.*?\})</pre>", done.stdout)
    assert found, "the page did not load"
    seen = json.loads(found[1])
    assert seen["inner"] == width
    assert seen["wide"] <= width, "the page scrolls sideways"
    assert seen["chart"][2] < 450, "the chart leads"
    for left, right, _ in (*seen["before"], *seen["after"]):
        assert 0 <= left < right <= width, "the average is in sight, wherever the table is scrolled to"
    if width == 1300:
        assert seen["table"][1] <= width, "the table is whole"
        assert seen["before"] == seen["after"]
    else:
        assert seen["last"][1] <= width, "or the table was not scrolled to its end"
        assert seen["after"][1][1] <= seen["last"][0], "the average covers no other column then"
