"""Descriptions of code, packages, hardware and memory, for the record of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unipelt.version import __version__

_HOME = Path(__file__).resolve().parents[1]  # the folder of this package
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


def describe_code() -> dict[str, Any]:
    """Return the commit of this package's repository, and whether tracked files differ from the commit.

    Both are None if the package is not a part of a repository.
    """
    # a package that is installed inside another repository is not a part of that repository
    if _git(_HOME, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    changes = _git(_HOME, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(_HOME, "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def describe_packages() -> dict[str, str | None]:
    """Return the versions of Python, of this package, and of the packages that the numbers depend on."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "unipelt": __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def describe_hardware(device: str) -> dict[str, Any]:
    """Return the processor, cores, threads, memory in bytes and system, and the GPU if `device` is `cuda`."""
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def peak_memory(device: str) -> dict[str, int | None]:
    """Return the peak memory of this process so far, in bytes: resident memory and GPU memory."""
    try:
        import resource  # not available on every system
    except ImportError:
        resident = None
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "rss_bytes": resident,
        "cuda_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command, or None if the command fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
