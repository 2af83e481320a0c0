"""The rival: masked autoencoder and step written straightforwardly, as a reader of the paper would.

Every patch is embedded by a convolution and the kept tokens are selected afterwards, masks come from two argsorts, patches
from einsum, blocks from timm, the penalty from matrix inverses.  Independent of mimir_fast's own modules, so that tests
can compare the two and benchmarks have an honest baseline.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mimir_fast.models.layers import sincos_table


class TextbookMAE(nn.Module):
    """Same parameters, same results as MaskedAutoencoderViT; forward(images, mask_ratio, adv_images, noise) alike."""

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        decoder_embed_dim=128,
        decoder_depth=2,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        norm_pix_loss=False,
    ):
        super().__init__()
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss

        def blocks(width: int, heads: int, count: int) -> nn.ModuleList:
            norm = partial(nn.LayerNorm, eps=1e-6)
            return nn.ModuleList([Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(count)])

        grid = img_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_table(embed_dim, grid)[None], requires_grad=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder_embed_dim, grid)[None], requires_grad=False)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.blocks = blocks(embed_dim, num_heads, depth)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = blocks(decoder_embed_dim, decoder_num_heads, decoder_depth)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * patch_size**2)

    def forward(
        self, images: Tensor, mask_ratio: float = 0.75, adv_images: Tensor | None = None, noise: Tensor | None = None
    ):
        """images [B,3,H,W] -> loss, pred [B,L,P], mask [B,L], latent [B,1+K,D]."""
        x = self.patch_embed["proj"](images if adv_images is None else adv_images).flatten(2).transpose(1, 2)
        x = x + self.pos_embed[:, 1:]
        B, L, D = x.shape
        keep = int(L * (1 - mask_ratio))
        noise = torch.rand(B, L, device=x.device) if noise is None else noise
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        mask = torch.ones(B, L, device=x.device, dtype=noise.dtype)
        mask[:, :keep] = 0
        mask = mask.gather(1, restore)
        x = x.gather(1, order[:, :keep, None].repeat(1, 1, D))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        latent = self.norm(x)
        x = self.decoder_embed(latent)
        x_ = torch.cat([x[:, 1:], self.mask_token.repeat(B, L - keep, 1)], dim=1)
        x = (
            torch.cat([x[:, :1], x_.gather(1, restore[:, :, None].repeat(1, 1, x.shape[2]))], dim=1)
            + self.decoder_pos_embed
        )
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return self.loss(pred, images, mask), pred, mask, latent

    def loss(self, pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        """Masked mean squared error against the (normalised) patches of the images."""
        p, side = self.patch_size, images.shape[2] // self.patch_size
        grid = images.reshape(len(images), 3, side, p, side, p)
        target = torch.einsum("bchpwq->bhwpqc", grid).reshape(len(images), side**2, -1)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def textbook_hsic(x: Tensor, y: Tensor, sigma: float = 5.0) -> Tensor:
    """The penalty as defined: one-sided centring and explicit inverses; x [m,dx], y [m,dy] -> scalar."""
    m = len(x)
    center = torch.eye(m, dtype=x.dtype, device=x.device) - 1 / m
    ridge = 1e-5 * m * torch.eye(m, dtype=x.dtype, device=x.device)

    def normalised(rows: Tensor) -> Tensor:
        norms = (rows * rows).sum(1)
        distances = (norms[:, None] - 2 * rows @ rows.T + norms[None]).abs()
        kernel = torch.exp(-distances / (2 * sigma**2 * rows.shape[1])) @ center
        return kernel @ torch.linalg.inv(kernel + ridge)

    return (normalised(x) * normalised(y).T).sum()


def textbook_step(
    model: nn.Module, images: Tensor, eps: float, alpha: float, mask_ratio: float, weight: float
) -> Tensor:
    """Attack, forward, loss and penalty with the parameters' graph alive throughout; returns the loss to differentiate."""
    model.eval()
    adv = (images + (2 * torch.rand_like(images) - 1) * eps).clamp(0, 1).requires_grad_(True)
    (grad,) = torch.autograd.grad(model(adv)[0], adv)
    adv = adv.detach() + alpha * grad.sign()
    adv = (images + (adv - images).clamp(-eps, eps)).clamp(0, 1)
    model.train()
    loss, _, _, latent = model(images, mask_ratio, adv)
    return loss + weight * textbook_hsic(latent.flatten(1), adv.flatten(1))


def textbook_classifier(img_size: int, patch_size: int, num_classes: int, drop_path: float, **sizes) -> nn.Module:
    """timm's own ViT with mean pooling: same parameters and results as mimir_fast's classifier; sizes as in the record VIT."""
    return VisionTransformer(
        img_size,
        patch_size,
        num_classes=num_classes,
        global_pool="avg",
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **sizes,
    )


def textbook_adversarial_step(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, alpha: float, steps: int, smoothing: float
) -> Tensor:
    """PGD on the cross-entropy with the parameters' graph alive, then the smoothed loss of its images, to differentiate."""
    model.eval()
    adv = (images + (2 * torch.rand_like(images) - 1) * eps).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), labels), adv)
        adv = adv.detach() + alpha * grad.sign()
        adv = (images + (adv - images).clamp(-eps, eps)).clamp(0, 1)
    model.train()
    return F.cross_entropy(model(adv), labels, label_smoothing=smoothing)
