#!/usr/bin/env bash
# Train on all devices of this machine: one process for each GPU, or one on the CPU.
#   launch/local.sh CONFIG.yaml [MORE.yaml ...] [key=value ...]
#   NPROC=2 launch/local.sh CONFIG.yaml ...        another number of processes, for example two on the CPU
# The exit code is that of olmo-train.
set -euo pipefail

python=${PYTHON:-python3}
[ -x "$(dirname "$0")/../.venv/bin/python" ] && python=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}

if [ "$nproc" -eq 1 ]; then
    exec "$python" -m olmo_train train "$@"
fi
if [ "$gpus" -eq 0 ]; then # processes that share cores must not spin while they wait
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / nproc > 0 ? $(nproc) / nproc : 1))}
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
fi
exec "$python" -m olmo_train.parallel.launch --standalone --nproc-per-node="$nproc" -m olmo_train train "$@"
