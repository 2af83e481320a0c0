#!/usr/bin/env bash
# ImageNet-1K on one machine with 8 GPUs: pre-train, fine-tune, attack, export.
#
#   DATA=/path/to/imagenet examples/imagenet_8gpu.sh
#
# DATA holds train/ and val/ with a folder of images per class. The same command goes on where it was stopped or killed.
# The learning rate follows the global batch (blr * GPUS * batch size / 256), so fewer GPUs are a smaller batch.
set -euo pipefail

DATA=${DATA:?set DATA to the folder that holds train/ and val/}
OUT=${OUT:-runs/imagenet_vit_b}
GPUS=${GPUS:-8}
BATCH=${BATCH:-256}                # images per GPU; `mimir-fast memory` says how many fit
PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-800}
FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-300}
ATTACKS=${ATTACKS:-clean,pgd-20,pgd-100,aa}   # aa is AutoAttack: pip install 'mimir-fast[eval]'
PRETRAIN_FLAGS=${PRETRAIN_FLAGS:-}  # further flags, which win over the recipe
FINETUNE_FLAGS=${FINETUNE_FLAGS:-}
EVALUATE_FLAGS=${EVALUATE_FLAGS:-}

# shellcheck disable=SC2086  # the *_FLAGS are several words
{
torchrun --nproc_per_node="$GPUS" -m mimir_fast.pretrain --recipe imagenet_vit_b --data_root "$DATA" \
    --batch_size "$BATCH" --epochs "$PRETRAIN_EPOCHS" --resume auto \
    --output_dir "$OUT/pretrain" --log_dir "$OUT/pretrain" $PRETRAIN_FLAGS

# best.pth is the epoch with the best robust accuracy on 5,000 training images that are kept out of the training
torchrun --nproc_per_node="$GPUS" -m mimir_fast.finetune --recipe imagenet_vit_b_apgd --data_root "$DATA" \
    --finetune "$OUT/pretrain/checkpoint-$((PRETRAIN_EPOCHS - 1)).pth" --epochs "$FINETUNE_EPOCHS" \
    --held_out 5000 --val_attack pgd10 --val_every 5 --resume auto \
    --output_dir "$OUT/finetune" --log_dir "$OUT/finetune" $FINETUNE_FLAGS

torchrun --nproc_per_node="$GPUS" -m mimir_fast.evaluate --checkpoint "$OUT/finetune/best.pth" --data_root "$DATA" \
    --attacks "$ATTACKS" --eps 4 --alpha 1 --output_dir "$OUT/evaluate" $EVALUATE_FLAGS
mimir-fast export --checkpoint "$OUT/finetune/best.pth" --output "$OUT/vit_b_robust.safetensors" --overwrite
}
