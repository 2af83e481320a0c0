#!/usr/bin/env bash
#SBATCH --job-name=mimir
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#
# ImageNet-1K on several machines under Slurm: pre-train, then fine-tune; one task per GPU.
#
#   sbatch --export=ALL,DATA=/path/to/imagenet examples/imagenet_slurm.sh
#
# Three minutes before the time limit Slurm sends SIGUSR1: the run saves and ends, and the job goes back into the queue. It
# continues from the last update. Run the script where mimir-fast is installed, with a folder that every node sees.
set -euo pipefail

DATA=${DATA:?set DATA to the folder that holds train/ and val/}
OUT=${OUT:-runs/imagenet_vit_b}
BATCH=${BATCH:-64}  # images per GPU: 32 GPUs x 64 = 2048, the published global batch
PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-800}
FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-300}
PRETRAIN_FLAGS=${PRETRAIN_FLAGS:-}  # further flags, which win over the recipe
FINETUNE_FLAGS=${FINETUNE_FLAGS:-}

# where the processes meet: the first node of the job, a port that no other job of the node has
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

ENCODER=$OUT/pretrain/checkpoint-$((PRETRAIN_EPOCHS - 1)).pth
CLASSIFIER=$OUT/finetune/checkpoint-$((FINETUNE_EPOCHS - 1)).pth

# a run that was asked to stop ends with status 0 and without its last checkpoint
again_unless() {
    [ -e "$1" ] || { scontrol requeue "$SLURM_JOB_ID"; exit 0; }
}

# shellcheck disable=SC2086  # the *_FLAGS are several words
{
srun --kill-on-bad-exit=1 python -m mimir_fast.pretrain --recipe imagenet_vit_b --data_root "$DATA" --batch_size "$BATCH" \
    --epochs "$PRETRAIN_EPOCHS" --resume auto --output_dir "$OUT/pretrain" --log_dir "$OUT/pretrain" $PRETRAIN_FLAGS
again_unless "$ENCODER"

srun --kill-on-bad-exit=1 python -m mimir_fast.finetune --recipe imagenet_vit_b_apgd --data_root "$DATA" --batch_size "$BATCH" \
    --finetune "$ENCODER" --epochs "$FINETUNE_EPOCHS" --held_out 5000 --val_attack pgd10 --val_every 5 --resume auto \
    --output_dir "$OUT/finetune" --log_dir "$OUT/finetune" $FINETUNE_FLAGS
again_unless "$CLASSIFIER"
}
