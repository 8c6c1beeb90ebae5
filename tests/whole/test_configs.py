"""Every configuration in `configs/` is parsed, and started on a tiny model; so are sweeps' runs and benchmarks."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import benchmark
import pytest
from tiny import DEPTH, WITH_PREFIX
from tiny_task import save_model, write_glue, write_sentences
from transformers import AutoModelForSequenceClassification

import unipelt
from unipelt.config.methods import UniPELTConfig
from unipelt.config.presets import PRESETS
from unipelt.config.schema import read_mapping
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.glue.tasks import TASKS
from unipelt.runs.options import parse, read_config
from unipelt.runs.run import run as run_task
from unipelt.runs.settings import TrainingSettings, paper_learning_rate
from unipelt.sweep import Sweep, read_sweep
from unipelt.tasks import qa, translation
from unipelt.tasks.settings import QASettings, TaskSettings, TranslationSettings

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".yaml", ".json"))
SWEEPS = [name for name in FILES if "grid" in read_mapping(FOLDER / name)]
BENCHMARKS = [name for name in FILES if "methods" in read_mapping(FOLDER / name)]
TASK_CONFIGS = {"qa-xquad.yaml": QASettings, "translation-multi30k.yaml": TranslationSettings}
"""Configurations of other scripts than run_glue.py."""
CONFIGS = [name for name in FILES if name not in (*SWEEPS, *BENCHMARKS, *TASK_CONFIGS)]
TWINS = [name for name in SWEEPS if name.endswith("-release.yaml")]

TABLE1 = ("fine-tuning", "bitfit", "adapter", "prefix", "lora", "unipelt-ap", "unipelt-apl")
TABLE3 = ("fine-tuning", "adapter", "prefix", "lora", "unipelt-ap-nogate", "unipelt-ap", "unipelt-apl")
RATES = (1e-4, 5e-4, 2e-3, 4e-3)
SIZES = {
    # runs, cells (what differs in more than the seed and the chosen field)
    "table1.yaml": (880, 176),
    "table3.yaml": (56, 56),
    "figure2.yaml": (25, 5),
    "figure3.yaml": (100, 20),
    "ablation-gates.yaml": (320, 64),
    "ablation-gating.yaml": (160, 32),
    "ablation-pooling.yaml": (160, 32),
    "few-shot-minilm.yaml": (3520, 176),
    "evidence-rates.yaml": (62, 62),
    "evidence-k100.yaml": (320, 64),
    "evidence-frozen-heads.yaml": (120, 24),
    "evidence-variants.yaml": (320, 64),
    "evidence-gte-rates.yaml": (30, 30),
    "evidence-gte-k100.yaml": (320, 64),
    "evidence-gte-variants.yaml": (240, 48),
    "evidence-gte-unipelt.yaml": (25, 5),
    "evidence-gte-k500.yaml": (40, 8),
    "evidence-gte-epochs.yaml": (10, 2),
    "evidence-gte-frozen-heads.yaml": (30, 6),
    "evidence-gte-dropout.yaml": (100, 10),
    "evidence-gte-average.yaml": (350, 35),
    "evidence-gte-head-rates.yaml": (12, 12),
    "compare.yaml": (1215, 81),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    save_model(folder / "model")
    write_glue(folder / "glue")
    for name, rows in (("train", 60), ("dev", 20)):
        write_sentences(folder / f"{name}.tsv", rows, seed=rows)
    return folder


def test_there_are_some() -> None:
    assert {"demo.yaml", "rte-apl.yaml", "glue-full.yaml"} <= set(CONFIGS)
    originals = {name.replace("-release.yaml", ".yaml") for name in TWINS}
    assert originals == {"table1.yaml", "table3.yaml", "figure2.yaml", "figure3.yaml"}
    assert set(SWEEPS) == {*SIZES, *TWINS}
    assert BENCHMARKS == ["table4-release.yaml", "table4.yaml"]
    assert set(TASK_CONFIGS) <= set(FILES)


# Single runs


def small(home: Path, name: str) -> list[str]:
    """Options that make a configuration's run one of a second: a tiny model, tiny data, one epoch."""
    fields = read_config(FOLDER / name, RunSettings)
    options = ["--model", str(home / "model"), "--model_sha256", "null", "--epochs", "1", "--threads", "1"]
    options += ["--max_length", "16", "--device", "cpu"]
    if "train_file" in fields:
        options += ["--train_file", str(home / "train.tsv"), "--dev_file", str(home / "dev.tsv")]
    else:
        options += ["--glue_dir", str(home / "glue"), *([] if "task" in fields else ["--task", "sst2"])]
    if fields.get("train_samples") is not None:
        options += ["--train_samples", "32", "--dev_samples", "16"]
    return options


@pytest.mark.parametrize("name", CONFIGS)
def test_is_parsed_and_started(name: str, home: Path, tmp_path: Path) -> None:
    settings = parse([str(FOLDER / name), *small(home, name), "--output_dir", str(tmp_path / "out")], RunSettings)
    record = run(settings, log=lambda line: None)
    assert record["status"] == "finished"
    assert record["method"]["config"] == settings.config.to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_has_a_row_in_the_readme_and_holds_only_what_differs(name: str) -> None:
    assert f"| `{name}` |" in (FOLDER / "README.md").read_text(encoding="utf-8")
    # precision: the default, and not what its base says
    assert repeated_defaults(read_config(FOLDER / name, RunSettings)) in ([], ["dev_samples"], ["precision"])


def repeated_defaults(values: Mapping[str, Any], kind: type[TrainingSettings] = RunSettings) -> list[str]:
    """The fields that say what is the default anyway."""
    given = {key: value for key, value in values.items() if key not in ("model", "method")}
    defaults = {item: getattr(kind, item, None) for item in given}
    return [key for key, value in given.items() if value == defaults[key] and value is not None]


@pytest.mark.parametrize("family", ["roberta", "bart", "t5", "gpt2", "albert", "deberta-v2"])
def test_a_run_with_a_model_of_another_architecture(family: str, home: Path, tmp_path: Path) -> None:
    """BART's outputs hold more than logits, GPT-2's tokenizer has no padding token, ALBERT's layers are shared."""
    model = save_model(tmp_path / family, family)
    method = "unipelt-apl" if family in WITH_PREFIX else "unipelt-al"
    name = "bart.yaml" if family == "bart" else "roberta.yaml"
    options = [*small(home, name), "--model", str(model), "--method", method, "--do_predict", "true"]
    record = run(
        parse([str(FOLDER / name), *options, "--output_dir", str(tmp_path / "out")], RunSettings), log=lambda line: None
    )
    assert record["status"] == "finished"
    assert record["model"]["class"].endswith("ForSequenceClassification")
    depth = {len(gate["mean"]) for gate in record["gates"]["values"].values()}
    assert depth == {DEPTH}
    assert ("cross.lora_value" in record["gates"]["values"]) == (family in ("bart", "t5"))
    again = unipelt.load(
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=2), tmp_path / "out" / "model"
    )
    assert unipelt.parameter_counts(again).trained == record["parameters"]["trained"]


# Single runs of other tasks


def write_tasks(folder: Path) -> Path:
    """Ten short articles with a question each, and twelve pairs of sentences."""
    texts = ["the cat sat on the mat", "a dog ran and then it was on a mat"]
    articles = []
    for index in range(10):
        asked = {"id": f"q{index}", "question": "was the cat", "answers": [{"text": "mat", "answer_start": 0}]}
        asked["answers"][0]["answer_start"] = texts[index % 2].index("mat")  # type: ignore[index]
        articles.append({"paragraphs": [{"context": texts[index % 2], "qas": [asked]}]})
    (folder / "xquad_en").mkdir(parents=True)
    (folder / "xquad_en" / "xquad.en.json").write_text(json.dumps({"data": articles}), encoding="utf-8")
    (folder / "multi30k").mkdir()
    for name in ("train", "val", "test_2016_flickr"):
        for ending, text in (("en", "the cat sat"), ("de", "die Katze sitzt")):
            (folder / "multi30k" / f"{name}.{ending}").write_text(f"{text}\n" * 12, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "kind"), TASK_CONFIGS.items())
def test_of_another_task_is_parsed_and_started(name: str, kind: type[TaskSettings], home: Path, tmp_path: Path) -> None:
    options = ["--tasks_dir", str(write_tasks(tmp_path / "tasks")), "--output_dir", str(tmp_path / "out")]
    options += ["--epochs", "1", "--threads", "1", "--device", "cpu", "--max_length", "16"]
    if kind is QASettings:
        options += ["--model", str(home / "model"), "--model_sha256", "null", "--stride", "4"]
        settings = parse([str(FOLDER / name), *options], QASettings)
        record = run_task(settings, qa.prepare, log=lambda line: None)
    else:
        options += ["--random_width", "32", "--random_layers", "1", "--vocabulary", "60"]
        record = run_task(
            parse([str(FOLDER / name), *options], TranslationSettings), translation.prepare, log=lambda line: None
        )
    assert record["status"] == "finished"


@pytest.mark.parametrize(("name", "kind"), TASK_CONFIGS.items())
def test_of_another_task_has_a_row_in_the_readme_and_holds_only_what_differs(
    name: str, kind: type[TaskSettings]
) -> None:
    rows = re.findall(rf"^\| `{re.escape(name)}` \|(.*)\|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 1
    assert all(column.strip() for column in rows[0].split("|"))
    assert repeated_defaults(read_config(FOLDER / name, kind=kind), kind) == []


# Sweeps


@cache
def sweep_of(name: str) -> Sweep:
    return read_sweep(FOLDER / name)


def runs_of(name: str) -> tuple[RunSettings, ...]:
    return sweep_of(name).runs


@cache
def digests(name: str) -> frozenset[str]:
    return frozenset(settings.digest() for settings in runs_of(name))


def key(settings: RunSettings) -> tuple[Any, ...]:
    return settings.task, settings.train_samples, settings.method_name, settings.seed


def released(config: UniPELTConfig) -> UniPELTConfig:
    """The same method as the authors' program runs it."""
    parts = (config.adapter, config.prefix, config.lora)
    if any(part is not None and part.gate for part in parts):
        return config.updated({"gate": {"pooling": "mean"}})
    alone = config.adapter is None and not config.train_base
    return replace(config, train_head=False) if alone else config


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_has_its_number_of_runs_and_cells(name: str) -> None:
    sweep = sweep_of(name)
    runs, cells = SIZES[name.replace("-release.yaml", ".yaml")]
    assert len(digests(name)) == len(sweep.runs) == runs
    sizes = Counter(sweep.cell(settings) for settings in sweep.runs)
    assert len(sizes) == cells
    assert set(sizes.values()) == {runs // cells}, "every cell has the same seeds"


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_changes_nothing_but_task_size_method_and_seed(name: str) -> None:
    """All else is the paper's protocol, which is the default; of the evidence, what its base says in one place."""
    free = ["task", "train_samples", "method", "seed", "data_seed", "learning_rate", "output_dir", "glue_dir"]
    free += ["pad_to_max_length"] if name in TWINS else []
    own = name in ("few-shot-minilm.yaml", "compare.yaml") or name.startswith("evidence-")
    if own:
        free += ["model", "model_sha256"]
    if name == "compare.yaml" or name.startswith("evidence-"):
        free += [key for key in read_mapping(FOLDER / "evidence.yaml") if key != "base"]
    free += ["average", "select"] if name in ("evidence-gte-average.yaml", "evidence-gte-dropout.yaml") else []
    free += ["rates"] if name == "evidence-gte-head-rates.yaml" else []
    for settings in runs_of(name):
        changed = [item.name for item in fields(settings) if getattr(settings, item.name) != item.default]
        assert set(changed) <= set(free)
        assert settings.data_seed == settings.seed, "another sample of the training data for every seed"
        assert settings.task in TASKS
        if not own:
            assert settings.learning_rate == paper_learning_rate(settings.config)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_has_a_row_in_the_readme_with_its_number_of_runs(name: str) -> None:
    rows = re.findall(rf"^\| `{re.escape(name)}` \|(.*)\|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 1
    makes, runs, paper, cost = (column.strip() for column in rows[0].split("|"))
    assert all((makes, paper, cost))
    assert int(runs) == len(runs_of(name))


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_holds_only_what_differs(name: str) -> None:
    values = read_mapping(FOLDER / name)
    bases = values.get("base", [])
    inherited: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        inherited |= read_config(FOLDER / base, RunSettings)
    own = {key: value for key, value in values.items() if key not in ("base", "grid", "choose")}
    assert [key for key, value in own.items() if key in inherited and value == inherited[key]] == []
    assert repeated_defaults({key: value for key, value in own.items() if key not in inherited}) == []
    for block in values["grid"]:
        methods = block["method"] if isinstance(block["method"], list) else [block["method"]]
        for method in methods:
            if isinstance(method, str):
                assert method in PRESETS, "a mapping beside it would say more"
                continue
            preset = PRESETS[method["preset"]].to_dict()
            for part, change in method.items():
                if part == "preset":
                    continue
                assert change != preset.get(part)
                if isinstance(change, dict) and part in preset:
                    assert not any(value == preset[part].get(field) for field, value in change.items())


def test_table_1_is_the_papers_grid() -> None:
    grid = {
        (task, samples, method, seed)
        for task in TASKS
        for samples in (100, 500, 1000)
        for method in TABLE1
        for seed in range(1, 6)
    }
    grid |= {(task, 100, "prefix, prefix.length=50", seed) for task in TASKS for seed in range(1, 6)}
    assert {key(settings) for settings in runs_of("table1.yaml")} == grid


def test_table_3_is_the_papers_grid_on_all_data() -> None:
    grid = {(task, None, method, 1) for task in TASKS for method in TABLE3}
    assert {key(settings) for settings in runs_of("table3.yaml")} == grid


def test_figure_2_widens_the_adapter_and_nothing_else() -> None:
    runs = runs_of("figure2.yaml")
    adapters = [settings.config.adapter for settings in runs]
    assert {(settings.task, settings.train_samples) for settings in runs} == {("cola", 100)}
    assert sorted({adapter.bottleneck for adapter in adapters if adapter is not None}) == [48, 96, 128, 192, 256]
    assert all(replace(settings.config, adapter=PRESETS["adapter"].adapter) == PRESETS["adapter"] for settings in runs)


def test_figure_3_scales_lora_and_nothing_else() -> None:
    runs = runs_of("figure3.yaml")
    parts = [settings.config.lora for settings in runs]
    assert {part.alpha / part.rank for part in parts if part is not None} == {1, 2, 4, 8, 16}
    assert {part.rank for part in parts if part is not None} == {8}
    assert all(replace(settings.config, lora=PRESETS["lora"].lora) == PRESETS["lora"] for settings in runs)
    places = {(settings.task, settings.train_samples) for settings in runs}
    assert places == {("cola", 100), ("cola", 1000), ("sst2", 100), ("sst2", 1000)}


def test_the_ablation_of_gates_has_every_subset_of_them() -> None:
    runs = runs_of("ablation-gates.yaml")
    gates: Counter[tuple[bool, ...]] = Counter()
    for settings in runs:
        config = settings.config
        gates[tuple(part is not None and part.gate for part in (config.adapter, config.prefix, config.lora))] += 1
        opened = {"adapter": {"gate": True}, "prefix": {"gate": True}, "lora": {"gate": True}}
        assert config.updated(opened) == PRESETS["unipelt-apl"]
    assert len(gates) == 8
    assert {settings.train_samples for settings in runs} == {100}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ablation-gating.yaml", {"prefix": {"gating": "mass"}}),
        ("ablation-pooling.yaml", {"gate": {"pooling": "mean"}}),
    ],
)
def test_an_ablation_sets_the_paper_against_one_change(name: str, change: dict[str, Any]) -> None:
    configs = [PRESETS[method] for method in ("unipelt-ap", "unipelt-apl")]
    wanted = {repr(config) for config in [*configs, *(config.updated(change) for config in configs)]}
    runs = runs_of(name)
    assert {repr(settings.config) for settings in runs} == wanted
    assert {settings.train_samples for settings in runs} == {100}


def test_the_sweep_of_minilm_is_table_1_with_one_grid_of_learning_rates_for_all_methods() -> None:
    sweep = sweep_of("few-shot-minilm.yaml")
    assert sweep.chosen == ("learning_rate",)
    rates: dict[tuple[Any, ...], list[float | None]] = {}
    for settings in sweep.runs:
        rates.setdefault(key(settings), []).append(settings.learning_rate)
    assert set(rates) == {key(settings) for settings in runs_of("table1.yaml")}
    assert all(sorted(map(float, values)) == sorted(RATES) for values in rates.values())  # type: ignore[arg-type]
    assert {settings.model for settings in sweep.runs} == {read_config(FOLDER / "minilm.yaml", RunSettings)["model"]}


def evidence_rates(model: str = "") -> dict[str, float | None]:
    """The learning rate of each method in the table; the same for all tasks and seeds."""
    rates = {(settings.method_name, settings.learning_rate) for settings in runs_of(f"evidence-{model}k100.yaml")}
    assert len(rates) == len(dict(rates))
    return dict(rates)


@pytest.mark.parametrize("model", ["", "gte-"])
def test_the_evidence_is_table_1_at_100_examples_with_a_learning_rate_for_each_method(model: str) -> None:
    table, wanted = runs_of(f"evidence-{model}k100.yaml"), runs_of("table1.yaml")
    assert {key(settings) for settings in table} == {key(one) for one in wanted if one.train_samples == 100}
    rates = evidence_rates(model)
    assert rates.pop("prefix, prefix.length=50") == rates["prefix"], "not chosen for itself"
    tried = runs_of(f"evidence-{model}rates.yaml")
    assert {settings.seed for settings in tried} == {0}
    assert {(settings.method_name, settings.learning_rate) for settings in tried} > set(rates.items())
    budgets = {(one.epochs, one.patience, one.batch_size, one.dev_samples) for one in (*table, *tried)}
    assert budgets == {(15, None, 16, 200)}


def test_frozen_heads_are_the_only_difference_from_the_evidence() -> None:
    rates = evidence_rates()
    runs = runs_of("evidence-frozen-heads.yaml")
    assert {settings.config for settings in runs} == {
        PRESETS[name].updated({"train_head": False}) for name in ("prefix", "lora", "bitfit")
    }
    assert all(settings.learning_rate == rates[settings.method_name.split(",")[0]] for settings in runs)
    seen = {(settings.task, settings.seed) for settings in runs}
    assert seen == {(settings.task, settings.seed) for settings in runs_of("evidence-k100.yaml")}


@pytest.mark.parametrize("model", ["", "gte-"])
def test_variants_have_the_learning_rate_of_all_gates(model: str) -> None:
    assert {settings.learning_rate for settings in runs_of(f"evidence-{model}variants.yaml")} == {
        evidence_rates(model)["unipelt-apl"]
    }


def test_the_recommended_preset_is_beside_every_method_with_a_rate_that_was_tried() -> None:
    runs = runs_of("evidence-gte-unipelt.yaml")
    assert {settings.config for settings in runs} == {PRESETS["unipelt"]}
    tried = {one.learning_rate for one in runs_of("evidence-gte-rates.yaml") if one.method_name == "unipelt"}
    [rate] = {settings.learning_rate for settings in runs}
    assert min(tried) < rate < max(tried)  # type: ignore[type-var, operator]
    beside = {(one.task, one.seed, one.train_samples, one.epochs) for one in runs_of("evidence-gte-k100.yaml")}
    assert {(one.task, one.seed, one.train_samples, one.epochs) for one in runs} < beside


def test_averages_and_dropout_have_the_rates_and_the_methods_of_the_evidence() -> None:
    """All have an average; dropout is beside the same methods without it."""
    rates = evidence_rates("gte-") | {
        one.method_name: one.learning_rate for one in runs_of("evidence-gte-unipelt.yaml")
    }
    places = {(task, seed) for task in ("stsb", "qqp", "sst2", "qnli", "mnli") for seed in range(6, 16)}
    rows: dict[str, set[tuple[Any, int]]] = {}
    for name in ("evidence-gte-average.yaml", "evidence-gte-dropout.yaml"):
        for settings in runs_of(name):
            assert settings.learning_rate == rates[settings.method_name.split(",")[0]]
            assert (settings.train_samples, settings.average) == (100, {"last": 5})
            assert settings.select == ("dropout" in name)
            rows.setdefault(settings.method_name, set()).add((settings.task, settings.seed))
    assert all(seen == places for seen in rows.values())
    plain = {row for row in rows if "dropout" not in row}
    own = 'unipelt-apl, prefix.softmax="own"'
    assert plain == {"fine-tuning", "bitfit", "adapter", "lora", "unipelt-apl", own, "unipelt"}
    assert rows.keys() - plain == {f"{row}, gate.dropout=0.1" for row in ("unipelt-apl", "unipelt")}


def test_rates_of_heads_are_beside_runs_of_the_evidence_with_one_rate() -> None:
    files = ("evidence-gte-k100.yaml", "evidence-gte-unipelt.yaml")
    others = {one.digest() for name in files for one in runs_of(name)}
    runs = runs_of("evidence-gte-head-rates.yaml")
    assert {replace(one, rates=None).digest() for one in runs} < others
    assert {one.method_name for one in runs} == {"unipelt", "lora"}
    assert all((one.rates or {})["head"] > (one.learning_rate or 0) for one in runs)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_differs_by_the_releases_protocol_only(name: str) -> None:
    originals = runs_of(name.replace("-release.yaml", ".yaml"))
    wanted = {
        replace(settings, method=released(settings.config).to_dict(), pad_to_max_length=True).digest()
        for settings in originals
    }
    assert digests(name) == wanted


def all_runs(name: str) -> list[RunSettings]:
    """The runs of a sweep, or the one run of another file."""
    return [*runs_of(name)] if name in SWEEPS else [RunSettings(**read_config(FOLDER / name, RunSettings))]


def test_what_a_twin_freezes_and_pools() -> None:
    """Said once in words, so that the test above cannot agree with a rule that is wrong."""
    configs = {settings.method_name: settings.config for settings in runs_of("table1-release.yaml")}
    frozen = {name.split(",")[0] for name, config in configs.items() if not config.train_head}
    padded = {name.split(",")[0] for name, config in configs.items() if config.gate.pooling == "mean"}
    assert len(configs) == 8
    assert frozen == {"bitfit", "prefix", "lora"}
    assert padded == {"unipelt-ap", "unipelt-apl"}
    assert all(settings.pad_to_max_length for name in (*TWINS, "rte-apl-release.yaml") for settings in all_runs(name))
    assert not any(settings.pad_to_max_length for settings in runs_of("table1.yaml"))


def first_runs() -> list[Any]:
    """The first run of every sweep, and of every kind of method that no sweep before it has; sizes make no kind.

    A run of the comparison is a slow test, and so is the first run of a sweep if an earlier sweep has its method.
    """
    seen: set[str] = set()
    chosen = []
    for name in sorted(SWEEPS, key=lambda name: name == "compare.yaml"):
        first = runs_of(name)[0]
        for settings in runs_of(name):
            kind = re.sub(r"(alpha|bottleneck)=[^,]+", r"\1", repr(settings.config))
            if kind not in seen or settings is first:
                marks = [pytest.mark.slow] if name == "compare.yaml" or kind in seen else []
                chosen.append(pytest.param(settings, id=f"{name}-{settings.method_name}", marks=marks))
            seen.add(kind)
    return chosen


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # of PEFT's SHIRA
@pytest.mark.parametrize("settings", first_runs())
def test_a_sweeps_run_is_started(settings: RunSettings, home: Path, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"epochs": 1, "threads": 1, "max_length": 16, "device": "cpu", "model_sha256": None}
    if settings.train_samples is not None:
        quick |= {"train_samples": 16, "dev_samples": 16}
    if settings.average is not None:
        quick |= {"average": {"last": 1}}
    quick |= {"model": str(home / "model"), "glue_dir": str(home / "glue"), "output_dir": str(tmp_path / "out")}
    record = run(replace(settings, **quick), log=lambda line: None)
    assert record["status"] == "finished"
    assert record["method"]["config"] == json.loads(json.dumps(settings.config.to_dict()))
    assert record["method"]["learning_rate"] == settings.learning_rate


# Benchmarks


def methods_of(name: str) -> dict[str, UniPELTConfig]:
    return benchmark.resolve_methods(benchmark.parse([str(FOLDER / name)]).methods)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_parsed_and_started(name: str, home: Path, tmp_path: Path) -> None:
    options = [
        "--model",
        str(home / "model"),
        "--batch_size",
        "2",
        "--tokens",
        "8",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    options += ["--warmup", "1", "--repetitions", "1", "--peft", "false", "--output", str(tmp_path / "out.json")]
    record = benchmark.benchmark(benchmark.parse([str(FOLDER / name), *options]))
    assert {method: row["config"] for method, row in record["methods"].items()} == {
        method: json.loads(json.dumps(config.to_dict())) for method, config in methods_of(name).items()
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_a_row_in_the_readme_and_holds_only_its_methods(name: str) -> None:
    rows = re.findall(rf"^\| `{re.escape(name)}` \|(.*)\|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 1
    assert all(column.strip() for column in rows[0].split("|"))
    assert set(read_mapping(FOLDER / name)) == {"methods"}


def test_table_4_is_the_papers_rows_and_the_model_without_submodules() -> None:
    methods = methods_of("table4.yaml")
    assert set(methods) == {*TABLE1, "frozen"}
    assert [len(benchmark.paper_row(config)) for config in methods.values()] == [3] * 7 + [0]
    assert not methods["frozen"].has_submodules


def test_the_release_s_table_4_differs_by_its_protocol_only() -> None:
    before, after = methods_of("table4.yaml"), methods_of("table4-release.yaml")
    assert list(after.values()) == [config if name == "frozen" else released(config) for name, config in before.items()]
    assert sum(not config.train_head for config in after.values()) == 3
    assert [len(benchmark.paper_row(config)) for config in after.values()] == [3] * 7 + [0]
