"""Training: hand an optimizer to any transformers trainer, average, record, plan, run and sweep."""
