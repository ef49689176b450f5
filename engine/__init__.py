"""One model replica, ignorant of pools and roles: sequences, paged blocks, scheduler, model runner, sampler.

A step has three verbs:

    plan   = core.schedule(now)          # decide: who computes which tokens, in which blocks
    result = runner.execute(plan)        # compute: one forward pass, one sampling
    events = core.commit(plan, result, now)   # account: tokens, ends, filled blocks

There are no phases. A sequence catches up `num_computed_tokens` with its tokens; prefill, chunked prefill, received
KV, resumed and preempted sequences are one case. Only runner files import torch.
"""
