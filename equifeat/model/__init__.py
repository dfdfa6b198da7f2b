"""Model: weights, frozen backbone, LoRA adapter, head, extractor."""
