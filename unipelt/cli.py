"""The command `unipelt`.

`unipelt run CONFIG` trains one method on one task, and `unipelt demo` compares three methods on a small task. `unipelt
configs` lists the configurations that come with the package. `unipelt sweep CONFIG --out DIR` does a grid of runs, and
`unipelt status DIR` says how far it is. `unipelt report DIR` writes tables and pictures of finished runs, and `unipelt
collect DIR` copies their records.

`unipelt fold DIR` folds the model of a run. `unipelt rerun DIR` does a run again and compares the numbers. `unipelt
push DIR user/name` uploads the model of a run. `unipelt export DIR` writes LoRA as a folder for PEFT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unipelt.files.arguments import OneLineParser
from unipelt.files.messages import complain, printable, say
from unipelt.version import __version__

_LISTS = {"tasks": "task", "k": "train_samples", "seeds": "seed", "methods": "method"}
_FIELD = "field "  # prefix of a run's settings among the parsed arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 for success, 1 for a failed run or a rerun with other numbers, 2 for bad input, 130 for an
        interrupt.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words[:1] == ["run"]:  # the configuration decides which options there are
            from unipelt.launch import launch

            return launch("unipelt run", words[1:])
        arguments = make_parser().parse_args(words)
        return arguments.do(arguments)
    except (ValueError, OSError, ImportError) as error:
        complain("unipelt", error)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from each run's last finished epoch", file=sys.stderr)
        return 130


class _Parser(OneLineParser):
    dotted = False
    """Whether the parser accepts `--trainer.NAME VALUE` and `--rates.PART VALUE`, as fields with these names."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self.dotted:
            return super().parse_known_args(args, namespace)
        from unipelt.runs.options import DOTTED, split_dotted

        words, found = split_dotted(args, DOTTED[1:])
        namespace, rest = super().parse_known_args(words, namespace)
        for name, text in found.items():
            setattr(namespace, f"{_FIELD}{name}", text)
        return namespace, rest


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and of its sub-commands. PyTorch and Transformers are not imported."""
    parser = _Parser(
        prog="unipelt",
        description="Runs, grids of runs, their reports, and the models that they leave.",
        epilog="unipelt COMMAND --help says more of a command.",
    )
    parser.add_argument("--version", action="version", version=f"unipelt {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="run|demo|configs|sweep|status|report|collect|fold|rerun|export|push"
    )
    for add in (
        *(_add_run, _add_demo, _add_configs, _add_sweep, _add_status, _add_report, _add_collect, _add_fold),
        *(_add_rerun, _add_export, _add_push),
    ):
        add(commands)
    return parser


def _add_run(commands: Any) -> None:
    """Add `run` to the list of commands. `main` passes this command to `launch`."""
    commands.add_parser("run", help="train one method on one task", add_help=False)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="UniPELT beside LoRA and the frozen model, in about a minute",
        description="Train UniPELT, LoRA and the frozen model's head on 320 short sentences, and test them on "
        "sentences with other words. A bag of words cannot do this task. No hub and no GPU are needed.",
    )
    parser.add_argument(
        "--out",
        default="unipelt-demo",
        metavar="DIR",
        help="Folder of the runs and of the picture. Default: unipelt-demo.",
    )
    parser.set_defaults(do=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from unipelt.demo.run import need_model, run_demo

    need_model()
    from unipelt.runs.errors import exit_code

    return exit_code("unipelt", lambda: run_demo(arguments.out))


def _add_configs(commands: Any) -> None:
    parser = commands.add_parser(
        "configs",
        help="the configurations that come with the package",
        description="List the configurations that come with the package, or print one.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="Name of one, which is printed.")
    parser.add_argument("--to", metavar="FOLDER", help="Folder to copy it to, with the files that it builds on.")
    parser.set_defaults(do=_configs)


def _configs(arguments: argparse.Namespace) -> int:
    from unipelt import packaged

    if arguments.to is not None:
        if arguments.name is None:
            raise ValueError("--to needs the name of a configuration; `unipelt configs` lists them")
        for path in packaged.copy(arguments.name, arguments.to):
            say(path)
    elif arguments.name is not None:
        print(printable(packaged.named(arguments.name).read_text(encoding="utf-8")), end="")
    else:
        files = [packaged.named(name) for name in packaged.names()]
        wide = max(len(path.stem) for path in files)
        for use, command in packaged.USES.items():
            say(f"{command}:")
            for path in files:
                if packaged.use(path) == use:
                    say(f"  {path.stem:<{wide}}  {packaged.purpose(path)}")
    return 0


def _add_option(group: Any, name: str, help_: str) -> None:
    """Add a field of a run's settings as an option."""
    group.add_argument(f"--{name}", dest=f"{_FIELD}{name}", metavar="VALUE", help=help_)


def _fields_given(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the given fields of a run's settings, as texts by name."""
    given = {name: value for name, value in vars(arguments).items() if name.startswith(_FIELD) and value is not None}
    texts = {name: json.dumps(value) if isinstance(value, list) else value for name, value in given.items()}
    return {name.removeprefix(_FIELD): text for name, text in texts.items()}


def _add_sweep(commands: Any) -> None:
    from unipelt.glue.settings import RunSettings
    from unipelt.runs.options import add_options

    parser = commands.add_parser(
        "sweep",
        help="do a grid of runs, or go on with one",
        usage="%(prog)s CONFIG --out DIR [--dry-run] [--workers N] [--pack R] [--tasks rte,cola] [--k 100,500] "
        "[--seeds 1,2,6-15] [--methods lora,unipelt-apl] [--FIELD VALUE ...] [--trainer.NAME VALUE ...]",
        description="Do the runs of a sweep file, each in a process of its own. The same command goes on with a sweep "
        "that was stopped. Several machines may work on one shared folder at once. The groups from `what to run` on "
        "are fields of all runs. For a field that the grid lists, an option keeps only the values that it names.",
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="Sweep file, YAML or JSON, or a name that `unipelt configs` lists."
    )
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--out", required=True, metavar="DIR", help="Folder of the runs. Required.")
    sweep.add_argument("--dry-run", action="store_true", help="The runs are listed and not done.")
    for name, field in _LISTS.items():
        new = " A range is 6-15. Seeds that the grid lacks are added to it." if field == "seed" else ""
        text = f"Values of {field} to keep, with commas.{new} Default: all."
        sweep.add_argument(f"--{name}", metavar="LIST", help=text)
    machines = parser.add_argument_group("machines")
    machines.add_argument(
        "--workers", type=int, metavar="N", help="Runs at a time. Default: 1, and with ray what the cluster takes."
    )
    machines.add_argument(
        "--pack",
        type=int,
        default=1,
        metavar="R",
        help="Runs that a worker trains in one pass over one model. Default: 1.",
    )
    machines.add_argument(
        "--backend", choices=("local", "ray"), default="local", help="Place of the runs. Default: local."
    )
    machines.add_argument(
        "--address", metavar="HOST:PORT", help="Address of a Ray cluster. Default: one is started here."
    )
    machines.add_argument(
        "--cpus", type=float, default=1.0, metavar="X", help="CPUs that a run takes, with ray. Default: 1."
    )
    machines.add_argument(
        "--gpus", type=float, default=0.0, metavar="X", help="GPUs that a run takes, with ray. Default: 0."
    )
    add_options(parser, RunSettings, _FIELD, leave_out=("output_dir", "overwrite"))
    parser.dotted = True
    parser.set_defaults(do=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    from unipelt.packaged import find
    from unipelt.runs.processes import need_one_process
    from unipelt.sweep import carry_out, read_sweep, split_list, status, write_request

    need_one_process("a sweep")
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be 1 or more, not {arguments.workers}")
    if arguments.cpus < 0 or arguments.gpus < 0 or arguments.cpus + arguments.gpus == 0:
        raise ValueError("--cpus and --gpus must be 0 or more, and not both 0")
    if arguments.pack < 1 or (arguments.pack > 1 and arguments.backend != "local"):
        raise ValueError(f"--pack must be 1 or more, and 1 on a cluster, not {arguments.pack}")
    given = {field: getattr(arguments, name) for name, field in _LISTS.items()}
    narrow = {field: split_list(text) for field, text in given.items() if text is not None}
    sweep = read_sweep(find(arguments.config), narrow, _fields_given(arguments))
    sweep = replace(sweep, path=arguments.config)
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
    if sweep.search is not None:
        return _search(sweep, out, workers, start, arguments.dry_run)
    state = status(sweep, out, workers)
    say(str(state))
    if arguments.dry_run:
        return 0
    write_request(sweep, out)
    return _say_failures(carry_out(state, start, log=say), f"of {len(sweep.runs)} ")


def _search(sweep: Any, out: Path, workers: int, start: Any, dry_run: bool) -> int:
    from unipelt.sweep.optuna_search import carry_out_search, connect, plan

    say(plan(sweep, workers))
    if dry_run:
        return 0
    connect()
    return _say_failures(carry_out_search(sweep, out, workers, start, log=say))


def _say_failures(failures: dict[str, str], of: str = "") -> int:
    """Print the failures of a sweep, and return the exit code."""
    if failures:
        say(f"{len(failures)} {of}runs failed; the same command tries them again:")
        for folder, error in failures.items():
            say(f"  {Path(folder).name}: {error}")
    return 1 if failures else 0


def _add_status(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="what runs, how far it is, what failed, and the time left",
        description="Say which runs of a folder run, and the epoch of each, which failed and why, and how many have "
        "finished. The time left is an estimate. Nothing is written. It works during a sweep and after one that was "
        "killed.",
    )
    parser.add_argument("folder", metavar="DIR", help="Folder of a sweep, of one run, or of several runs.")
    parser.add_argument("--watch", action="store_true", help="Look again and again, until no run is running.")
    parser.set_defaults(do=_status)


def _status(arguments: argparse.Namespace) -> int:
    from unipelt.sweep.watch import look, watch

    if arguments.watch:
        with contextlib.suppress(KeyboardInterrupt):  # a look needs no end
            watch(arguments.folder)
    else:
        say(look(arguments.folder))
    return 0


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="tables and pictures of finished runs",
        description="Write a page with tables and pictures of the finished runs in a folder.",
    )
    parser.add_argument("folder", metavar="DIR", help="Folder of the runs.")
    parser.add_argument("--out", required=True, metavar="DIR", help="Folder of the report. Required.")
    parser.add_argument("--latex", action="store_true", help="The tables of scores are written as report.tex, too.")
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
        description="Copy the records of a folder of runs, without models and without this machine's paths. A report "
        "of the copy says the same.",
    )
    parser.add_argument("folder", metavar="DIR", help="Folder of the runs.")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="Folder of the records. It may hold others. Required."
    )
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
        description="Fold the model of a finished run on its dev set (unipelt.fold). Compare scores, logits and time "
        "on its test set. Write the folded model.",
    )
    parser.add_argument("folder", metavar="DIR", help="Folder of the run.")
    parser.add_argument("--out", metavar="DIR", help="New folder of the folded model. Default: DIR/folded.")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="Largest standard deviation of a gate that becomes a constant. Default: 0.05.",
    )
    parser.add_argument(
        "--closed",
        type=float,
        metavar="X",
        help="Value below which a constant gate is removed with its submodule. Default: 0.01.",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="Number of times to take the time. Default: 7."
    )
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
        description="Do the run of a record again in a new folder, and compare every number. The exit status is 0 for "
        "equal numbers, 1 for different ones, and 2 for a run that cannot be done. docs/reproducibility.md says what "
        "makes numbers equal.",
    )
    parser.add_argument("record", metavar="RESULT", help="The run's result.json, or its folder.")
    parser.add_argument("--out", metavar="FOLDER", help="New folder of the second run. Default: runs/NAME-rerun.")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="X", help="Largest difference that counts as equal. Default: 0."
    )
    moved = parser.add_argument_group("data and model", "Their places today. Default: as in the record.")
    for name in MOVED:
        _add_option(moved, name, f"Place of {name} today.")
    carried = parser.add_argument_group("machine", "Settings that may differ. Default: as in the record.")
    for name in CARRIED:
        _add_option(carried, name, f"Another value of {name}.")
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
        "PEFT and other programs that read its folders. Other submodules are refused by name (docs/bridges.md).",
    )
    parser.add_argument("folder", metavar="DIR", help="A checkpoint, or the folder of a run.")
    parser.add_argument("--out", required=True, metavar="DIR", help="Folder for PEFT. Required.")
    parser.add_argument(
        "--base", metavar="NAME", help="Name of the base model, for PEFT. Default: where it was loaded from."
    )
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
        description="Upload the trained weights, the tokenizer and a model card with the scores and gates of the run, "
        "in one commit. docs/hub.md says what is uploaded, and how to log in.",
    )
    parser.add_argument("folder", metavar="DIR", help="Folder of the run, or a folder that unipelt.save wrote.")
    parser.add_argument("name", metavar="USER/NAME", help="Repository. A new one is made where there is none.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--base", metavar="NAME", help="Name of the base model on the hub. Default: where it was loaded from."
    )
    model.add_argument(
        "--base-revision", metavar="REVISION", help="Revision of the base. Default: the commit that was trained on."
    )
    model.add_argument("--license", metavar="ID", help="License of these weights, such as apache-2.0. Default: none.")
    model.add_argument(
        "--as-trained",
        action="store_true",
        help="The network of the prefix is uploaded too. Without this it is dropped.",
    )
    upload = parser.add_argument_group("upload")
    upload.add_argument("--message", metavar="TEXT", help="Message of the commit.")
    upload.add_argument(
        "--revision", metavar="BRANCH", help="Branch. A new one is made where there is none. Default: main."
    )
    upload.add_argument("--private", action="store_true", default=None, help="A new repository is for its owner alone.")
    upload.add_argument("--create-pr", action="store_true", help="A pull request is opened.")
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
