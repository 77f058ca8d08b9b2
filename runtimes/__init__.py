"""Runtimes: bundle to logits, one module per runtime."""
