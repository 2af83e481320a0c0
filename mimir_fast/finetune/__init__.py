"""Adversarial fine-tuning of a pre-trained encoder."""
