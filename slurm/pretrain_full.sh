#!/bin/bash
# Pre-training as a plain batch script, from the folder of runs, with mcf's environment active:
#
#     sbatch slurm/pretrain_full.sh data.path=SHARDS teacher.path=WEIGHTS name=mine
#
# What stands behind the script's name are keys of the recipe (python -m mcf.launch --help); another recipe is recipe=….
# What Slurm is asked for stands below, and before the script's name: sbatch --nodes=4 --partition=gpu slurm/….
# The code and the recipe are copied into the run directory when the job first starts; what changes later does not matter.
#SBATCH --job-name=mcf
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
trap : TERM # Slurm ends the ranks; this script is still needed then

[[ "$*" == *recipe=* ]] || set -- recipe=vit_b_20m "$@"
run=$(python -m mcf.launch mode=prepare nodes="$SLURM_JOB_NUM_NODES" gpus_per_node="$SLURM_NTASKS_PER_NODE" "$@") || exit
export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"
cd "$run" || exit
echo "$run; follow it with: python -m mcf.follow run=$run"
exec >>"jobs/${SLURM_JOB_ID}_0_log.out" 2>&1

python -m mcf.job run="$run" || exit
srun --kill-on-bad-exit=1 --unbuffered --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    --open-mode=append --output="jobs/%j_%t_log.out" python -u -m mcf.task run="$run"
python -m mcf.job run="$run" status=$?
