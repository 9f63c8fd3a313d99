"""The device: its own data, the embeddings and first blocks, and the clock of its training."""
