"""What a host model looks like: families, places, quantised weights."""
