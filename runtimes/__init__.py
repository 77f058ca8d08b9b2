"""Bundle -> logits, one file a runtime."""
