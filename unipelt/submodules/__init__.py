"""The equations of submodules and gates, with one file for each kind.

This package imports the submodules that a configuration can name, because the import adds them to the registry.
"""

from unipelt.submodules import bottleneck, compacter, dora, experts, ia3, ln_tuning, red, reft

__all__ = ["bottleneck", "compacter", "dora", "experts", "ia3", "ln_tuning", "red", "reft"]
