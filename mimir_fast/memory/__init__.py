"""Peak GPU memory of a pre-training step, predicted without a GPU."""
