"""The equations: submodules and gates, one kind a file."""
