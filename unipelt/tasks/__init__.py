"""Tasks beside GLUE: questions about a text (SQuAD's format) and translation.

They are trained as GLUE's are: what is loaded, resumed, watched and recorded is that of `unipelt.glue`.
"""
