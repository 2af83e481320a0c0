"""Analysis: mutual information of a model's features with images, adversarial images and perturbations, with intervals."""
