"""From a file to batches: Zeek logs, CSV, JSONL and text become examples, splits, tokens. No torch in here."""
