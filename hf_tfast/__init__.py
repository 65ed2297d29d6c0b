"""Fast attention and feed-forwards for any Hugging Face Transformer."""
