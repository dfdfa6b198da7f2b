"""Data: views on disk to batches of corresponding pixels."""
