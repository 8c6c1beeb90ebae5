"""Reading, writing and fetching files, and how they are named in messages."""
