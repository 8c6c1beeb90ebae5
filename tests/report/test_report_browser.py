"""The report's page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from report_records import make_record, save

from unipelt.report import write_report
from unipelt.report.paper import paper

# The page in a browser

MEASURE = """<script>
const edges = item => { const box = item.getBoundingClientRect(); return [box.left, box.right, box.top] };
addEventListener("load", () => {
  const seen = {
    wide: document.documentElement.scrollWidth, inner: innerWidth,
    boxes: [...document.querySelectorAll(".scroll")].map(box => [box.scrollWidth, box.clientWidth]),
    pictures: [...document.images].map(picture => [picture.naturalWidth, picture.getBoundingClientRect().right]),
    alts: [...document.images].map(picture => picture.alt.length),
    font: parseFloat(getComputedStyle(document.querySelector("td")).fontSize),
    grey: getComputedStyle(document.querySelector(".chance")).color,
    folds: [...document.querySelectorAll("details")].map(fold => fold.open),
    hover: document.querySelector("td[title]").title,
  };
  const table = document.querySelector("table.two");
  const averages = [...table.querySelectorAll("tr")].map(row => row.children[1]);
  seen.chart = edges(document.querySelector("figure img"));
  seen.table = edges(table);
  seen.before = averages.map(edges);
  table.parentNode.scrollLeft = 10000;
  seen.scrolled = table.parentNode.scrollLeft;
  seen.after = averages.map(edges);
  seen.last = edges(table.querySelector("tbody tr").lastElementChild);
  document.querySelectorAll("details").forEach(fold => { fold.open = true });
  seen.opened = document.documentElement.scrollWidth;
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""


def browse(*words: str) -> str:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [420, 1300])
def test_the_page_in_chromium_fits_phone_and_desk(tmp_path: Path, width: int) -> None:
    """Realistic data: the paper's own numbers with noise, two values of K, all tasks."""
    generator = np.random.default_rng(0)
    records = [
        make_record(task, method, seed, float(np.clip(number.mean / 100 + generator.normal(0, 0.02), 0, 1)), k=k)
        for (k, method, task), number in paper().items()
        if k in (100, 500) and task != "average" and "," not in method
        for seed in (1, 2)
    ]
    long_name = "unipelt-apl, adapter.bottleneck=96, lora.rank=16, gate.pooling=mean, prefix.gating=mass"
    save(tmp_path / "runs", *records, make_record("rte", "unipelt-apl", name=long_name))
    write_report(tmp_path / "runs", tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("default-src 'none';") == 1
    page = page.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    (tmp_path / "copy.html").write_text(page.replace("</body>", f"{MEASURE}</body>"))
    # in a frame, as chromium's own window cannot be as narrow as a phone
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><pre></pre><script>addEventListener("message", event => {{'
        f'document.querySelector("pre").textContent = event.data}})</script>'
        f'<iframe src="copy.html" style="border:0;width:{width}px;height:3000px"></iframe></body>'
    )
    profile, address = f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()
    found = re.search(r"<pre>(\{.*?\})</pre>", browse(profile, "--virtual-time-budget=5000", "--dump-dom", address))
    assert found, "the page did not load"
    seen = json.loads(found[1])
    assert seen["inner"] == width
    assert seen["wide"] <= width, "the page scrolls sideways"
    assert all(client <= width for _, client in seen["boxes"])
    assert seen["opened"] <= width, "nor with its folds open"
    assert not any(seen["folds"])
    assert "n = 2" in seen["hover"]
    assert seen["grey"] == "rgb(107, 114, 128)"
    assert min(seen["alts"]) > 40
    assert seen["chart"][2] < 300, "the chart is at the top"
    assert seen["chart"][1] - seen["chart"][0] > 350
    for left, right, _ in (*seen["before"], *seen["after"]):
        assert 0 <= left < right <= width, "the average is in sight, wherever the table is scrolled to"
    if width < 600:
        assert seen["scrolled"] > 0, "wide tables scroll inside their boxes"
        assert seen["after"][0][1] < seen["last"][0], "the last task is beside the average then, not below it"
    else:
        assert seen["table"][1] <= width, "the table of scores is whole"
        assert seen["scrolled"] == 0
    assert len(seen["pictures"]) == page.count("<img ") > 30
    assert all(natural > 0 and right <= width for natural, right in seen["pictures"])
    assert seen["font"] >= 12

    picture = tmp_path / "page.png"
    browse(profile, f"--window-size={max(width, 500)},3000", f"--screenshot={picture}", address)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000, "an empty page is smaller"
    printed = tmp_path / "page.pdf"
    browse(profile, f"--print-to-pdf={printed}", (tmp_path / "out" / "index.html").as_uri())
    assert printed.read_bytes().startswith(b"%PDF")
