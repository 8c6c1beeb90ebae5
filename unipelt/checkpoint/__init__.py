"""Saving, loading and publishing what was trained."""
