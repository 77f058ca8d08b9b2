"""Examinations of an artifact by the gate, one question each. docs/gate.md has their order."""
