"""What is minimised: reconstruction, mutual-information penalties, the losses of adversarial training."""
