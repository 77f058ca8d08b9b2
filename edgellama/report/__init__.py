"""Checks and reports, and the forms in which people and machines read them."""
