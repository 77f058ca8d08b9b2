"""Reference interpreter of Core ML programs, for machines without Core ML."""
