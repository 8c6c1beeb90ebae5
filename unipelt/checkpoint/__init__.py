"""Save, load and publish trained weights."""
