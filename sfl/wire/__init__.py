"""What crosses the network: tensors as checked raw bytes, in chunks, over channels that are made in one place."""
