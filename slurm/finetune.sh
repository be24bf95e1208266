#!/bin/bash
# Fine-tuning and evaluation of an encoder, from the folder of runs, with mcf's environment active:
#
#     sbatch slurm/finetune.sh task=parsing dataset=lapa data=LAPA weights=runs/mine
#
# What stands behind the script's name are keys of mcf.finetune (python -m mcf.finetune --help). More GPUs of a node:
# sbatch --ntasks-per-node=4 --gpus-per-node=4 slurm/finetune.sh …
# Before the time limit the run saves itself and goes back to the queue; after a failure, submit the same again.
#SBATCH --job-name=mcf-finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
trap : TERM # Slurm ends the ranks; this script is still needed then

# A rank that ends leaves the others a minute for their own last words.
srun --wait=60 --unbuffered --cpus-per-task="$SLURM_CPUS_PER_TASK" python -u -m mcf.finetune "$@"
status=$?
# 75: told to stop before its end, and saved; 76: a rank was dead or stuck, which a few new starts may mend (mcf/exits.py).
if [ "$status" -eq 75 ] || { [ "$status" -eq 76 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
