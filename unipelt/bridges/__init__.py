"""Read and write weights of other programs: PEFT, AdapterHub, the authors' release."""
