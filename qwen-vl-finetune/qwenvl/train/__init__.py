"""Fine-tuning: arguments, model loading, parameter groups, attention for packed batches, trainer."""
