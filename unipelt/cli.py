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

from unipelt.files.messages import complain, say

_LISTS = {"tasks": "task", "k": "train_samples", "seeds": "seed", "methods": "method"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 done; 1 some runs failed, or a rerun gave other numbers; 2 bad input; 130 interrupted.
    """
    try:
        arguments = make_parser().parse_args(argv)
        return arguments.do(arguments)
    except (ValueError, OSError, ImportError) as error:
        complain("unipelt", error)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from each run's last finished epoch", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    dotted = False
    """Whether it takes `--trainer.NAME VALUE` and `--rates.PART VALUE`, as fields of these names."""

    def error(self, message: str) -> Any:
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self.dotted:
            return super().parse_known_args(args, namespace)
        from unipelt.runs.options import DOTTED, split_dotted

        words, found = split_dotted(args, DOTTED[1:])
        namespace, rest = super().parse_known_args(words, namespace)
        for name, text in found.items():
            setattr(namespace, f"field {name}", text)
        return namespace, rest


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command; each sub-command adds its own. It imports neither PyTorch nor Transformers."""
    parser = _Parser(prog="unipelt", description=" ".join(str(__doc__).split()), allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="sweep|report|collect|fold|rerun|export|push")
    for add in (_add_sweep, _add_report, _add_collect, _add_fold, _add_rerun, _add_export, _add_push):
        add(commands)
    return parser


def _add_option(group: Any, name: str, help_: str, **switch: Any) -> None:
    """Add a field of a run's settings as an option, with underscores or hyphens."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    group.add_argument(*names, dest=f"field {name}", metavar="VALUE", help=help_, **switch)


def _fields_given(arguments: argparse.Namespace) -> dict[str, str]:
    """The fields of a run's settings that were given, by name, as texts."""
    given = {name: value for name, value in vars(arguments).items() if name.startswith("field ") and value is not None}
    return {name.removeprefix("field "): value for name, value in given.items()}


def _add_sweep(commands: Any) -> None:
    from unipelt.glue.settings import RunSettings

    parser = commands.add_parser(
        "sweep",
        help="do a grid of runs, or go on with one",
        usage="%(prog)s CONFIG --out DIR [--dry-run] [--workers N] [--pack R] [--tasks rte,cola] [--k 100,500] "
        "[--seeds 1,2] [--methods lora,unipelt-apl] [--FIELD VALUE ...] [--trainer.NAME VALUE ...]",
        description="Do the runs of a sweep file, each in a process of its own, and go on with what is there. Several "
        "machines may do so in one shared folder at once.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="the sweep file, YAML or JSON (see configs/)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--dry-run", action="store_true", help="only say what there is to do")
    parser.add_argument("--workers", type=int, metavar="N", help="runs at a time [1; with ray, what the cluster takes]")
    parser.add_argument(
        "--pack", type=int, default=1, metavar="R", help="runs that a worker trains in one pass over one model [1]"
    )
    parser.add_argument("--backend", choices=("local", "ray"), default="local", help="where the runs are done [local]")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster; by default one is started here")
    parser.add_argument("--cpus", type=float, default=1.0, metavar="X", help="with ray: CPUs that a run takes [1]")
    parser.add_argument("--gpus", type=float, default=0.0, metavar="X", help="with ray: GPUs that a run takes [0]")
    for name, field in _LISTS.items():
        parser.add_argument(f"--{name}", metavar="LIST", help=f"of the values of {field}, only these")
    group = parser.add_argument_group(
        "fields of all runs", "for a field that the grid lists, only those of its values that are named"
    )
    for item in fields(RunSettings):
        if item.name not in ("output_dir", "overwrite"):
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if str(item.type).startswith("bool") else {}
            _add_option(group, item.name, item.metadata["help"].replace("%", "%%"), **switch)
    parser.dotted = True
    parser.set_defaults(do=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    from unipelt.sweep import carry_out, read_sweep, split_list, status, write_request

    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be 1 or more, not {arguments.workers}")
    if arguments.cpus < 0 or arguments.gpus < 0 or arguments.cpus + arguments.gpus == 0:
        raise ValueError("--cpus and --gpus must be 0 or more, and not both 0")
    if arguments.pack < 1 or (arguments.pack > 1 and arguments.backend != "local"):
        raise ValueError(f"--pack must be 1 or more, and 1 on a cluster, not {arguments.pack}")
    given = {field: getattr(arguments, name) for name, field in _LISTS.items()}
    narrow = {field: split_list(text) for field, text in given.items() if text is not None}
    sweep = read_sweep(arguments.config, narrow, _fields_given(arguments))
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
    state = status(sweep, out, workers)
    say(str(state))
    if arguments.dry_run:
        return 0
    write_request(sweep, out)
    failures = carry_out(state, start, log=say)
    if failures:
        say(f"{len(failures)} of {len(sweep.runs)} runs failed; the same command tries them again:")
        for folder, error in failures.items():
            say(f"  {Path(folder).name}: {error}")
    return 1 if failures else 0


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="tables and pictures from finished runs", description="Read the results of a folder of runs."
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the runs")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--latex", action="store_true", help="write the tables of scores as report.tex, too")
    parser.set_defaults(do=_report)


def _report(arguments: argparse.Namespace) -> int:
    from unipelt.report import write_report

    for path in write_report(arguments.folder, arguments.out, arguments.latex):
        say(path)
    return 0


def _add_collect(commands: Any) -> None:
    parser = commands.add_parser(
        "collect",
        help="the records of finished runs alone, to publish",
        description="Copy the records of a folder of runs, without models and without this machine's paths; a report "
        "of the copy says the same.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the runs")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the records; it may hold others")
    parser.set_defaults(do=_collect)


def _collect(arguments: argparse.Namespace) -> int:
    from unipelt.report import collect

    written, left_out = collect(arguments.folder, arguments.out)
    say(f"{len(written)} files in {arguments.out}")
    for name, reason in left_out:
        say(f"left out: {name}, as {reason}")
    return 0


def _add_fold(commands: Any) -> None:
    parser = commands.add_parser(
        "fold",
        help="make nearly constant gates of a finished run constants",
        description="Fold the model of a finished run on its dev set (unipelt.fold), compare scores, logits and time "
        "on its test set, and write the folded model.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the run")
    parser.add_argument("--out", metavar="DIR", help="new folder of the folded model [DIR/folded]")
    parser.add_argument(
        "--tolerance", type=float, metavar="X", help="largest standard deviation of a constant gate [0.05]"
    )
    parser.add_argument(
        "--closed", type=float, metavar="X", help="a constant gate below this goes, and its submodule [0.01]"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="how often the time is taken [7]")
    parser.set_defaults(do=_fold)


def _fold(arguments: argparse.Namespace) -> int:
    from unipelt.glue.fold_run import fold_run

    given = {name: getattr(arguments, name) for name in ("out", "tolerance", "closed", "rounds")}
    fold_run(arguments.folder, log=say, **given)
    return 0


def _add_rerun(commands: Any) -> None:
    from unipelt.glue.settings import CARRIED, MOVED

    parser = commands.add_parser(
        "rerun",
        help="do a finished run again and compare",
        description="Do the run of a record again in a new folder, and compare every number. Exit status 0: equal, "
        "1: different, 2: it cannot be done. What makes numbers equal and what does not: docs/reproducibility.md.",
        allow_abbrev=False,
    )
    parser.add_argument("record", metavar="RESULT", help="the run's result.json, or its folder")
    parser.add_argument("--out", metavar="FOLDER", help="new folder of the second run [runs/NAME-rerun]")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="X", help="largest difference that counts as equal [0]"
    )
    for name in (*MOVED, *CARRIED):
        what = "where it is now" if name in MOVED else "another one"
        _add_option(parser, name, f"{what} [the record's]")
    parser.set_defaults(do=_rerun)


def _rerun(arguments: argparse.Namespace) -> int:
    from unipelt.glue.rerun import rerun
    from unipelt.glue.settings import RunSettings
    from unipelt.runs.options import read_option

    changes = {name: read_option(name, value, RunSettings) for name, value in _fields_given(arguments).items()}
    result = rerun(
        *(arguments.record, arguments.out),
        tolerance=arguments.tolerance,
        changes=changes,
        log=say,
    )
    return 0 if result["equal"] else 1


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write the LoRA of a checkpoint as a folder of PEFT's",
        description="Write LoRA without gates, or with gates that `unipelt fold` made constants, as PEFT does, for "
        "PEFT and what reads its folders. What cannot travel is refused by name (docs/bridges.md).",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="a checkpoint, or the folder of a run")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder that PEFT reads")
    parser.add_argument("--base", metavar="NAME", help="name of the base model, for PEFT [where it was loaded from]")
    parser.set_defaults(do=_export)


def _export(arguments: argparse.Namespace) -> int:
    from unipelt.bridges.peft import save_peft
    from unipelt.checkpoint.load import from_pretrained
    from unipelt.runs.folder import MODEL

    folder = Path(arguments.folder)
    inner = folder / MODEL
    model = from_pretrained(inner if inner.is_dir() else folder)
    say(save_peft(model, arguments.out, base=arguments.base))
    return 0


def _add_push(commands: Any) -> None:
    parser = commands.add_parser(
        "push",
        help="upload the model of a finished run, or a checkpoint",
        description="Upload what was trained, its tokenizer and a model card, with the scores and gates of the run, in "
        "one commit. What is needed of a login and what is uploaded: docs/hub.md.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the run, or what unipelt.save wrote")
    parser.add_argument("name", metavar="USER/NAME", help="the repository; made if it is not there")
    parser.add_argument("--base", metavar="NAME", help="what the base is called on the hub [where it was loaded from]")
    parser.add_argument("--base-revision", metavar="REVISION", help="of the base [the commit that was trained on]")
    parser.add_argument("--license", metavar="ID", help="of these weights, apache-2.0 say [nothing is said]")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it is not there [main]")
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is for its owner alone")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--as-trained", action="store_true", help="with the prefix's network, which deploying drops")
    parser.set_defaults(do=_push)


def _push(arguments: argparse.Namespace) -> int:
    from unipelt.checkpoint.load import from_pretrained
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
    say(address)
    return 0
