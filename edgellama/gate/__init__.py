"""The questions that the gate asks of an artifact."""
