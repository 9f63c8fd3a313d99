"""An adapter as data: layer-indexed LoRA matrices and a task head, added up and written to disk without torch."""
