"""Malformed files, by name: what each reader of `unipelt` must refuse. The same ones every time.

Every case is a function that spoils something good in place, a copy that its test made; nothing here is random.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers import seal
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

WEIGHTS, MANIFEST = "model.safetensors", "unipelt.json"
Spoil = Callable[[Path], None]
"""Spoils a checkpoint's folder in place."""


class Planted:
    """An object whose pickle makes a file where it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def planted_yaml(mark: Path) -> bytes:
    """YAML whose tag makes a file where it is obeyed."""
    return f"lora: !!python/object/apply:os.mkdir ['{mark}']\n".encode()


# --- text


def spoilt_json(good: bytes) -> dict[str, bytes]:
    """What is no JSON, or none of plain values, made of a JSON mapping."""
    values = json.loads(good)
    first = next(iter(values))

    def having(text: str) -> bytes:
        return f'{{"surprise": {text}, {good.decode().strip()[1:]}'.encode()

    return {
        **{f"its first {part} %": good[: len(good) * part // 100] for part in (0, 1, 25, 50, 75, 99)},
        "blank": b" \n\t ",
        "NUL": b"\0" * len(good),
        "a NUL before": b"\0" + good,
        "a NUL after": good + b"\0",
        "Latin-1": having('"\xe9"').decode().encode("latin-1"),
        "UTF-16": good.decode().encode("utf-16"),
        "UTF-32": good.decode().encode("utf-32"),
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "twice": good + good,
        "something behind": good + b"x",
        "a comment": b"// mine\n" + good,
        "single quotes": good.replace(b'"', b"'"),
        "a comma too many": good.rstrip()[:-1] + b",}",
        "a list": b"[" + good + b"]",
        "a number": b"3",
        "a text": json.dumps(good.decode()).encode(),
        "null": b"null",
        "deep lists": having("[" * 100_000 + "]" * 100_000),
        "deep mappings": having('{"a":' * 50_000 + "1" + "}" * 50_000),
        "a little too deep": having("[" * 150 + "]" * 150),
        "NaN": having("NaN"),
        "Infinity": having("-Infinity"),
        "1e400": having("[1e400]"),
        "5000 digits": having("1" * 5_000),
        "a name twice": having(f'1, "{first}": 1'),
        "a name twice within": having('{"a": 1, "a": 1}'),
        "half a surrogate pair": having('"\\ud800"'),
        "half a surrogate pair as a name": having('{"\\udfff": 1}'),
        "an escaped NUL": having('"a\\u0000b"'),
        "a pickle": pickle.dumps(values),
    }


def spoilt_yaml(good: bytes) -> dict[str, bytes]:
    """What is no YAML, or none of plain values, made of a YAML mapping in block style."""

    def having(text: str) -> bytes:
        return f"{text}\n".encode() + good

    first = next(iter(yaml.safe_load(good)))
    levels = "abcdefghijkl"
    aliases = [f"{a}: &{a} [{', '.join([f'*{before}'] * 9)}]" for before, a in itertools.pairwise(levels)]
    merges = [f"{a}: &{a}\n  <<: [{', '.join([f'*{before}'] * 9)}]" for before, a in itertools.pairwise(levels)]
    return {
        "a list": b"- 1\n",
        "a text": b"words",
        "empty": b"",
        "NUL": b"\0\0",
        "a NUL within": having("surprise: a\0b"),
        "Latin-1": "surprise: \xe9\n".encode("latin-1") + good,
        "UTF-16": good.decode().encode("utf-16"),
        "two documents": good + b"---\n" + good,
        "open": having("surprise: [1, 2"),
        "a tab": having("surprise:\n\t- 1"),
        "an unknown alias": having("surprise: *nothing"),
        "an alias of itself": having("surprise: &a [*a]"),
        "an alias bomb": having("\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *aliases])),
        "a merge bomb": having("\n".join(["a: &a {x: 1}", *merges])),
        "deep lists": having(f"surprise: {'[' * 20_000}{']' * 20_000}"),
        "deep blocks": having(f"surprise:\n {'- ' * 5_000}1"),
        "a name twice": having(f"{first}: 1"),
        "a name twice within": having("surprise: {a: 1, a: 1}"),
        "a list as name": having("? [a]\n: 1"),
        "a mapping as name": having("? {a: b}\n: 1"),
        "a number as name": having("3: 1"),
        "nothing as name": having("~: 1"),
        "not a number": having("surprise: .nan"),
        "no end": having("surprise: -.inf"),
        "a date": having("surprise: 2020-01-01"),
        "no date": having("surprise: 2020-13-45"),
        "5000 digits": having(f"surprise: {'1' * 5_000}"),
        "many hexadecimal digits": having(f"surprise: 0x{'f' * 9_000}"),
        "Python": having("surprise: !!python/object/apply:os.getcwd []"),
        "a Python name": having("surprise: !!python/name:os.system"),
        "a tag of one's own": having("surprise: !mine 1"),
        "a set": having("surprise: !!set {a, b}"),
        "bytes": having("surprise: !!binary aGVsbG8="),
        "an empty int": having('surprise: !!int ""'),
        "a float of words": having("surprise: !!float words"),
        "a bool of words": having("surprise: !!bool words"),
        "a time of words": having("surprise: !!timestamp words"),
        "2 MB": having("surprise: " + "x" * 2 * 2**20),
    }


# --- a checkpoint's weights


def packed(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of such a header (bytes are taken as they are) that claims such a length for it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def spoilt_weights(good: bytes) -> dict[str, bytes]:
    """What is no safetensors file, or none that can be meant, made of a good one."""
    size = struct.unpack("<Q", good[:8])[0]
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    first, second = names[:2]

    def having(name: str = first, **changes: Any) -> bytes:
        return packed(header | {name: header[name] | changes}, data)

    start, end = header[second]["data_offsets"]
    cuts = (0, 1, 7, 8, 9, 8 + size // 2, 7 + size, 8 + size, 9 + size, len(good) // 2, len(good) - 4, len(good) - 1)
    lengths = (0, 1, size - 1, size + 1, len(good), 100_000_001, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
    shape = header[first]["shape"]
    return {
        **{f"its first {cut} bytes": good[:cut] for cut in cuts},
        **{f"a header of {length} bytes": packed(json.dumps(header).encode(), data, length) for length in lengths},
        "a byte more": good + b"\0",
        "a header without tensors": packed({}, data),
        "a header that is a list": packed([header], data),
        "a header that is null": packed(b"null", data),
        "a header that is no JSON": packed(b"{'a': 1}", data),
        "a header in Latin-1": packed(json.dumps(header).encode().replace(b"bert", b"b\xe9rt", 1), data),
        "a deep header": packed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, data),
        "NaN in the header": packed(json.dumps(header).encode().replace(b"[0,", b"[NaN,", 1), data),
        "no shape": packed(header | {first: {"dtype": "F32", "data_offsets": [0, 4]}}, data),
        "no offsets": packed(header | {first: {"dtype": "F32", "shape": [1]}}, data),
        "no dtype": packed(header | {first: {"shape": [1], "data_offsets": [0, 4]}}, data),
        **{
            f"the dtype {dtype}": having(dtype=dtype)
            for dtype in ("F64", "F16", "I64", "I8", "BOOL", "F99", "object", "", None, 3, ["F32"])
        },
        **{
            f"the shape {wrong!s:.30}": having(shape=wrong)
            for wrong in (
                [],
                [0],
                [-1],
                [*shape, 2],
                [1.5],
                ["1"],
                None,
                [2**62, 2**62],
                [2**64],
                [10**30],
                [1] * 10_000 + [7],
                "all",
            )
        },
        **{
            f"the offsets {wrong}": having(second, data_offsets=wrong)
            for wrong in (
                [0, end - start],  # those of another tensor
                [start - 4, end - 4],
                [start + 4, end + 4],
                [start, end + 4],
                [start, end - 4],
                [end, start],
                [len(data), len(data) + end - start],
                [-4, end - start - 4],
                [start, 2**64],
                [start],
                [start, end, end],
                ["0", "4"],
                None,
            )
        },
        "a hole": packed(header, data + b"\0\0\0\0"),
        "text": b"no tensors at all, but words",
        "0xff": b"\xff" * 5_000,
        "zeros": b"\0" * 5_000,
    }


def _map_tensors(change: Callable[[dict[str, Tensor]], None], folder: Path) -> None:
    tensors = load_tensors((folder / WEIGHTS).read_bytes())
    change(tensors)
    (folder / WEIGHTS).write_bytes(dump_tensors(tensors))
    seal(folder)


def _replace(name: str, make: Callable[[Tensor], Tensor], tensors: dict[str, Tensor]) -> None:
    found = next(full for full in sorted(tensors) if full.endswith(name))
    tensors[found] = make(tensors[found]).contiguous()


def _drop(name: str, tensors: dict[str, Tensor]) -> None:
    del tensors[next(full for full in sorted(tensors) if full.endswith(name))]


def _add(name: str, tensors: dict[str, Tensor]) -> None:
    tensors[name] = torch.zeros(2)


_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda tensor: tensor.flatten(),
    "a dimension more": lambda tensor: tensor[None],
    "half": lambda tensor: tensor[: len(tensor) // 2],
    "twice": lambda tensor: torch.cat([tensor, tensor]),
    "one that would broadcast": lambda tensor: tensor[:1],
    "one number": lambda tensor: tensor.flatten()[0],
    "nothing": lambda tensor: tensor[:0],
    "whole numbers": lambda tensor: tensor.long(),
    "bytes": lambda tensor: tensor.to(torch.uint8),
    "truth values": lambda tensor: tensor.bool(),
    "complex numbers": lambda tensor: tensor.to(torch.complex64),
}
_PARTS = (
    *("adapter.entry.weight", "adapter.up.weight", "default.entry.weight", "default.entry.bias"),
    *("lora_query.B", "prefix_network.embedding", "classifier.weight"),
)
_NAMES = (
    *("", ".", "..", "../../etc/passwd", "/etc/passwd", "__class__", "__dict__", "bert", "classifier", "config"),
    *("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.9.unipelt.default.adapter.entry.weight"),
    *("bert.encoder.layer.0.output.LayerNorm.adapter.down.weight", "bert.encoder.layer.0.unipelt.other.entry.bias"),
    *("classifier.weight\0", "classifier.weight.data", "x" * 100_000, "\u202eweight"),
)


def _one_bit(place: int, folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[place] ^= 1 << (place % 8)
    (folder / WEIGHTS).write_bytes(content)


def _instead(make: Callable[[Path], bytes], sealed: bool, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(make(folder))
    if sealed:
        seal(folder)


def _given(content: bytes, folder: Path) -> bytes:
    return content


def _torch_file(folder: Path) -> bytes:
    file = io.BytesIO()
    torch.save(load_tensors((folder / WEIGHTS).read_bytes()) | {"planted": Planted(folder / "planted")}, file)
    return file.getvalue()


def _pickle_only(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(_torch_file(folder))
    (folder / WEIGHTS).unlink()


def _at(name: str, make: Callable[[Path], None], folder: Path) -> None:
    (folder / name).unlink()
    make(folder / name)


def _elsewhere(path: Path) -> None:
    other = path.parent.parent / f"{path.name} elsewhere"
    other.write_bytes(dump_tensors({"a": torch.zeros(3)}) if path.name == WEIGHTS else b"secret: 1\n")
    path.symlink_to(other)


_NO_FILES: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to the folder": lambda path: path.symlink_to(path.parent),
    "a link out of the folder": _elsewhere,
}


def checkpoints(good: Path) -> dict[str, Spoil]:
    """Ways to spoil the weights of a checkpoint and the files it consists of."""
    weights = (good / WEIGHTS).read_bytes()
    cases: dict[str, Spoil] = {}
    for name, content in spoilt_weights(weights).items():
        cases[f"weights: {name}"] = partial(_instead, partial(_given, content), True)
    for cut in (0, 8, 5_000, len(weights) - 1):
        cases[f"weights, unsealed: {cut} bytes"] = partial(_instead, partial(_given, weights[:cut]), False)
    for place in (*range(0, 8, 2), *range(8, len(weights), len(weights) // 24), len(weights) - 1):
        cases[f"weights: bit {place % 8} of byte {place}"] = partial(_one_bit, place)
    tensors = load_tensors(weights)
    for part in _PARTS:
        cases[f"tensors: no {part}"] = partial(_map_tensors, partial(_drop, part))
        found = next(tensors[full] for full in sorted(tensors) if full.endswith(part))
        for shape, make in _SHAPES.items():
            if make(found).shape == found.shape and make(found).dtype == found.dtype:
                continue  # what is flat already, say
            cases[f"tensors: {part}, {shape}"] = partial(_map_tensors, partial(_replace, part, make))
    for extra in _NAMES:
        cases[f"tensors: one called {extra[:30]!r}"] = partial(_map_tensors, partial(_add, extra))
    cases["tensors: none"] = partial(_map_tensors, dict.clear)
    pickles: Mapping[str, Callable[[Path], bytes]] = {
        "a pickle": lambda folder: pickle.dumps(Planted(folder / "planted")),
        "an old pickle": lambda folder: pickle.dumps(Planted(folder / "planted"), protocol=0),
        "a file of torch.save": _torch_file,
        "a pickle after a header": lambda folder: packed({}, pickle.dumps(Planted(folder / "planted"))),
    }
    for name, make_bytes in pickles.items():
        cases[f"weights: {name}"] = partial(_instead, make_bytes, True)
        cases[f"weights, unsealed: {name}"] = partial(_instead, make_bytes, False)
    cases["weights: pytorch_model.bin alone"] = _pickle_only
    for file in (WEIGHTS, MANIFEST):
        for name, put in _NO_FILES.items():
            cases[f"{file} is {name}"] = partial(_at, file, put)
    return cases


# --- a checkpoint's manifest

BIG = "x" * 7_000_000  # below the size at which a manifest is not read at all


def _any(*values: Any) -> tuple[Any, ...]:
    return values


_WRONG: dict[str, tuple[Any, ...]] = {  # values that are none of the kind
    "mapping": (None, 3, "words", [], [{}], True),
    "list of texts": (None, 3, "words", {}, [3], [None], [["classifier.weight"]], True),
    "text": (None, 3, [], {}, True, 10**400),
    "truth": (None, 0, 1, "true", [], {}),
    "size": (0, -1, 1.5, "6", True, [], {}, 10**7, 2**63, 10**30, 10**400, BIG),
}
_KINDS = {
    "unipelt": "mapping",
    "base": "mapping",
    "base.config": "mapping",
    "base.computation": "mapping",
    "base.fingerprint": "mapping",
    "weights": "mapping",
    "head": "list of texts",
    "unfrozen": "list of texts",
    "base.class": "text",
    "base.name_or_path": "text",
    "base.fingerprint.sha256": "text",
    "base.fingerprint.dtype": "text",
    "weights.sha256": "text",
    "weights.file": "text",
    "deployed": "truth",
    "unipelt.bitfit": "truth",
    "unipelt.train_head": "truth",
    "unipelt.lora.gate": "truth",
    "unipelt.adapter.bottleneck": "size",
    "unipelt.prefix.length": "size",
    "unipelt.prefix.hidden": "size",
    "unipelt.lora.rank": "size",
}
_VALUES: list[tuple[str, object]] = [
    *[("format", value) for value in _any(None, 0, 1, 3, "2", True, 1.5, 2.0, [2], 10**400)],
    *[
        ("weights.file", name)
        for name in ("", ".", "../x", "/etc/passwd", "a/../model.safetensors", "pytorch_model.bin")
    ],
    *[("weights.file", name) for name in ("model.safetensors/", "./model.safetensors", "MODEL.safetensors", BIG)],
    *[("weights.sha256", text) for text in ("", "0" * 64, "x", BIG)],
    *[("base.revision", value) for value in _any(3, [], {}, True)],
    *[("base.config.model_type", value) for value in _any(None, 3, "roberta", ["bert"], "../bert", BIG)],
    *[("base.fingerprint.sha256", text) for text in ("", "0" * 64, BIG)],
    *[("base.computation.hidden_act", value) for value in _any(None, 3, "relu", ["gelu"], {"gelu": 1}, BIG)],
    *[("base.computation.layer_norm_eps", value) for value in _any(1, "1e-12", 1e-5, 10**400)],
    *[("unipelt.lora.alpha", value) for value in _any(0, -1.0, "5", 10**400, True, [])],
    *[("unipelt.layers", value) for value in _any([], [-1], [0, 0], [9], [0.5], "all of them", "5-2", [10**30], [[0]])],
    *[("unipelt.prefix.gating", value) for value in _any("Scale", None, 3, ["scale"], BIG)],
    *[("unipelt.gate.pooling", value) for value in _any("max", None, 3)],
    *[
        (f"unipelt.{part}", value)
        for part in ("adapter", "prefix", "lora", "gate")
        for value in _any(3, "yes", [], True)
    ],
    *[(f"{part}surprise", 1) for part in ("", "base.", "unipelt.", "unipelt.lora.", "unipelt.gate.")],
    ("unipelt.preset", "lora"),
    ("unipelt.lora", None),
    ("unipelt.layers", [0, 1]),
    ("unipelt.bitfit", True),
    ("unipelt.train_base", True),
    ("unipelt.adapter.bottleneck", 7),
    ("unipelt.prefix.length", 999_999),
    ("unipelt.lora.rank", 1_000_000),
    ("deployed", True),
    ("head", []),
    ("head", ["classifier.weight", "classifier.bias", "../weight"]),
    ("head", ["classifier.weight", "classifier.bias", BIG]),
    ("unfrozen", ["bert.encoder.layer.0.output.dense.bias"]),
    ("unfrozen", ["../x"]),
    *[
        ("folded", value)
        for value in _any(
            None,
            [],
            "words",
            {"a": 1},
            {"a": {"adapter": 0}},
            {"a": {"adapter": -0.5}},
            {"a": {"adapter": 1.5}},
            {"a": {"adapter": "1"}},
            {"a": {"adapter": True}},
            {"a": {"adapter": [0.5]}},
            {"a": {"adapter": 10**400}},
            {"../a": {"adapter": 0.5}},
            {"bert.encoder.layer.0.attention.self": {"adapter": 0.5}},
            {"bert.encoder.layer.0.attention.self": {"prefix": None}},
            {"bert.encoder.layer.0.unipelt.default.entry": {"adapter": 0.5}},
            {"bert.encoder.layer.0.unipelt.default": {"prefix": 0.5}},
            {BIG: {"adapter": 0.5}},
            {"a": {BIG: 0.5}},
        )
    ],
]


def manifests() -> dict[str, tuple[str, object]]:
    """Where in a manifest what value cannot be meant, by name."""
    cases = [(where, value) for where, kind in _KINDS.items() for value in _WRONG[kind]] + _VALUES
    return {f"{where} is {_short(value)} ({number})": (where, value) for number, (where, value) in enumerate(cases)}


MISSING = (
    *("format", "unipelt", "deployed", "head", "unfrozen", "base", "weights", "weights.file", "weights.sha256"),
    *("base.class", "base.name_or_path", "base.config", "base.fingerprint"),
    *("base.fingerprint.sha256", "base.fingerprint.dtype"),
)
"""What a manifest cannot do without."""


def _short(value: object) -> str:
    if isinstance(value, str):
        return repr(value[:20])
    return "a whole number of many digits" if isinstance(value, int) and value > 10**40 else repr(value)[:40]


# --- configurations, settings, sweeps, data

METHODS: list[dict[str, Any]] = [
    *[{"preset": value} for value in _any("nothing", 3, [], {}, BIG)],
    *[{part: value} for part in ("adapter", "prefix", "lora", "gate") for value in _any(3, "yes", [1], True)],
    *[{"lora": {"rank": value}} for value in _WRONG["size"]],
    *[{"lora": {"alpha": value}} for value in _any(0, "16", 10**400, [])],
    *[{"layers": value} for value in _any([], [-1], [1, 1], "a-b", 3, {"a": 1}, "0-99999")],
    *[{key: 1} for key in ("surprise", "", "lora.rank", "__class__", BIG)],
    {"lora": {"surprise": 1}},
    {"lora": {"rank": {"rank": 1}}},
]
RUNS: list[dict[str, Any]] = [
    *[{"task": value} for value in _any("nothing", 3, [], BIG, None)],
    *[{"seed": value} for value in _any(-1, 2**32, 1.5, "words", True, [1], 10**400)],
    *[{"learning_rate": value} for value in _any(0, -1, "words", True, [1], 10**400, "1e999", "nan")],
    *[{"epochs": value} for value in _any(0, 1.5, "3", None, {})],
    *[{"batch_size": value} for value in _any(0, -1, "many")],
    *[{"warmup_ratio": value} for value in _any(1, -0.1, "half")],
    *[{"precision": value} for value in _any("fp8", None, 32)],
    *[{"model": value} for value in _any("", 3, None, ["bert"])],
    *[{"model_sha256": value} for value in _any("", "abc", 3, "G" * 64, BIG)],
    *[{"text_columns": value} for value in _any([3], {"a": 1}, 5)],
    *[
        {"method": value}
        for value in _any(3, None, [], "nothing", "../nothing.yaml", {"surprise": 1}, {"lora": 3}, BIG)
    ],
    *[{"method.lora.rank": value} for value in _any("words", 0, [], None)],
    {"method.": 1},
    {"method.lora": 3},
    *[{"base": value} for value in _any(3, [3], {"a": 1}, "nowhere.yaml", "/", ".", "a" * 5_000 + ".yaml")],
    {"train_file": "a.tsv"},
    {"surprise": 1},
    {"Task": "rte"},
]
SWEEPS: list[dict[str, Any]] = [
    *[{"grid": value} for value in _any(None, 3, [], {}, [[]], [{}], ["seed"], [3], "seed")],
    *[{"grid": [{"seed": value}]} for value in _any([], ["a"], [[1]], [-1], [None], [{"a": 1}], {"a": 1}, [10**400])],
    *[{"grid": [{"method": value}]} for value in _any(["nothing"], [3], [{"lora": 3}], ["nowhere.yaml"], [BIG])],
    *[{"grid": [{key: [1]}]} for key in ("surprise", "output_dir", "overwrite", "grid", "", BIG)],
    *[{"choose": value} for value in _any(3, [], "seed", {"seed": [1]}, {"surprise": [1]}, {"learning_rate": []})],
    {"grid": [{"seed": list(range(300)), "data_seed": list(range(300)), "batch_size": list(range(1, 300))}]},
    {"choose": {"learning_rate": [i / 10_000 for i in range(1, 9_000)], "epochs": list(range(1, 9_000))}},
    {"output_dir": "here"},
    {"surprise": 1},
]

_ROWS = '{"text": "x", "label": 1}\n'
DATA: dict[str, bytes] = {
    "a.tsv": b"",
    "header.tsv": b"text\tlabel\n",
    "short.tsv": b"text\tlabel\nx\n",
    "long.tsv": b"text\tlabel\nx\t1\t2\n",
    "twice.tsv": b"text\ttext\tlabel\nx\ty\t1\n",
    "latin.tsv": b"text\tlabel\nx\xe9\t1\ny\t0\n",
    "utf16.tsv": "text\tlabel\nx\t1\ny\t0\n".encode("utf-16"),
    "nan.tsv": b"text\tlabel\nx\t1.5\ny\tnan\n",
    "huge.tsv": b"text\tlabel\nx\t1.5\ny\t1e400\n",
    "no-label.tsv": b"text\tlabel\nx\t\ny\t1\n",
    "blank.tsv": b"\n\n\n",
    "pickle.tsv": pickle.dumps([1, 2]),
    "open.csv": b'text,label\n"x,1\n',
    "quoted.csv": b'text,label\n"x"y,1\n',
    "wide.csv": b"text,label\n" + b"x" * 200_000 + b",1\n",
    "nul.csv": b"\0\0\0\0",
    "fields.csv": b"text,label\nx,1,2\n",
    "no-rows.csv": b"text,label\n",
    "no-column.csv": b"text,gold\nx,1\n",
    "single.csv": b"text,label\nx,1\ny,1\n",
    "empty.json": b"",
    "number.json": b"3",
    "null.json": b"null",
    "numbers.json": b"[1, 2]",
    "deep.json": b"[" * 100_000,
    "digits.json": b'[{"text": "x", "label": ' + b"1" * 5_000 + b"}]",
    "half.json": b'[{"text": "x"',
    "no-text.json": b'[{"text": 3, "label": 1}]',
    "surrogate.json": b'[{"text": "\\ud800", "label": 1}]',
    "labels.json": b'[{"text": "x", "label": {"a": 1}}]',
    "infinite.json": b'[{"text": "x", "label": 0.5}, {"text": "x", "label": Infinity}]',
    "deep.jsonl": _ROWS.encode() + b'{"text": ' + b"[" * 100_000 + b"\n",
    "digits.jsonl": _ROWS.encode() + b'{"text": "x", "label": ' + b"1" * 5_000 + b"}\n",
    "half.jsonl": _ROWS.encode() + b'{"text": \n',
    "bytes.jsonl": _ROWS.encode() + b'{"text": "\xff"}\n',
    "list.jsonl": _ROWS.encode() + b'["text"]\n',
    "empty.parquet": b"",
    "magic.parquet": b"PAR1PAR1",
    "long.parquet": b"PAR1" + b"\0" * 100 + b"\xff\xff\xff\x7fPAR1",
    "pickle.parquet": pickle.dumps([1, 2]),
    "columns.tsv": "\t".join(f"column{i}" for i in range(20_000)).encode() + b"\nx\n",
    "columns.csv": ",".join(f"column{i}" for i in range(20_000)).encode() + b"\nx\n",
    "long-name.tsv": b"x" * 20_000 + b"\t" + b"x" * 20_000 + b"\nx\ty\n",
    "deep-row.json": b"[" + b"[" * 900 + b"]" * 900 + b"]",
    "no-text.tsv": "\t".join(f"column{i}" for i in range(20_000)).encode() + b"\n" + b"\t" * 19_999 + b"\n",
    "long-label.tsv": b"text\tlabel\nx\t" + b"z" * 100_000 + b"\n",
    "digits.tsv": b"text\tlabel\nx\t" + b"1" * 5_000 + b"\ny\t2\n",
    "deep-text.json": b'[{"text": ' + b"[" * 900 + b"]" * 900 + b', "label": 1}]',
    "deep-label.json": b'[{"text": "x", "label": ' + b"[" * 900 + b"]" * 900 + b"}]",
    "text.xlsx": b"PK",
    "text": b"x",
}
