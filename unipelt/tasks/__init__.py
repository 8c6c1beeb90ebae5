"""Tasks other than GLUE: questions about a text (SQuAD's format) and translation.

Runs on these tasks are loaded, trained, resumed and recorded as the runs of `unipelt.glue`.
"""
