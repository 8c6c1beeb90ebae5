"""Attaching submodules to a host, detaching them, and the state of an injected model."""
