"""The verbs as library functions that return data."""
