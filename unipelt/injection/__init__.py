"""Injection of submodules into a host model, their removal, and the state of an injected model."""
