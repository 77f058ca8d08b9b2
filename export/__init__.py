"""Checkpoint -> artifacts: one file a step or a target. Called as a function, the verb of `edgellama.build`."""

from edgellama.verb import callable_as

callable_as(__name__, "edgellama.build:export")
