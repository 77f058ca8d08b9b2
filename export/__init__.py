"""Checkpoint -> artifacts: one file a step or a target. Called as a function, the verb of `edgellama.commands.export`."""

from edgellama.verb import callable_as

callable_as(__name__, "edgellama.commands.export:export")
