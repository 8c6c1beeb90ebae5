"""Several tasks on one base model."""
