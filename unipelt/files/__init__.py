"""Functions that read, write and download files, and that format values and paths for messages."""
