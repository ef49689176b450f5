"""What can never be computed here, whatever else runs."""

from __future__ import annotations

from engine.kv_groups import KvGroups
from engine.scheduler import EngineLimits
from engine.types import SequenceSpec


def unfit(spec: SequenceSpec, limits: EngineLimits, groups: KvGroups) -> str:
    """Why, and what to do; empty: it can."""
    known = len(spec.prompt) + len(spec.emitted)
    if not spec.prompt:
        return "the prompt is empty; send at least one token"
    if known >= limits.context_limit_tokens + (spec.sampling.max_tokens == 0):
        return (
            f"{known} tokens leave no room for an answer within the context limit of {limits.context_limit_tokens}; "
            "shorten the prompt"
        )
    if spec.sampling.max_tokens <= len(spec.emitted) > 0:
        return "max_tokens is reached already; ask for at least one token more"
    problem = spec.sampling.problem(limits.vocab_size)
    if problem:
        return problem
    highest = max(max(spec.prompt), max(spec.emitted, default=0))
    if highest >= limits.vocab_size or min(spec.prompt) < 0:
        return f"token id {highest} is not in the vocabulary of {limits.vocab_size}; check the tokenizer"
    if spec.adapter and (groups.adapters is None or spec.adapter not in groups.adapters.digests):
        return f"there is no adapter {spec.adapter} here; give all workers the same engine.adapters"
    if groups.adapters is not None and spec.adapter in groups.adapters.lost:
        return groups.adapters.lost[spec.adapter]
    longest = known + 1 if spec.hand_over else len(spec.prompt) + spec.sampling.max_tokens
    lack = groups.lacks(min(longest, limits.context_limit_tokens))
    return f"{lack}; ask for fewer tokens, or give the engine more KV memory" if lack else ""
