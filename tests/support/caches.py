"""Streams of pre-training images from class folders or caches of them."""

import torch

from mimir_fast.data import build_pretrain_data


def stream(root, batch_size=4, size=16, **loading):
    return build_pretrain_data("imagefolder", root, size, batch_size, **loading)


def collect(made, epoch=0, start=0):
    """Images and labels of the rest of an epoch."""
    batches = list(made.epoch(epoch, start))
    return torch.stack([images for images, _ in batches]), torch.stack([labels for _, labels in batches])


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))
