"""Weights of other programs: PEFT, AdapterHub, the authors' release."""
