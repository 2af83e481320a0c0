"""Named complete runs: `--recipe NAME`; flags given beside it win."""

from collections.abc import Callable

from mimir_fast.config.pretraining import PretrainConfig


def imagenet_vit_s() -> PretrainConfig:
    """The original's published ImageNet-1K run: ViT-S/16 at 224, 4 GPUs x 512, 800 epochs."""
    return PretrainConfig().updated(
        {
            "model": "mae_vit_small",
            "input_size": 224,
            "patch_size": 16,
            "mask_ratio": 0.75,
            "norm_pix_loss": True,
            "dataset": "imagenet",
            "num_workers": 10,
            "attack": "pgd_mae",
            "steps": 1,
            "eps": 8.0,
            "alpha": 10.0,
            "mi_train": "hsic",
            "mi_xpl": 1e-5,
            "batch_size": 512,
            "epochs": 800,
            "warmup_epochs": 40,
            "blr": 1.5e-4,
            "weight_decay": 0.05,
        }
    )


def imagenet_vit_b() -> PretrainConfig:
    """The ImageNet-1K run with ViT-B/16."""
    return imagenet_vit_s().updated({"model": "mae_vit_base"})


def cifar10_vit_s() -> PretrainConfig:
    """The original's published CIFAR-10 run: ViT-S/2 at 32, 4 GPUs x 128, 800 epochs, 70 % images of --aux_data_filename."""
    return imagenet_vit_s().updated(
        {
            "input_size": 32,
            "patch_size": 2,
            "dataset": "cifar10",
            "num_workers": 0,
            "batch_size": 128,
            "use_edm": True,
            "unsup_fraction": 0.7,
            "edm_aug": "base",
        }
    )


def cifar10_convit_ti() -> PretrainConfig:
    """The CIFAR-10 run with ConViT-Ti/2; the original publishes the model, the settings are those of its ViT-S."""
    return cifar10_vit_s().updated({"model": "mae_convit_ti"})


def cifar10_convit_s() -> PretrainConfig:
    """The same with ConViT-S/2."""
    return cifar10_vit_s().updated({"model": "mae_convit_small"})


def cifar10_convit_b() -> PretrainConfig:
    """The same with ConViT-B/2."""
    return cifar10_vit_s().updated({"model": "mae_convit_base"})


def imagenet_cait_xxs24() -> PretrainConfig:
    """The ImageNet-1K run with CaiT-XXS24/16; the original publishes the model, the settings are those of its ViT-S."""
    return imagenet_vit_s().updated({"model": "mae_cait_xxs24"})


def imagenet_cait_s36() -> PretrainConfig:
    """The same with CaiT-S36/16."""
    return imagenet_vit_s().updated({"model": "mae_cait_s36"})


def imagenet_swin_l() -> PretrainConfig:
    """The run that the original's Swin-L started from, at window 14: 4 GPUs x 1024, 800 epochs, units of 32 pixels."""
    return imagenet_vit_s().updated({"model": "mae_swin_large", "batch_size": 1024, "blr": 1e-4})


def imagenet_swin_b() -> PretrainConfig:
    """The same with Swin-B at window 7; the original publishes the model, the settings are those of its Swin-L."""
    return imagenet_swin_l().updated({"model": "mae_swin_base"})


def digits_demo() -> PretrainConfig:
    """Handwritten digits on two CPU cores in about a minute: mae_vit_nano, patch 8, attack and penalty on."""
    return imagenet_vit_s().updated(
        {
            "model": "mae_vit_nano",
            "input_size": 32,
            "patch_size": 8,
            "dataset": "digits",
            "num_workers": 0,
            "batch_size": 64,
            "epochs": 10,
            "warmup_epochs": 1,
            "lr": 1e-3,
            "device": "cpu",
            "output_dir": "runs/digits_demo",
            "log_dir": "runs/digits_demo",
        }
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        imagenet_vit_s,
        imagenet_vit_b,
        imagenet_cait_xxs24,
        imagenet_cait_s36,
        imagenet_swin_b,
        imagenet_swin_l,
        cifar10_vit_s,
        cifar10_convit_ti,
        cifar10_convit_s,
        cifar10_convit_b,
        digits_demo,
    )
}
