"""Split federated LoRA fine-tuning for devices that could never hold the model."""

__version__ = "0.1.0"
