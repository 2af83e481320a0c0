"""Objectives: reconstruction, mutual-information penalties, losses of adversarial training."""
