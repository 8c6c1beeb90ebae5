"""The record of a run, result.json."""
