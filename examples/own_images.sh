#!/usr/bin/env bash
# Your own images: pre-train, fine-tune, attack, one page per run.
#
#   DATA=/path/to/images examples/own_images.sh
#
# DATA holds train/CLASS/*.jpg and val/CLASS/*.jpg (any folder names for the classes; jpg, png, webp, tif, bmp, ppm). Images of
# any size: training crops and resizes, evaluation takes the centre. Pre-training reads no labels, so its own folder may hold
# everything in one class. The same command goes on where it was stopped or killed.
set -euo pipefail

DATA=${DATA:?set DATA to the folder that holds train/ and val/}
OUT=${OUT:-runs/own_images}
SIDE=${SIDE:-224}  # pixels
PATCH=${PATCH:-16}
SIZE=${SIZE:-small}  # nano, ti, small, small_ds, base or large
EPS=${EPS:-4}  # radius of the attack in 1/255
BATCH=${BATCH:-128}
PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-400}
FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-100}
FLAGS=${FLAGS:-}  # further flags of both trainings, which win
EVALUATE_FLAGS=${EVALUATE_FLAGS:-}

COMMON=(--dataset imagefolder --data_root "$DATA" --input_size "$SIDE" --patch_size "$PATCH" --batch_size "$BATCH" --resume auto)

# shellcheck disable=SC2086  # the *FLAGS are several words
{
mimir-fast pretrain "${COMMON[@]}" --model "mae_vit_$SIZE" --norm_pix_loss --attack pgd_mae --eps 8 --alpha 10 --steps 1 \
    --mi_train hsic --mi_xpl 1e-5 --epochs "$PRETRAIN_EPOCHS" --warmup_epochs $((PRETRAIN_EPOCHS / 20)) --blr 1.5e-4 \
    --output_dir "$OUT/pretrain" --log_dir "$OUT/pretrain" $FLAGS
mimir-fast finetune "${COMMON[@]}" --model "vit_$SIZE" --finetune "$OUT/pretrain/checkpoint-$((PRETRAIN_EPOCHS - 1)).pth" \
    --attack_train pgd --eps "$EPS" --alpha "$EPS" --steps 2 --epochs "$FINETUNE_EPOCHS" \
    --warmup_epochs $((FINETUNE_EPOCHS / 10)) --output_dir "$OUT/finetune" --log_dir "$OUT/finetune" $FLAGS
mimir-fast evaluate --checkpoint "$OUT/finetune/checkpoint-$((FINETUNE_EPOCHS - 1)).pth" --data_root "$DATA" \
    --attacks clean,pgd-20 --output_dir "$OUT/evaluate" $EVALUATE_FLAGS
}
mimir-fast report "$OUT/pretrain"
mimir-fast report "$OUT/finetune"
