"""vLLM's side of benchmarks/engine.py, in vLLM's own environment (benchmarks/vllm_env.sh): imports nothing of ours.

stdin   one JSON object a line: {"prompts": [[token id, ...], ...], "new_tokens": n}
stdout  one JSON object a line: {"version": ...} when ready, then {"seconds": s} for each; logs go to stderr
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "dtype", "threads"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    threads = arguments.threads
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM and its processes log to stdout
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import vllm  # pyright: ignore[reportMissingImports]

    llm = vllm.LLM(
        model=arguments.model,
        dtype=arguments.dtype,
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    print(json.dumps({"version": vllm.__version__}), file=answers)
    for line in sys.stdin:
        task = json.loads(line)
        sampling = vllm.SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in task["prompts"]], sampling, use_tqdm=False)
        seconds = time.perf_counter() - begun
        assert all(len(o.outputs[0].token_ids) == task["new_tokens"] for o in outputs)
        print(json.dumps({"seconds": seconds}), file=answers)


if __name__ == "__main__":
    main()
