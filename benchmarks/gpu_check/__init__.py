"""One command that says what a machine with a GPU gives, and whether the engine is right and fast on it.

`python3 -m benchmarks.gpu_check` from a checkout, with PYTHONPATH=.:proto. It needs torch, transformers, numpy and
pydantic, and no network: every model is built in code with random weights. Sections, in the order of their running:

    environment   device, memory, versions; what is there and what is not
    ceilings      measured matmul TFLOP/s and copy GB/s, which later figures are shares of
    attention     every backend that loads, against plain float32 attention
    kernels       how fast each backend's attention is, by rule
    engine        greedy answers in float32, token for token those of transformers `generate`
    families      the same of small models with windows, chunks, soft caps, sinks, latents, states and experts
    ranks         models over two ranks: on two GPUs over NCCL, else on one over gloo, and it says which
    handoff       a prefill and a decode worker's cores in two processes, KV over NIXL
    phases        where the time of a step goes
    throughput    prefill and decode of 1B-, 8B- and mixture-of-experts-shaped models; takes the time that is left

A section that fails is recorded with its traceback, and the others go on.
"""
