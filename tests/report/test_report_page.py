"""Reports: the files that are written, and what the page says."""

from __future__ import annotations

import html
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_records import make_record, plan, results_of, save, spoil

from unipelt.cli import main
from unipelt.report import ReportError, read_results, write_report
from unipelt.report.blocks import Fold, Items, Paragraph
from unipelt.report.differences import compare_all
from unipelt.report.latex import to_latex
from unipelt.report.lead import lead_sentences
from unipelt.report.page import PAPER, compose
from unipelt.report.provenance import describe_provenance


def test_gates_that_a_submodule_lacks_in_some_layers_stay_empty(tmp_path: Path) -> None:
    records = [make_record("rte", "unipelt-ap", name=name) for name in ("mine: a", "mine? a")]
    spoil(records[0], gates__values={"adapter": {"mean": [0.31, 0.72]}, "prefix": {"mean": [0.57]}})
    save(tmp_path / "runs", *records)
    found = {path.stem: path for path in write_report(tmp_path / "runs", tmp_path / "out") if path.suffix == ".svg"}
    words = [item.text for item in ElementTree.fromstring(found["gates-rte-100-mine-a"].read_bytes()).iter()]
    assert [words.count(number) for number in ("0.31", "0.72", "0.57")] == [1, 1, 1]
    assert "nan" not in words
    assert {"gates-rte-100-mine-a", "gates-rte-100-mine-a-3"} <= found.keys(), (
        "names that differ only in signs that no file may have"
    )


def test_gates_that_are_none_are_left_out_with_a_reason(tmp_path: Path) -> None:
    records = [make_record(method="unipelt-ap") for _ in range(3)]
    for record, gates in zip(
        records, ({"layers": [4], "values": {}}, {"layers": 4, "values": {"a": 1}}, {}), strict=True
    ):
        record["gates"] = gates
    save(tmp_path, make_record(), *records)
    results = read_results(tmp_path)
    assert len(results.runs) == 1
    assert [reason for _, reason in results.left_out][-1] == "its gates are not layers by submodules"


def test_the_command_names_the_files_that_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "runs", make_record())
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(printed) == sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())


# Files


class Reader(HTMLParser):
    """Notes tags, links and sources, and whether tags close as they open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.stray: list[str] = []
        self.named: list[tuple[str, dict[str, str], str]] = []  # tags with their attributes and the text that follows
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.named.append((tag, {name: value or "" for name, value in attrs}, ""))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        self.named[-1:] = [(*found[:2], (found[2] + data).strip()) for found in self.named[-1:]]
        if data.strip() and not {"body", "title", "style"} & {*self.open}:
            self.stray.append(data)


def test_the_page_needs_nothing_else_and_escapes_what_comes_from_files(tmp_path: Path) -> None:
    hostile = "<script>alert('$x_{$|`*')</script><img src=http://x.example/ onerror=y>\n\ud800"
    records = [make_record("mnli", "unipelt-ap", seed, name=hostile) for seed in (1, 2)]
    for record in records:
        record["task"]["notes"] = [hostile]
        record["hardware"]["cpu"] = hostile
        record["model"]["name"] = hostile
        record["packages"][hostile] = hostile
    save(tmp_path / "runs", *records, make_record("mnli", "adapter"))
    (tmp_path / "runs" / hostile[:8].replace("/", "")).mkdir()
    (tmp_path / "runs" / "<script>" / "result.json").write_text("<script>")
    files = write_report(tmp_path / "runs", tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    reader = Reader(page)
    assert reader.open == []
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(reader.tags)
    assert reader.handlers == []
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) or link == PAPER for link in reader.links)
    assert reader.links.count(PAPER) == 1
    assert reader.stray == [], "text stands in the page and in its title"
    once = ["html", "head", "title", "style", "body", "nav"]
    assert [tag for tag in reader.tags if tag in once] == once
    heads = {found["id"]: text for tag, found, text in reader.named if tag in ("h1", "h2", "h3")}
    assert len(heads) == sum(tag in ("h1", "h2", "h3") for tag in reader.tags), "each has a name of its own"
    sections = {
        found["href"].removeprefix("#"): text
        for tag, found, text in reader.named
        if tag == "a" and "#" in found["href"]
    }
    assert sections == {found["id"]: text for tag, found, text in reader.named if tag == "h2"}
    assert "url(" not in page
    assert "@import" not in page
    assert any("<script>alert(" in word for word in reader.words), "it is there, as text"
    assert [found.get("class") for tag, found, _ in reader.named if tag == "table"] == [None] * 3, (
        "of one task there is no average, which would stay beside the names"
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<script" not in text
    assert "<img" not in text
    for path in files:
        if path.suffix == ".svg":
            root = ElementTree.fromstring(path.read_bytes())
            assert not [item for item in root.iter() if item.tag.endswith("}script")]
            links = [value for item in root.iter() for key, value in item.attrib.items() if key.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links), path


def test_every_picture_that_there_are_data_for(tmp_path: Path) -> None:
    records = [
        make_record(task, method, seed, 0.5 + 0.01 * seed, epochs=2 + seed)
        for task in ("rte", "cola")
        for method in ("adapter", "unipelt-ap")
        for seed in (1, 2)
    ]
    wide = [
        make_record(
            "cola", {"preset": "adapter", "adapter": {"bottleneck": 96}}, seed, name="adapter, adapter.bottleneck=96"
        )
        for seed in (1, 2)
    ]
    save(tmp_path / "runs", *records, *wide)
    files = write_report(tmp_path / "runs", tmp_path / "out")
    assert all(path.is_file() for path in files)
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(files), "no drafts"
    names = {path.stem for path in files if path.suffix == ".svg"}
    assert names == {
        *(f"{section}-{task}-100" for section in ("scores", "learning") for task in ("rte", "cola")),
        *(f"gates-{task}-100-unipelt-ap" for task in ("rte", "cola")),
        "sizes-adapter.bottleneck-cola-100",
        "forest-100-adapter",
    }
    texts = {
        path.stem: " ".join("".join(item.itertext()) for item in ElementTree.fromstring(path.read_bytes()).iter())
        for path in files
        if path.suffix == ".svg"
    }
    gates = texts["gates-rte-100-unipelt-ap"]
    assert "0.65" in gates, "the mean over seeds of 0.6 and 0.7"
    assert {"adapter", "prefix", "4", "7", "layer"} <= set(gates.split())
    assert "paper" in texts["scores-rte-100"]
    assert "spearman" not in texts["scores-rte-100"]
    assert "96" in texts["sizes-adapter.bottleneck-cola-100"].split()
    text = (tmp_path / "out" / "report.md").read_text()
    assert set(re.findall(r"\(pictures/(.+?)\.svg\)", text)) == names
    before = {path: path.read_bytes() for path in files}
    write_report(tmp_path / "runs", tmp_path / "out")
    assert {path: path.read_bytes() for path in files} == before, "the same files of the same runs"


def test_where_the_numbers_come_from(tmp_path: Path) -> None:
    records = [make_record("mnli", seed=seed, max_length=128, model="small") for seed in (1, 2)]
    records[1]["code"]["dirty"] = True
    records[1]["packages"]["torch"] = "2.7.0"
    records[1]["hardware"]["gpu"] = "a GPU"
    records[1]["attempts"] = 2
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    for words in (
        "2 finished runs in 1 cell (",
        "**Note:** These runs use another base model",
        "- mnli: a part of the official rows",
        "cccccccccccc with changes (1 run)",
        "**Note:** The code of 1 run had changes that no commit holds: run-001.",
        "torch 2.6.0 and 2.7.0",
        "**Note:** Runs differ in their versions of torch.",
        "a processor, 2 cores, a GPU (1 run)",
        "**Note:** Runs are of several machines",
        "Resumed after a stop: 1 run",
        "max_length=128",
        "Time: 0.03 hours",
    ):
        assert words in text, words


def test_settings_that_differ_between_tasks_are_told(tmp_path: Path) -> None:
    """They set no row apart, since each row has one of them for each task."""
    tokens = {"cola": None, "sst2": None, "rte": 512}
    records = [make_record(task, seed=seed, train_tokens=tokens[task]) for task in tokens for seed in (1, 2)]
    for record in records[:2]:
        del record["settings"]["train_tokens"]  # of a version that did not have it
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "- Setting train_tokens: 512 (2 runs: rte); null (4 runs: cola, sst2)\n" in text
    assert text.count("- Setting ") == 1, "seeds and folders are not worth a line"


def test_what_is_not_whole_is_counted(tmp_path: Path) -> None:
    records = [make_record("rte", seed=seed) for seed in (1, 2, 3, 4)]
    save(tmp_path / "one", records[0], make_record("cola", seed=2))
    (tmp_path / "one" / "sweep.json").write_text(plan(*records[:2]))
    (tmp_path / "one" / "broken").mkdir()
    (tmp_path / "one" / "broken" / "result.json").write_text("{")
    (tmp_path / "one" / "failed").mkdir()
    (tmp_path / "one" / "failed" / "failure.json").write_text('{"error": "why"}')
    end = " Names and reasons are at the end."
    assert note_of(tmp_path / "one") == (
        f"Not whole: 1 planned run without a result, 1 failure, 1 file left out, 2 cells with missing seeds.{end}"
    )
    save(tmp_path / "two", records[0])
    (tmp_path / "two" / "sweep.json").write_text(plan(*records))
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir()
        (tmp_path / "two" / name / "failure.json").write_text('{"error": "why"}')
        (tmp_path / "two" / f"{name}-broken").mkdir()
        (tmp_path / "two" / f"{name}-broken" / "result.json").write_text("{")
    assert note_of(tmp_path / "two") == (
        f"Not whole: 3 planned runs without a result, 2 failures, 2 files left out, 1 cell with missing seeds.{end}"
    )
    save(tmp_path / "whole", *records)
    assert note_of(tmp_path / "whole") == "", "and the model is the paper's"


def note_of(folder: Path) -> str:
    """The warnings of a page, made without its pictures."""
    results = read_results(folder)
    blocks = compose(results, [], folder.name)
    return "".join(block.text for block in blocks if isinstance(block, Paragraph) and block.warn)


def test_the_facts_of_the_runs_are_told_whole() -> None:
    """The settings that all runs share, and those in which the runs differ."""
    shared: dict[str, Any] = {"max_length": 128, "warmup_ratio": 0.1, "trainer": None}
    records = [make_record("rte", seed=seed, batch_size=size, **shared) for seed, size in ((1, 8), (2, 16), (3, 16))]
    spoil(
        records[0],
        model__sha256="0123456789abcdef" * 4,
        hardware={"gpu": "a GPU"},
        code={"commit": None, "dirty": True},
    )
    spoil(records[1], packages={"torch": "2.7.0", "numpy": "2.0"}, code={"commit": "d" * 40, "dirty": None}, attempts=3)
    [fold] = [block for block in describe_provenance(results_of(*records)) if isinstance(block, Fold)]
    [items] = fold.blocks
    assert isinstance(items, Items)
    assert list(items.items) == [
        "Models: bert-base-uncased (BertForSequenceClassification, no SHA-256) (2 runs); "
        "bert-base-uncased (BertForSequenceClassification, SHA-256 0123456789ab…) (1 run)",
        "Machines: a processor, 2 cores (2 runs); unknown, a GPU (1 run)",
        "Commits: unknown with changes (1 run); dddddddddddd (1 run); cccccccccccc (1 run)",
        "Packages: torch 2.6.0 and 2.7.0, numpy 2.0",
        "Resumed after a stop: 1 run",
        "Time: 0.05 hours, of which 0.04 of training",
        "Settings in all runs: train_samples=100, epochs=50, max_length=128, warmup_ratio=0.1",
        "Setting batch_size: 16 (2 runs: rte); 8 (1 run: rte)",
    ]


def test_nothing_to_report_on_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="there is no folder at"):
        write_report(tmp_path / "nowhere", out)
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    with pytest.raises(ReportError, match="holds no finished run"):
        write_report(tmp_path / "runs", out)
    (tmp_path / "runs" / "broken" / "result.json").write_text("{")
    with pytest.raises(ReportError, match=r"left out: broken/result.json, as it is not valid JSON"):
        write_report(tmp_path / "runs", out)
    save(tmp_path / "one", make_record())
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"install the extra 'plot' \(pip install 'unipelt\[plot\]'\)"):
        write_report(tmp_path / "one", out)
    assert not out.exists()


def test_one_run_is_a_folder_too(tmp_path: Path) -> None:
    [path] = save(tmp_path / "runs", make_record(k=None))
    write_report(path.parent, tmp_path / "out")
    assert "Scores, all data" in (tmp_path / "out" / "report.md").read_text()


def lead_of(folder: Path, *records: Mapping[str, Any]) -> list[str]:
    """The sentences at the top of the page."""
    save(folder / "runs", *records)
    write_report(folder / "runs", folder / "out")
    text = (folder / "out" / "report.md").read_text(encoding="utf-8")
    return [line[2:] for line in text.partition("finished run")[0].splitlines() if line.startswith("- ")]


def sentences(*records: Mapping[str, Any]) -> list[str]:
    """The same sentences, without a page."""
    results = results_of(*records)
    tables = [results.table(k) for k in results.ks]
    return lead_sentences(tables, compare_all(tables))


def test_the_page_begins_with_a_chart_and_three_sentences(tmp_path: Path) -> None:
    scores = {"fine-tuning": 0.9, "adapter": 0.7, "lora": 0.65, "unipelt-apl": 0.6}
    records = [
        make_record(task, method, seed, score + 0.01 * seed * (method == "unipelt-apl"))
        for method, score in scores.items()
        for task in ("sst2", "qnli")
        for seed in (1, 2, 3)
    ]
    assert lead_of(tmp_path, *records) == [
        "At K = 100, fine-tuning has the best average over 2 tasks: 90.00 ± 0.00. The best single method is adapter: "
        "70.00 ± 0.00.",
        "unipelt-apl is 8.00 points below adapter (95 % interval −10.48 to −5.52): a clear difference among 3 "  # noqa: RUF001
        "comparisons. The task with the largest difference is sst2, −8.00.",  # noqa: RUF001
        "Every score is clearly above the majority class.",
    ]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.index("<figure>") < page.index("At K = 100, fine-tuning") < page.index("<nav") < page.index("<table")
    alt = html.unescape(re.findall(r'<img alt="([^"]*)"', page)[0])
    assert alt == (
        "Mean difference to adapter, the best single method, in points, with 95 % intervals over seeds: fine-tuning "
        "+20.00 (+20.00 to +20.00); lora −5.00 (−5.00 to −5.00); unipelt-apl −8.00 (−10.48 to −5.52), clear."  # noqa: RUF001
    )


def test_the_sentences_where_there_is_little_to_say(tmp_path: Path) -> None:
    assert lead_of(tmp_path / "one", make_record("rte", score=0.5)) == [
        "At K = 100, adapter has the best score on rte: 50.00.",
        "There is no pair of a combination and a single method to compare.",
        "1 of 1 scores are not clearly above the majority class. No method is clearly above it on rte.",
    ]
    apart = [make_record("rte", "adapter", score=0.5), make_record("sst2", "lora", score=0.9)]
    assert lead_of(tmp_path / "apart", *apart)[0] == (
        "At K = 100, no method has all 2 tasks, so there is no average to compare."
    )
    pair = [make_record("rte", "adapter", score=0.5), make_record("rte", "unipelt-ap", score=0.6)]
    [_, words, _] = sentences(*pair)
    assert words == "There is no pair of a combination and a single method to compare."


def test_the_sentences_are_of_the_table_with_the_most_scores() -> None:
    """The page leads with the runs on all data. K = 100 has the larger difference, but chance may have made it."""
    records = [
        make_record(task, method, seed, score + gain * (method == "unipelt-ap") + 0.01 * (seed == place), k=k)
        for k, tasks, gain in ((100, ("rte",), 0.3), (None, ("sst2", "qnli", "rte"), 0.01))
        for place, task in enumerate(tasks)
        for method, score in (("adapter", 0.6), ("lora", 0.6), ("unipelt-ap", 0.6))[:: 1 if k is None else 2]
        for seed in (1, 2)
    ]
    for record in records[-2:]:
        record["test"]["metrics"]["accuracy"] -= 0.1 * record["settings"]["seed"]
    assert sentences(*records) == [
        "With all data, adapter has the best average over 3 tasks: 60.33 ± 0.00.",
        "unipelt-ap is 4.00 points below adapter (95 % interval −25.18 to +17.18): a difference that chance may have "  # noqa: RUF001
        "made among 3 comparisons. The task with the largest difference is rte, −14.00.",  # noqa: RUF001
        "1 of 9 scores are not clearly above the majority class.",
    ]


def test_scores_at_chance_are_grey_and_never_the_best(tmp_path: Path) -> None:
    records = [make_record("rte", "adapter", score=0.52), make_record("rte", "lora", score=0.4)]
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out", latex=True)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<div class="chance">(.*?)</div>', page) == ["52.00", "40.00"] * 2
    assert "<strong>" not in page
    assert '<div class="minor">majority class</div></th><td><div class="minor">52.70</div>' in page
    tex = (tmp_path / "out" / "report.tex").read_text(encoding="utf-8")
    assert r"\textcolor{gray}{52.00}" in tex
    assert r"\textbf" not in tex


def test_a_table_for_a_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        make_record(task, method, seed, score + 0.01 * seed, name=name)
        for method, score, name in (("adapter", 0.7, "50 % of a_b & c"), ("lora", 0.8, "lora"))
        for task in ("rte", "cola")
        for seed in (1, 2)
    ]
    save(tmp_path / "runs", *records)
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--latex"]) == 0
    assert str(tmp_path / "out" / "report.tex") in capsys.readouterr().out
    lines = (tmp_path / "out" / "report.tex").read_text(encoding="utf-8").splitlines()
    assert r"method & cola & rte & average \\" in lines
    assert r"lora & \textbf{81.50}$_{0.71}$ & \textbf{81.50}$_{0.71}$ & \textbf{81.50}$_{0.71}$ \\" in lines
    assert any(line.startswith(r"50 \% of a\_b \& c & \underline{71.50}") for line in lines)
    assert (
        r"\caption{Test scores in percent, K = 100: mean and standard deviation over 2 seeds; matthews correlation on "
        r"cola, accuracy on rte. Grey: not clearly above the majority class.}"
    ) in lines
    assert r"majority class & 0.00 & 52.70 & 26.35 \\" in lines, "Matthews' correlation of a constant answer is 0"
    write_report(tmp_path / "runs", tmp_path / "plain")
    assert not (tmp_path / "plain" / "report.tex").exists(), "only where it was asked for"


def test_a_table_for_a_paper_with_gaps_and_signs() -> None:
    records = [
        make_record("rte", "adapter", 1, 0.9, name='a^b ~ {c}\\d #$1 "e"'),
        make_record("rte", "lora", 1, 0.8),
        make_record("rte", "lora", 2, 0.9),
        spoil(make_record("stsb", "lora", 1, -0.25), task__labels=[]) | {"majority": None, "majority_of": "test"},
    ]
    text = to_latex([results_of(*records).table(100)])
    assert text.startswith(
        "% \\usepackage{booktabs,xcolor}\n\\begin{table}\n\\centering\n\\begin{tabular}{lrrr}\n\\toprule\n"
    )
    lines = text.splitlines()
    assert (
        r"a\textasciicircum{}b \textasciitilde{} \{c\}\textbackslash{}d \#\$1 ''e'' & \textbf{90.00} & -- & -- \\"
        in lines
    )
    assert r"lora & \underline{85.00}$_{7.07}$ & \textcolor{gray}{$-$25.00} & 30.00 \\" in lines
    assert r"majority class & 52.70 & -- & 26.35 \\" in lines
    assert "over 1 to 2 seeds" in text
    alone = to_latex([results_of(make_record("rte", "lora", 1, 0.8)).table(100)])
    assert "average" not in alone
    assert r"lora & 80.00 \\" in alone.splitlines()


def test_off_glue_the_page_says_nothing_of_the_paper(tmp_path: Path) -> None:
    records = [make_record("custom", method, score=0.8) for method in ("fine-tuning", "lora", "unipelt-apl")]
    for record in records:
        record["settings"] |= {"task": None, "train_file": "shop/reviews.csv"}
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "paper" not in text.lower()
    assert "reviews<br>accuracy" in text
    assert "custom" not in text


def test_gates_share_a_scale_on_which_they_differ(tmp_path: Path) -> None:
    records = [make_record(task, "unipelt-ap") for task in ("rte", "cola")]
    for record, low in zip(records, (0.44, 0.47), strict=True):
        record["gates"]["values"] = {"adapter": {"mean": [low, 0.52]}, "prefix": {"mean": [0.5, 0.51]}}
    save(tmp_path / "runs", *records)
    pictures = [path for path in write_report(tmp_path / "runs", tmp_path / "out") if path.stem.startswith("gates-")]
    ticks = []
    for path in pictures:
        words = ["".join(item.itertext()) for item in ElementTree.fromstring(path.read_bytes()).iter()]
        ticks.append({float(word) for word in words if re.fullmatch(r"0\.\d+", word)})
    assert [max(found) for found in ticks] == [0.55, 0.55]
    assert [min(found - {0.44}) for found in ticks] == [0.45, 0.45], "not from 0 to 1"
