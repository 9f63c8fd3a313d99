"""A Hugging Face model in two halves: where it is cut, LoRA on each half, loading, tasks and their figures."""
