#!/usr/bin/env bash
# Set up jaxq on a machine with an accelerator, or without one: a virtual environment beside the scripts' repository,
# with the JAX that suits what is there.
#
#   tpu_scripts/setup.sh              find out
#   tpu_scripts/setup.sh tpu          on a TPU VM
#   tpu_scripts/setup.sh cuda13       on a node with NVIDIA GPUs and a driver for CUDA 13 (cuda12 for an older one)
#   tpu_scripts/setup.sh cpu
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

kind() {
  if [[ -e /dev/accel0 || -e /dev/vfio/0 ]]; then
    echo tpu
  elif command -v nvidia-smi >/dev/null; then
    echo cuda13
  else
    echo cpu
  fi
}

device=${1:-$(kind)}
case $device in
  tpu | cuda12 | cuda13) jax="jax[$device]" ;;
  cpu) jax=jax ;;
  *)
    echo "setup.sh: '$device' is none of tpu, cuda13, cuda12, cpu" >&2
    exit 1
    ;;
esac

python3 -m venv "$root/.venv"
"$root/.venv/bin/pip" install -q "$jax" -e "$root[examples]"
"$root/.venv/bin/python" -c 'import jax; print("jax", jax.__version__, "on", jax.devices())'
echo "next: $root/.venv/bin/python $root/tpu_scripts/train.py"
