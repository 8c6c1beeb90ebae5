"""Fuzz every reader of files that other people may have written, guided by coverage.

    python tests/scripts/fuzz.py --seconds 600 --out finds

The script needs atheris (Linux only, not a dependency of the project), and says so if atheris is missing. The script
first makes valid files. The fuzzer changes their bytes, or values and names in them, and keeps the inputs that reach
new code of `unipelt` and yaml. A loader may refuse a file with its own error, or accept the file. In both cases the
model must be unchanged at the end. Anything else is a find: the input is written to `--out`, one line shows the error
and its place, and fuzzing goes on. The exit status is 1 if the list of finds is not empty.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import json
import logging
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("UNIPELT_GLUE_DIR", None)

SLOW = 30  # the most seconds that a file may take
ABSENT = "this needs atheris, which is not installed: pip install atheris (Linux only)"
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, 10**400, -0.0, 0.5, 1e-300, 1e308),
    *("", "a", "0", "null", "6-11", "9999-0", "lora", "unipelt-apl", "rte", "../../x", "/", "a.yaml", "a.json", "~"),
    *("\\", "a\nb", "\u2028", "\U0001f40d", "1e5", "x" * 5000, "F64", "I64", "BOOL", "BF16", "F8_E4M3"),
    *([], {}, [[]], [None], [0], [1, 1], [{}], ["a"], {"a": 1}, {"": {}}, {"preset": "lora"}, {"lora": None}),
    *([0, 0], [0, 4], [-1], [2**62, 2**62], [[0, 1], [2, 3]], {"rank": 1}, {"a.b": {"c": []}}),
)


class Wrong(Exception):
    """A loader did something wrong and raised no error of its own."""


class Refused(Exception):
    """Another library refused the input before a loader saw it."""


class TooSlow(BaseException):
    """A file took longer than `SLOW` seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--runs", type=int, default=0, help="end after that many executions; 0: when the time is over")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for inputs that are finds; by default a temporary one")
    arguments = parser.parse_args()
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        print(ABSENT)
        return 2
    import torch
    import transformers  # noqa: F401  (first, so that Transformers is not instrumented)

    for name in [name for name in sys.modules if name.split(".")[0] == "yaml"]:
        del sys.modules[name]  # Transformers has imported yaml; import yaml again, instrumented
    with atheris.instrument_imports(include=["unipelt", "yaml"]):
        import yaml  # noqa: F401

        import unipelt.report
        import unipelt.sweep  # noqa: F401
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)

    out = arguments.out or Path(tempfile.mkdtemp(prefix="finds-"))
    out.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        targets = make_targets(home)
        corpus = home / "corpus"
        corpus.mkdir()
        names, chance = list(targets), random.Random(arguments.seed)
        for index, (_, seeds, _) in enumerate(targets.values()):
            for seed in seeds:  # the provider takes its numbers from the last bytes of an input
                for tail in (b"", b"\0", b"\1", b"\2", b"\3"):
                    content = seed + tail + bytes([index])
                    (corpus / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
            for number in range(50):  # the provider makes choices from these bytes
                (corpus / f"{index}-{number}").write_bytes(chance.randbytes(60) + bytes([index]))
        (home / "words").write_text("".join(f'"{word}"\n' for word in words(targets)))
    except BaseException:
        shutil.rmtree(home)
        raise
    print(f"{len(targets)} targets, {len(list(corpus.iterdir()))} inputs to start from; finds go to {out}", flush=True)
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT)
    screen = os.dup(2)
    os.dup2(log, 2)  # the output of libFuzzer; its last line has the coverage

    started = time.monotonic()
    executions: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    finds: dict[tuple[str, str, str], int] = {}

    def too_slow(*_: Any) -> None:
        raise TooSlow(f"longer than {SLOW} seconds")

    signal.signal(signal.SIGALRM, too_slow)

    def one(content: bytes) -> None:
        over = time.monotonic() - started > arguments.seconds
        if over or (arguments.runs and executions.total() >= arguments.runs):
            end()
        data = atheris.FuzzedDataProvider(content)
        name = names[data.ConsumeIntInRange(0, 255) % len(names)]
        read, _, allowed = targets[name]
        executions[name] += 1
        signal.setitimer(signal.ITIMER_REAL, SLOW)
        try:
            read(data)
            taken[name] += 1
        except allowed:
            pass
        except (Exception, TooSlow) as error:
            key = (name, type(error).__name__, place_of(error))
            finds[key] = finds.get(key, 0) + 1
            if finds[key] == 1:
                path = out / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
                path.write_bytes(content)
                line = traceback.format_exception_only(error)[-1].strip()
                print(f"{name}: {line:.200} at {key[2]} -> {path.name}", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def end() -> None:
        os.dup2(screen, 2)
        said = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", (home / "log").read_text(errors="replace"))
        cov, ft, corp = said[-1] if said else ("0", "0", "0")
        for name in names:
            found = sum(key[0] == name for key in finds)
            print(f"{name:>12}: {executions[name]:>9,} executions, {taken[name]:>8,} read, {found} finds")
        print(
            f"{executions.total():,} executions in {time.monotonic() - started:.0f} s, {int(cov):,} counters covered, "
            f"{int(ft):,} features, {int(corp):,} inputs kept, {len(finds)} finds",
            flush=True,
        )
        shutil.rmtree(home)
        os._exit(1 if finds else 0)  # libFuzzer never returns

    options = ["-timeout=0", "-rss_limit_mb=8000", "-max_len=20000", "-len_control=0", f"-seed={arguments.seed}"]
    atheris.Setup([sys.argv[0], *options, f"-dict={home / 'words'}", str(corpus)], one)
    atheris.Fuzz()
    return 0


def place_of(error: BaseException) -> str:
    """Return the last line of this project through which an error passed, or else the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}unipelt{os.sep}" in frame.filename]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def words(targets: dict[str, Any]) -> list[str]:
    """Return the words of the valid files, for libFuzzer to insert elsewhere."""
    found: Counter[str] = Counter()
    for _, seeds, _ in targets.values():
        for seed in seeds:
            found.update(re.findall(r"[A-Za-z_][\w.-]{2,30}", seed.decode("utf-8", errors="replace")))
    return [word for word, _ in found.most_common(300)]


Target = tuple[Callable[[Any], None], list[bytes], tuple[type[BaseException], ...]]


def make_targets(home: Path) -> dict[str, Target]:
    """Return the targets by name.

    A target is the reader of an input, valid inputs to start from, and the errors that the reader documents.
    """
    import torch
    from helpers import shake, tiny_bert
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors
    from safetensors.torch import save as dump_tensors
    from tiny_task import make_quick, quick

    import unipelt
    from unipelt.config.schema import ConfigError
    from unipelt.files.strict import PlainError, parse_json, parse_yaml
    from unipelt.glue.data import DataError
    from unipelt.glue.run import run
    from unipelt.glue.settings import RunSettings
    from unipelt.records.record import ResultError, read_result
    from unipelt.report.read import read_results
    from unipelt.runs.tables import read_file
    from unipelt.sweep import SweepError, read_failure, read_request, read_sweep, write_request

    def bert() -> Any:
        return tiny_bert(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)

    make_quick(home)
    run(RunSettings(**{**quick(home), "epochs": 1, "method": "lora"}), log=lambda line: None)
    result = json.loads((home / "out" / "result.json").read_text())
    data_file = {"sst": (home / "dev.tsv").read_bytes()[:300]}
    grid = {
        "model": str(home / "model"),
        "train_samples": 16,
        "dev_samples": 8,
        "epochs": 1,
        "choose": {"learning_rate": [1e-3, "5e-4"]},
        "grid": [{"task": ["rte"], "method": ["lora", {"preset": "prefix", "prefix": {"length": 5}}], "seed": [1, 2]}],
    }
    (home / "grid.json").write_text(json.dumps(grid))
    (home / "plan").mkdir()
    write_request(read_sweep(home / "grid.json"), home / "plan")
    request = json.loads((home / "plan" / "sweep.json").read_text())
    request["runs"] = request["runs"][:2]
    failure = {"error": "no luck", "log": "a\nb", "time": 1.5}

    # small, so that the fuzzer changes the format of a file more often than its numbers
    small = {"adapter": {"bottleneck": 2}, "prefix": {"length": 2, "hidden": 3}, "lora": {"rank": 2}}
    method = unipelt.resolve({"preset": "unipelt-apl", **small})
    trained = unipelt.inject(bert(), method)
    shake(trained)
    unipelt.save(trained, home / "good")
    manifest = json.loads((home / "good" / "unipelt.json").read_text())
    weights = (home / "good" / "model.safetensors").read_bytes()
    release = dump_tensors({name: tensor.contiguous() for name, tensor in unipelt.release_state_dict(trained).items()})
    base, injected = bert(), unipelt.inject(bert(), method)

    def state(model: Any) -> str:
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        kinds = [f"{path} {type(module).__name__}" for path, module in model.named_modules()]
        trains = [f"{name} {parameter.requires_grad}" for name, parameter in model.named_parameters()]
        digest.update("\n".join([*kinds, *trains]).encode())
        return digest.hexdigest()

    whole = state(base)

    def checkpoint(data: Any) -> None:
        folder = home / "checkpoint"
        folder.mkdir(exist_ok=True)
        how = data.ConsumeIntInRange(0, 4)
        text, content = json.dumps(manifest).encode(), weights
        if how == 0:
            text = document(data, manifest)
        elif how == 1:
            text = spliced(data, text)
        elif how in (2, 3):
            content = tensors_file(data, weights)
        else:
            text, content = document(data, manifest), tensors_file(data, weights)
        if how >= 2:  # the author of a file can write its SHA-256 too
            digest = hashlib.sha256(content).hexdigest()
            text = text.replace(manifest["weights"]["sha256"].encode(), digest.encode())
        (folder / "unipelt.json").write_bytes(text)
        (folder / "model.safetensors").write_bytes(content)
        try:
            unipelt.load(base, folder)
        except unipelt.CheckpointError:
            if state(base) != whole:
                raise Wrong("the model was changed by a checkpoint that was refused") from None
            raise
        unipelt.remove(base)
        if state(base) != whole:
            raise Wrong("remove does not undo a checkpoint that was read")

    def importer(data: Any) -> None:
        before = state(injected)
        try:
            tensors = load_tensors(tensors_file(data, release))
        except (SafetensorError, ValueError, KeyError) as error:
            raise Refused from error  # the importer takes tensors, not files
        try:
            unipelt.load_release_state_dict(injected, tensors)
        except unipelt.CheckpointError:
            if state(injected) != before:
                raise Wrong("the model was changed by weights that were refused") from None
            raise

    def in_file(name: str, read: Callable[[Path], Any], good: Any) -> Callable[[Any], None]:
        def one(data: Any) -> None:
            path = home / "fuzzed" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(document(data, good))
            read(path)

        return one

    def table(data: Any) -> None:
        suffix = ("tsv", "csv", "json", "jsonl")[data.ConsumeIntInRange(0, 3)]
        path = home / f"table.{suffix}"
        path.write_bytes(data.ConsumeBytes(data.remaining_bytes()))
        read_file(path)

    def results(data: Any) -> None:
        folder = home / "results"
        (folder / "a").mkdir(parents=True, exist_ok=True)
        (folder / "b").mkdir(exist_ok=True)
        which = data.ConsumeIntInRange(0, 3)
        goods = {"result.json": result, "sweep.json": request, "a/result.json": result, "b/failure.json": failure}
        for index, (name, good) in enumerate(goods.items()):
            content = document(data, good) if index == which else json.dumps(good).encode()
            (folder / name).write_bytes(content)
        unipelt.report.page.compose(read_results(folder), [], "a")

    def parse(read: Callable[[bytes], Any]) -> Callable[[Any], None]:
        return lambda data: read(data.ConsumeBytes(data.remaining_bytes()))

    def settle(data: Any) -> None:
        values = parse_yaml(document(data, {"preset": "unipelt-apl", **method.to_dict()}))
        resolved = unipelt.resolve(values)
        if unipelt.UniPELTConfig.from_dict(json.loads(json.dumps(resolved.to_dict()))) != resolved:
            raise Wrong("a configuration that was taken is another one when it is read again")

    def dumped(*values: Any) -> list[bytes]:
        return [json.dumps(value).encode() for value in values]

    torch.manual_seed(0)
    yamls = [path.read_bytes()[:3000] for path in sorted((TESTS.parent / "configs").rglob("*.yaml"))[:6]]
    csv = b'text,label\n"a, ""b""",1\nc,0\n'
    rows = [{"text": "a", "label": 1}, {"text": "b\n", "label": 0}]
    lines = b"".join(line + b"\n" for line in dumped(*rows))
    anything = dumped(*VALUES[:40])
    scalars = b"a: 2020-01-02\nb: 2020-01-02 03:04:05.6\nc: 0x1f\nd: 1:30:00\ne: 0b11\nf: .inf\ng: !!binary aGk=\n"
    flow = b"%YAML 1.1\n---\n? a\n: &x {b: 'c', <<: *x}\n- >-\n d\n...\n"
    targets: dict[str, Target] = {
        "json": (parse(parse_json), dumped(method.to_dict(), failure, [1, [2, {"a": 1e5}]]), (PlainError,)),
        "yaml": (parse(parse_yaml), [*yamls, b"a: &x [1, 2]\nb: *x\nc: {d: |\n  e\n}", scalars, flow], (PlainError,)),
        "config": (settle, dumped(method.to_dict(), {"preset": "lora"}), (PlainError, ConfigError)),
        "checkpoint": (checkpoint, anything, (unipelt.CheckpointError,)),
        "release": (importer, anything, (unipelt.CheckpointError, Refused)),
        "result": (in_file("result.json", read_result, result), dumped(result), (ResultError,)),
        "sweep": (in_file("grid.yaml", read_sweep, grid), dumped(grid) + yamls, (SweepError,)),
        "request": (in_file("sweep.json", lambda p: read_request(p.parent), request), dumped(request), (SweepError,)),
        "failure": (in_file("failure.json", lambda p: read_failure(p.parent), failure), dumped(failure), (SweepError,)),
        "report": (results, dumped(result, request, failure), ()),
        "table": (table, [*data_file.values(), csv, *dumped(rows), lines], (DataError,)),
    }
    return targets


def document(data: Any, good: Any) -> bytes:
    """Return raw bytes, or a valid document with some of its values and names changed."""
    how = data.ConsumeIntInRange(0, 3)
    if how == 0:
        return data.ConsumeBytes(data.remaining_bytes())
    changed = copy.deepcopy(good)
    for _ in range(how):
        changed = with_change(data, changed)
    return json.dumps(changed).encode()


def with_change(data: Any, value: Any) -> Any:
    """Return a document with one node replaced, renamed, added, copied or removed. The document changes in place."""
    nodes: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, dict):
            keys: list[Any] = list(inner)
        else:
            keys = list(range(len(inner))) if isinstance(inner, list) else []
        nodes += [(inner, key) for key in keys]
        left += [inner[key] for key in keys]
    if not nodes:
        return some(data)
    owner, key = nodes[data.ConsumeIntInRange(0, len(nodes) - 1)]
    act = data.ConsumeIntInRange(0, 6)
    if act == 0:
        del owner[key]
    elif act == 6 and isinstance(owner, dict):
        owner[data.ConsumeUnicodeNoSurrogates(12)] = some(data)
    elif act == 6:
        owner.insert(key, some(data))
    elif act == 1 and isinstance(owner, dict):
        owner[data.ConsumeUnicodeNoSurrogates(12)] = owner.pop(key)
    elif act == 2:
        other, at = nodes[data.ConsumeIntInRange(0, len(nodes) - 1)]
        owner[key] = copy.deepcopy(other[at] if not isinstance(other, list) or at < len(other) else other)
    else:
        owner[key] = some(data)
    return value


def some(data: Any) -> Any:
    how = data.ConsumeIntInRange(0, 4)
    if how == 0:
        return data.ConsumeInt(8)
    if how == 1:
        return data.ConsumeFloat()
    if how == 2:
        return data.ConsumeUnicodeNoSurrogates(20)
    return copy.deepcopy(VALUES[data.ConsumeIntInRange(0, len(VALUES) - 1)])


def spliced(data: Any, content: bytes) -> bytes:
    """Return the content with some bytes replaced by others, at one to three places."""
    for _ in range(data.ConsumeIntInRange(1, 3)):
        at = data.ConsumeIntInRange(0, len(content))
        gone = data.ConsumeIntInRange(0, min(64, len(content) - at))
        content = content[:at] + data.ConsumeBytes(data.ConsumeIntInRange(0, 64)) + content[at + gone :]
    return content


def tensors_file(data: Any, content: bytes) -> bytes:
    """Return a safetensors file with other tensors, with a changed header, or with changed bytes."""
    how = data.ConsumeIntInRange(0, 3)
    if how == 0:
        return spliced(data, content)
    if how > 1:
        return other_tensors(data, content)
    size = struct.unpack("<Q", content[:8])[0]
    header = document(data, json.loads(content[8 : 8 + size]))
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def other_tensors(data: Any, content: bytes) -> bytes:
    """Return a valid safetensors file with one to three changes to its tensors.

    A change removes, adds or renames a tensor, or gives a tensor another type, shape or value.
    """
    import torch
    from safetensors.torch import load, save

    tensors = load(content)
    for _ in range(data.ConsumeIntInRange(1, 3)):
        names = sorted(tensors)
        if not names:
            break
        name = names[data.ConsumeIntInRange(0, len(names) - 1)]
        other = names[data.ConsumeIntInRange(0, len(names) - 1)]
        new = data.ConsumeUnicodeNoSurrogates(8) or f"{name}.{other}"
        tensor = tensors[name]
        act = data.ConsumeIntInRange(0, 8)
        if act == 0:
            del tensors[name]
        elif act == 1:
            tensors[new] = tensors.pop(name)
        elif act == 2:
            tensors[new] = tensor.clone()
        elif act == 3:
            kinds = (torch.int64, torch.bool, torch.uint8, torch.float64, torch.bfloat16, torch.float8_e4m3fn)
            tensors[name] = tensor.to(kinds[data.ConsumeIntInRange(0, len(kinds) - 1)])
        elif act == 4:
            tensors[name] = tensor.flatten()[: data.ConsumeIntInRange(0, 3)].clone()
        elif act == 5:
            tensors[name] = tensor.unsqueeze(0)
        elif act == 6:
            tensors[name] = tensors[other].clone()
        elif act == 7:
            tensors[name] = torch.full(tensor.shape, (float("nan"), float("inf"), 0.0)[data.ConsumeIntInRange(0, 2)])
        else:
            tensors[name.replace(".", new, 1)] = tensor.clone()
    return save(tensors)


if __name__ == "__main__":
    sys.exit(main())
