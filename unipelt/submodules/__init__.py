"""The equations: submodules and gates, one kind a file.

The submodules that a configuration names are imported here, so that the registry knows them.
"""

from unipelt.submodules import bottleneck, compacter, dora, ia3, red

__all__ = ["bottleneck", "compacter", "dora", "ia3", "red"]
