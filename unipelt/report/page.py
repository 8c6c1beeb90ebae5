"""Build the report as a list of blocks. The list is the same for every output format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from unipelt.report.blocks import Block, Fold, Heading, Items, Panels, Paragraph
from unipelt.report.differences import Difference, compare_all
from unipelt.report.lead import lead_sentences
from unipelt.report.pictures import Picture
from unipelt.report.provenance import count, describe_provenance
from unipelt.report.results import Results, Table
from unipelt.report.scores import score_sections
from unipelt.report.sections import (
    compare_costs,
    compare_gates,
    compare_rows,
    compare_with_upper_bounds,
)

PAPER = "https://aclanthology.org/2022.acl-long.433/"


def compose(results: Results, pictures: Sequence[Picture], name: str) -> list[Block]:
    """Return the blocks of the whole report. `name` is the name of the folder."""
    tables = [results.table(k) for k in results.ks]
    differences = compare_all(tables)
    sections: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        sections[picture.section].append(picture)
    blocks: list[Block] = [Heading(1, f"UniPELT: {name}")]
    if sections["forest"]:
        blocks.append(Panels(sections["forest"][:1]))
    blocks.append(Items(lead_sentences(tables, differences)))
    blocks += _summary(results, tables, differences)
    for table in tables:
        blocks += score_sections(table, results)
    blocks += compare_rows(differences, sections["forest"][1:])
    blocks += compare_with_upper_bounds(tables)
    blocks += compare_gates(tables)
    blocks += compare_costs(tables)
    for pictured, title, text in (
        ("sizes", "One number of the method", "Mean over seeds; bars are one standard deviation each way."),
        (
            "scores",
            "Seeds",
            "Boxes are quartiles over seeds, and marks are the seeds."
            + (" A hollow diamond is the paper's mean." if any(table.has_paper for table in tables) else ""),
        ),
        (
            "learning",
            "Learning curves",
            "Dev score by epoch: mean and range over seeds, dotted from where the first of them had ended.",
        ),
        (
            "gates",
            "Gates",
            "Mean gate values on the test data, layers by submodules, averaged over seeds. A gate of 0 is closed, one "
            "of 1 is open. All pictures share one scale of colours, on which nine tenths of the values here lie.",
        ),
    ):
        if sections[pictured]:
            blocks += [Heading(2, title), Paragraph(text), Panels(sections[pictured])]
    blocks += describe_provenance(results)
    return blocks


def _summary(results: Results, tables: Sequence[Table], differences: Sequence[Difference]) -> list[Block]:
    cells = results.cells
    models = sorted({run.record["model"]["name"] for run in results.runs})
    hours = sum(run.record["seconds"]["total"] for run in results.runs) / 3600
    text = (
        f"{count(len(results.runs), 'finished run')} in {count(len(cells), 'cell')} (task, K and method), "
        f"{hours:.1f} hours of computing. Model: {', '.join(models)}."
    )
    blocks: list[Block] = [Paragraph(text)]
    paper = any(table.has_paper for table in tables)
    if paper and models != ["bert-base-uncased"]:
        words = "These runs use another base model than the paper, so gaps to its numbers do not compare methods."
        blocks.append(Paragraph(words, True))
    gaps = [
        (len(results.absent), "planned run without a result"),
        (len(results.failures), "failure"),
        (len(results.left_out), "file left out"),
        (sum(bool(cell.missing) for cell in cells), "cell with missing seeds"),
    ]
    if any(number for number, _ in gaps):
        words = ", ".join(count(number, noun) for number, noun in gaps if number)
        blocks.append(Paragraph(f"Not whole: {words}. Names and reasons are at the end.", True))
    notes = _reading(differences)
    if paper:
        notes.append(f"The paper is Mao et al., UniPELT (ACL 2022), {PAPER}; its numbers are of bert-base-uncased.")
    if notes:
        blocks.append(Fold("How to read this page", [Items(notes)]))
    return blocks


def _reading(differences: Sequence[Difference]) -> list[str]:
    if not differences:
        return []
    return [
        "A difference is a mean over pairs of runs with the same task and the same seed.",
        "The thick bar in the chart is a 95 % t interval over seeds: it says what to expect of these tasks with other "
        "seeds. Each seed counts once, by its average over the tasks.",
        "The thin line is a 95 % t interval over tasks: it says what to expect of other tasks like these, as far as so "
        "few can.",
        "A triangle marks a difference that is clear: its t-test has p < 0.05 after Holm's correction for the "
        f"{len(differences)} comparisons of this page. A circle marks one that chance may have made.",
        "The best single method is the one with the best mean over the tasks among the methods that add one part. "
        "It is picked by the same test scores, so a combination looks rather too bad than too good beside it.",
    ]
