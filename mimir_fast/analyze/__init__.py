"""What a trained model's features tell about images, adversarial images and perturbations, in estimates with intervals."""
