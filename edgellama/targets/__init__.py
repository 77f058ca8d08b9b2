"""One folder a target: the format, its numerics, its limits and its judgement."""
