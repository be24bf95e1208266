#!/bin/bash
# Packing as a job array, from the folder that paths are relative to, with mcf's environment active:
#
#     sbatch slurm/pack.sh source=LAION_FACE detections=BOXES out=shards/laion
#
# What stands behind the script's name are keys of mcf.pack (python -m mcf.pack --help). Each task makes its share of the
# parts; the one that ends last writes shards and manifest. How many tasks: sbatch --array=0-63 slurm/pack.sh …
# After a failure, submit the same again: what is made already is kept, and the number of tasks may be another one.
#SBATCH --job-name=mcf-pack
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export OMP_NUM_THREADS=1 # a process a core; none needs threads of its own
[[ "$*" == *workers=* ]] || set -- workers="${SLURM_CPUS_PER_TASK:-1}" "$@"
exec python -u -m mcf.pack "$@"
