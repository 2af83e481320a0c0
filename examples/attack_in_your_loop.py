"""Only the attack and the penalty, in a training loop of your own.

python examples/attack_in_your_loop.py [--steps N]

Trains a small masked autoencoder on random images; put your model's images in their place.
"""

import argparse

import torch

from mimir_fast import create_model, nhsic, pgd_mae


def train(steps: int, batch: int = 16, weight: float = 1e-5) -> list[float]:
    """Reconstruct clean images from adversarial ones; returns each step's loss."""
    model = create_model("mae_vit_nano", img_size=32, patch_size=8, norm_pix_loss=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for _ in range(steps):
        # [B,C,H,W], in [0,1]
        images = torch.rand(batch, 3, 32, 32)
        # images within eps of the clean ones that the model reconstructs badly; needs no labels
        adv = pgd_mae(model, images, eps=8 / 255, alpha=10 / 255, steps=1)
        loss, _, _, latent = model(images, mask_ratio=0.75, adv_images=adv)
        # how much the latent tokens tell about the adversarial image
        total = loss + weight * nhsic(latent.flatten(1), adv.flatten(1))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a masked autoencoder on adversarial images.")
    parser.add_argument("--steps", type=int, default=100, help="updates (default: %(default)s)")
    for step, loss in enumerate(train(parser.parse_args().steps)):
        print(f"step {step}: loss {loss:.4f}")
