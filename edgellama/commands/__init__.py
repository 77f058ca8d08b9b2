"""Verbs as library functions that return data. The command line (edgellama/cli) prints it."""
