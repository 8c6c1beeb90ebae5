"""The configurations that come with the package: their folder, names and purposes, and copies of them."""

from __future__ import annotations

import re
from pathlib import Path

from unipelt.config.schema import read_mapping
from unipelt.files.atomic import write_whole
from unipelt.files.messages import show, show_path

_INSTALLED = Path(__file__).with_name("configs")
_REPOSITORY = Path(__file__).parents[1] / "configs"

USES = {
    "run": "unipelt run NAME",
    "sweep": "unipelt sweep NAME --out DIR",
    "benchmark": "examples/benchmark.py of the repository",
}
"""The uses of configurations, each with the command that reads them."""


def folder() -> Path:
    """Return the folder of the configurations: in a package from a wheel, else at the top of the repository."""
    return _INSTALLED if _INSTALLED.is_dir() else _REPOSITORY


def names() -> list[str]:
    """Return the names of the configurations, which are the names of their files without `.yaml`."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(config: str) -> str:
    """Return the path of a configuration.

    Args:
        config: a path, which is returned unchanged, or the name of a configuration that comes with the package, with
            or without `.yaml`. If both exist, the file is used.

    Raises:
        FileNotFoundError: neither the file nor the name exists.
    """
    if Path(config).is_file():
        return config
    if (name := config.removesuffix(".yaml")) in names():
        return str(folder() / f"{name}.yaml")
    if Path(config).exists():  # such as a folder, which the reader rejects
        return config
    raise FileNotFoundError(
        f"there is no configuration file at {show_path(config)}, and none of that name comes with the package; "
        "`unipelt configs` lists those that do"
    )


def named(name: str) -> Path:
    """Return the path of a configuration that comes with the package. Raise `ValueError` if the name is unknown."""
    short = name.removesuffix(".yaml")
    if short not in names():
        raise ValueError(f"no configuration {show(name)} comes with the package; there are {', '.join(names())}")
    return folder() / f"{short}.yaml"


def use(path: Path) -> str:
    """Return the use of a configuration, a key of `USES`."""
    text = path.read_text(encoding="utf-8")
    if re.search(r"^grid:", text, re.M):
        return "sweep"
    return "benchmark" if re.search(r"^methods:", text, re.M) else "run"


def purpose(path: Path) -> str:
    """Return the purpose of a configuration, which is its first line, a comment."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().rstrip(".")


def copy(name: str, to: str | Path) -> list[Path]:
    """Copy a configuration and its bases into a folder. The folder is made if it does not exist.

    Returns:
        The paths of the copies.

    Raises:
        ValueError: no configuration has that name, or the folder holds a different file with the name of a copy.
            Nothing was written.
        OSError: a copy cannot be written.
    """
    found = _with_bases(named(name), {})
    copies = {Path(to) / path.name: content for path, content in found.items()}
    for path, content in copies.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != content):
            raise ValueError(f"{show_path(path)} is there, and differs; choose another folder, or move it away")
    Path(to).mkdir(parents=True, exist_ok=True)
    for path, content in copies.items():
        write_whole(path, content)
    return list(copies)


def _with_bases(path: Path, found: dict[Path, bytes]) -> dict[Path, bytes]:
    """Add the contents of a file and of all its bases to `found`, by path, and return `found`."""
    if path not in found:
        found[path] = path.read_bytes()
        bases = read_mapping(path).get("base", [])
        for base in [bases] if isinstance(bases, str) else bases:
            _with_bases(path.parent / base, found)
    return found
