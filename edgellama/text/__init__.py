"""Text to tokens and back: tokenizers, chat templates, windows of text."""
