"""The command `unipelt`: `unipelt sweep CONFIG --out DIR` does a grid of runs, `unipelt report DIR` reads them.

`unipelt collect DIR` copies their records alone, to publish; `unipelt fold DIR` folds the model of one, `unipelt rerun
DIR` does one again and compares, and `unipelt push DIR user/name` uploads its model. `unipelt export DIR` writes LoRA
as a folder of PEFT's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

_LISTS = {"tasks": "task", "k": "train_samples", "seeds": "seed", "methods": "method"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 done; 1 some runs failed, or a rerun gave other numbers; 2 bad input; 130 interrupted.
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.do(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"unipelt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from each run's last finished epoch", file=sys.stderr)
        return 130


def _sweep(arguments: argparse.Namespace) -> int:
    from unipelt.sweep import carry_out, look, read_sweep, split_list, write_request

    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be 1 or more, not {arguments.workers}")
    if arguments.cpus < 0 or arguments.gpus < 0 or arguments.cpus + arguments.gpus == 0:
        raise ValueError("--cpus and --gpus must be 0 or more, and not both 0")
    if arguments.pack < 1 or (arguments.pack > 1 and arguments.backend != "local"):
        raise ValueError(f"--pack must be 1 or more, and 1 on a cluster, not {arguments.pack}")
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    narrow = {field: split_list(given[name]) for name, field in _LISTS.items() if name in given}
    override = {name.removeprefix("field "): value for name, value in given.items() if name.startswith("field ")}
    sweep = read_sweep(arguments.config, narrow, override)
    workers, start = arguments.workers or 1, None
    if arguments.pack > 1:
        from unipelt.sweep.pack_workers import by_pack, in_packs

        sweep, start = by_pack(sweep), in_packs(arguments.pack, workers)
        workers *= arguments.pack
    if arguments.backend == "ray" and not arguments.dry_run:
        from unipelt.sweep.ray_backend import capacity, connect, on_cluster

        ray = connect(arguments.address)
        workers = arguments.workers or capacity(ray, arguments.cpus, arguments.gpus)
        start = on_cluster(ray, cpus=arguments.cpus, gpus=arguments.gpus)
    out = Path(arguments.out).absolute()  # other processes may have another current folder
    state = look(sweep, out, workers)
    print(state, flush=True)
    if arguments.dry_run:
        return 0
    write_request(sweep, out)
    failures = carry_out(state, start, say=lambda line: print(line, flush=True))
    if failures:
        print(f"{len(failures)} of {len(sweep.runs)} runs failed; the same command tries them again:")
        for folder, error in failures.items():
            print(f"  {Path(folder).name}: {error}")
    return 1 if failures else 0


def _report(arguments: argparse.Namespace) -> int:
    from unipelt.report import write_report

    for path in write_report(arguments.folder, arguments.out, arguments.latex):
        print(path)
    return 0


def _collect(arguments: argparse.Namespace) -> int:
    from unipelt.report import collect

    written, left_out = collect(arguments.folder, arguments.out)
    print(f"{len(written)} files in {arguments.out}")
    for name, reason in left_out:
        print(f"left out: {name}, as {reason}")
    return 0


def _fold(arguments: argparse.Namespace) -> int:
    from unipelt.glue.fold_run import fold_run

    given = {name: getattr(arguments, name) for name in ("out", "tolerance", "closed", "rounds")}
    fold_run(arguments.folder, say=lambda line: print(line, flush=True), **given)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    import unipelt
    from unipelt.runs.folder import MODEL

    folder = Path(arguments.folder)
    inner = folder / MODEL
    model = unipelt.from_pretrained(inner if inner.is_dir() else folder)
    print(unipelt.save_peft(model, arguments.out, base=arguments.base))
    return 0


def _rerun(arguments: argparse.Namespace) -> int:
    from unipelt.glue.rerun import rerun
    from unipelt.runs.options import read_option

    given = {name.removeprefix("field "): value for name, value in vars(arguments).items() if name.startswith("field ")}
    changes = {name: read_option(name, value) for name, value in given.items() if value is not None}
    result = rerun(
        *(arguments.record, arguments.out),
        tolerance=arguments.tolerance,
        changes=changes,
        say=lambda line: print(line, flush=True),
    )
    return 0 if result["equal"] else 1


def _push(arguments: argparse.Namespace) -> int:
    from unipelt.checkpoint.checkpoint import from_pretrained
    from unipelt.checkpoint.manifest import MANIFEST
    from unipelt.checkpoint.push import load_tokenizer, push_to_hub
    from unipelt.records.record import RESULT
    from unipelt.runs.folder import MODEL

    folder = Path(arguments.folder)
    result = folder / RESULT if (folder / RESULT).is_file() else None
    model = folder / MODEL if result else folder
    if not (model / MANIFEST).is_file():
        raise ValueError(f"{folder} is neither a run that has finished nor what unipelt.save writes")
    names = ("base", "base_revision", "license", "message", "private", "revision", "create_pr")
    address = push_to_hub(
        from_pretrained(model),
        arguments.name,
        deploy=not arguments.as_trained,
        tokenizer=load_tokenizer(model),
        result=result,
        **{name: getattr(arguments, name) for name in names},
    )
    print(address)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    from unipelt.glue.settings import CARRIED, MOVED, RunSettings

    parser = _Parser(prog="unipelt", description=" ".join(str(__doc__).split()), allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="sweep|report|collect|fold|rerun|export|push")

    sweep = commands.add_parser(
        "sweep",
        help="do a grid of runs, or go on with one",
        usage="%(prog)s CONFIG --out DIR [--dry-run] [--workers N] [--pack R] [--tasks rte,cola] [--k 100,500] "
        "[--seeds 1,2] [--methods lora,unipelt-apl] [--FIELD VALUE ...]",
        description="Do the runs of a sweep file, each in a process of its own, and go on with what is there. Several "
        "machines may do so in one shared folder at once.",
        allow_abbrev=False,
    )
    sweep.set_defaults(do=_sweep)
    sweep.add_argument("config", metavar="CONFIG", help="the sweep file, YAML or JSON (see configs/)")
    sweep.add_argument("--out", required=True, metavar="DIR", help="folder of the runs")
    sweep.add_argument("--dry-run", action="store_true", help="only say what there is to do")
    sweep.add_argument("--workers", type=int, metavar="N", help="runs at a time [1; with ray, what the cluster takes]")
    sweep.add_argument(
        "--pack", type=int, default=1, metavar="R", help="runs that a worker trains in one pass over one model [1]"
    )
    sweep.add_argument("--backend", choices=("local", "ray"), default="local", help="where the runs are done [local]")
    sweep.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster; by default one is started here")
    sweep.add_argument("--cpus", type=float, default=1.0, metavar="X", help="with ray: CPUs that a run takes [1]")
    sweep.add_argument("--gpus", type=float, default=0.0, metavar="X", help="with ray: GPUs that a run takes [0]")
    for name, field in _LISTS.items():
        sweep.add_argument(f"--{name}", metavar="LIST", help=f"of the values of {field}, only these")
    group = sweep.add_argument_group(
        "fields of all runs", "for a field that the grid lists, only those of its values that are named"
    )
    for item in fields(RunSettings):
        if item.name not in ("output_dir", "overwrite"):
            names = dict.fromkeys((f"--{item.name}", f"--{item.name.replace('_', '-')}"))
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if str(item.type).startswith("bool") else {}
            text = item.metadata["help"].replace("%", "%%")
            group.add_argument(*names, dest=f"field {item.name}", metavar="VALUE", help=text, **switch)

    report = commands.add_parser(
        "report", help="tables and pictures from finished runs", description="Read the results of a folder of runs."
    )
    report.set_defaults(do=_report)
    report.add_argument("folder", metavar="DIR", help="folder of the runs")
    report.add_argument("--out", required=True, metavar="DIR", help="folder of the report")
    report.add_argument("--latex", action="store_true", help="write the tables of scores as report.tex, too")

    collecting = commands.add_parser(
        "collect",
        help="the records of finished runs alone, to publish",
        description="Copy the records of a folder of runs, without models and without this machine's paths; a report "
        "of the copy says the same.",
        allow_abbrev=False,
    )
    collecting.set_defaults(do=_collect)
    collecting.add_argument("folder", metavar="DIR", help="folder of the runs")
    collecting.add_argument("--out", required=True, metavar="DIR", help="folder of the records; it may hold others")

    folding = commands.add_parser(
        "fold",
        help="make nearly constant gates of a finished run constants",
        description="Fold the model of a finished run on its dev set (unipelt.fold), compare scores, logits and time "
        "on its test set, and write the folded model.",
        allow_abbrev=False,
    )
    folding.set_defaults(do=_fold)
    folding.add_argument("folder", metavar="DIR", help="folder of the run")
    folding.add_argument("--out", metavar="DIR", help="new folder of the folded model [DIR/folded]")
    folding.add_argument(
        "--tolerance", type=float, metavar="X", help="largest standard deviation of a constant gate [0.05]"
    )
    folding.add_argument(
        "--closed", type=float, metavar="X", help="a constant gate below this goes, and its submodule [0.01]"
    )
    folding.add_argument("--rounds", type=int, default=7, metavar="N", help="how often the time is taken [7]")

    again = commands.add_parser(
        "rerun",
        help="do a finished run again and compare",
        description="Do the run of a record again in a new folder, and compare every number. Exit status 0: equal, "
        "1: different, 2: it cannot be done. What makes numbers equal and what does not: docs/reproducibility.md.",
        allow_abbrev=False,
    )
    again.set_defaults(do=_rerun)
    again.add_argument("record", metavar="RESULT", help="the run's result.json, or its folder")
    again.add_argument("--out", metavar="FOLDER", help="new folder of the second run [runs/NAME-rerun]")
    again.add_argument(
        "--tolerance", type=float, default=0.0, metavar="X", help="largest difference that counts as equal [0]"
    )
    for name in (*MOVED, *CARRIED):
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        what = "where it is now" if name in MOVED else "another one"
        again.add_argument(*names, dest=f"field {name}", metavar="VALUE", help=f"{what} [the record's]")

    exporting = commands.add_parser(
        "export",
        help="write the LoRA of a checkpoint as a folder of PEFT's",
        description="Write LoRA without gates, or with gates that `unipelt fold` made constants, as PEFT does, for "
        "PEFT and what reads its folders. What cannot travel is refused by name (docs/bridges.md).",
        allow_abbrev=False,
    )
    exporting.set_defaults(do=_export)
    exporting.add_argument("folder", metavar="DIR", help="a checkpoint, or the folder of a run")
    exporting.add_argument("--out", required=True, metavar="DIR", help="folder that PEFT reads")
    exporting.add_argument("--base", metavar="NAME", help="name of the base model, for PEFT [where it was loaded from]")

    pushing = commands.add_parser(
        "push",
        help="upload the model of a finished run, or a checkpoint",
        description="Upload what was trained, its tokenizer and a model card, with the scores and gates of the run, in "
        "one commit. What is needed of a login and what is uploaded: docs/hub.md.",
        allow_abbrev=False,
    )
    pushing.set_defaults(do=_push)
    pushing.add_argument("folder", metavar="DIR", help="folder of the run, or what unipelt.save wrote")
    pushing.add_argument("name", metavar="USER/NAME", help="the repository; made if it is not there")
    pushing.add_argument("--base", metavar="NAME", help="what the base is called on the hub [where it was loaded from]")
    pushing.add_argument("--base-revision", metavar="REVISION", help="of the base [the commit that was trained on]")
    pushing.add_argument("--license", metavar="ID", help="of these weights, apache-2.0 say [nothing is said]")
    pushing.add_argument("--message", metavar="TEXT", help="of the commit")
    pushing.add_argument("--revision", metavar="BRANCH", help="made if it is not there [main]")
    pushing.add_argument("--private", action="store_true", default=None, help="a new repository is for its owner alone")
    pushing.add_argument("--create-pr", action="store_true", help="open a pull request")
    pushing.add_argument("--as-trained", action="store_true", help="with the prefix's network, which deploying drops")
    return parser
