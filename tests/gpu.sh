#!/usr/bin/env bash
# All that needs a GPU, in one call of some minutes, so that a GPU that is there for a short while is used at once:
#   tests/gpu.sh [--at olmo-core=FOLDER] [--at transformers=FOLDER] ...      see tests/bench_peers.py
# the tests that are skipped without one, and OLMo-1B at 2048 and 4096 tokens, ours beside the others.
# Everything that is told also lies in $OUT (runs/gpu). A part that fails does not keep the next from running.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
{
  nvidia-smi --query-gpu=name,memory.total,driver_version,power.limit --format=csv
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, "cuda", torch.version.cuda)'
  git log -1 --format='commit %h %s' 2>/dev/null

  "$PYTHON" -m pytest -q -rs tests/test_speed.py tests/test_parallel.py

  for length in 2048 4096; do
    # FLOPs, MFU, phases and memory of our own row; then everybody's tokens/s in quiet rounds.
    "$PYTHON" -m olmo_train bench configs/models/olmo-1b.yaml model.seq_len=$length global_batch_size=$((65536 / length)) \
      micro_batch_size=$((8192 / length)) parallel.precision=bf16 parallel.compile=true --steps 10
    "$PYTHON" tests/bench_peers.py --work olmo-1b-$length --peers ours-compiled,ours,plain-compiled,olmo-core,transformers \
      --in-turn --rounds 5 --steps 4 --json "$OUT/olmo-1b-$length.json" "$@"
  done
} 2>&1 | tee "$OUT/report.txt"
