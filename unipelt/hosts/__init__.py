"""Descriptions of host models: families, places for submodules, and quantised weights."""
