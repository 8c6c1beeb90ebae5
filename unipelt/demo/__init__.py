"""The demo: a small task that a bag of words cannot learn, its sentences, and three methods on this task."""
