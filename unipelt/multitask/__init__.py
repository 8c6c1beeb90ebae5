"""Train and run several tasks on one base model."""
