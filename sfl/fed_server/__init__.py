"""The federation server: the pool of updates, the quorum, the versions of the global adapter. NumPy and safetensors only."""
