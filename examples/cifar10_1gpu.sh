#!/usr/bin/env bash
# CIFAR-10 on one GPU: pre-train a ViT-S/2, fine-tune it, attack it.
#
#   examples/cifar10_1gpu.sh
#
# CIFAR-10 is downloaded into DATA if it is not there. The published run adds five million generated images, which
# github.com/wzekai99/DM-Improves-AT offers as 5m.npz: set EDM=/path/to/5m.npz. The same command goes on where it was stopped.
set -euo pipefail

DATA=${DATA:-data}
OUT=${OUT:-runs/cifar10_vit_s}
EDM=${EDM:-}
PRETRAIN_BATCH=${PRETRAIN_BATCH:-512}  # the published runs share these among 4 GPUs
FINETUNE_BATCH=${FINETUNE_BATCH:-128}
PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-800}
FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-50}
ATTACKS=${ATTACKS:-clean,pgd-20,aa}  # aa is AutoAttack: pip install 'mimir-fast[eval]'
PRETRAIN_FLAGS=${PRETRAIN_FLAGS:-}   # further flags, which win over the recipe
FINETUNE_FLAGS=${FINETUNE_FLAGS:-}
EVALUATE_FLAGS=${EVALUATE_FLAGS:-}

IMAGES=(--config "$(dirname "$0")/real_images_only.yaml")
if [ -n "$EDM" ]; then IMAGES=(--aux_data_filename "$EDM"); fi

# shellcheck disable=SC2086  # the *_FLAGS are several words
{
mimir-fast pretrain --recipe cifar10_vit_s --data_root "$DATA" "${IMAGES[@]}" --batch_size "$PRETRAIN_BATCH" \
    --epochs "$PRETRAIN_EPOCHS" --resume auto --output_dir "$OUT/pretrain" --log_dir "$OUT/pretrain" $PRETRAIN_FLAGS
mimir-fast finetune --recipe cifar10_vit_s --data_root "$DATA" "${IMAGES[@]}" --batch_size "$FINETUNE_BATCH" \
    --finetune "$OUT/pretrain/checkpoint-$((PRETRAIN_EPOCHS - 1)).pth" --epochs "$FINETUNE_EPOCHS" --resume auto \
    --output_dir "$OUT/finetune" --log_dir "$OUT/finetune" $FINETUNE_FLAGS
mimir-fast evaluate --checkpoint "$OUT/finetune/checkpoint-$((FINETUNE_EPOCHS - 1)).pth" --data_root "$DATA" \
    --attacks "$ATTACKS" --eps 8 --alpha 2 --output_dir "$OUT/evaluate" $EVALUATE_FLAGS
}
