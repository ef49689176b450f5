"""What can never be computed here, whatever else runs."""

from __future__ import annotations

from engine.beam_search import MAX_ENDS, blocks_of_search
from engine.kv_groups import KvGroups
from engine.scheduler import EngineLimits
from engine.types import Refusal, RefusalCode, SequenceSpec
from settings.sampling import LENGTH_PENALTY, MAX_BEAMS


def unfit(spec: SequenceSpec, limits: EngineLimits, groups: KvGroups) -> Refusal | None:
    lack = _lacks_adapter(spec, groups)
    if lack:
        return Refusal(RefusalCode.LACKING, lack)
    problem = _unfit(spec, limits, groups)
    return Refusal(RefusalCode.INVALID, problem) if problem else None


def _unfit(spec: SequenceSpec, limits: EngineLimits, groups: KvGroups) -> str:
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
    if spec.beams is not None:
        return _unfit_search(spec, limits, groups)
    longest = known + 1 if spec.hand_over else len(spec.prompt) + spec.sampling.max_tokens
    lack = groups.lacks(min(longest, limits.context_limit_tokens))
    return f"{lack}; ask for fewer tokens, or give the engine more KV memory" if lack else ""


def _lacks_adapter(spec: SequenceSpec, groups: KvGroups) -> str:
    """Why, and what to do; empty: it is here, or none is asked for. Another worker may have it."""
    if spec.adapter and (groups.adapters is None or spec.adapter not in groups.adapters.digests):
        return (
            f"there is no adapter {spec.adapter} here, or no more; load it on all workers (`diptych adapters list`), "
            "or give them the same engine.adapters"
        )
    return "" if groups.adapters is None else groups.adapters.lost.get(spec.adapter, "")


def _unfit_search(spec: SequenceSpec, limits: EngineLimits, groups: KvGroups) -> str:
    beams, sampling, original = spec.beams, spec.sampling, limits.original_context_tokens
    assert beams is not None
    most = min(MAX_BEAMS, limits.max_running_sequences, limits.vocab_size)
    if not 1 <= beams.width <= most:
        return f"{beams.width} beams; use 1 to {most} here"
    if not 1 <= beams.answers <= beams.width:
        return f"{beams.answers} answers of {beams.width} beams; use 1 to {beams.width}"
    if beams.length_penalty not in LENGTH_PENALTY:
        return f"length_penalty is {beams.length_penalty}; use {LENGTH_PENALTY}"
    if spec.emitted or spec.hand_over or spec.matcher is not None or not sampling.searchable or not sampling.max_tokens:
        cannot = "emitted tokens, a format, penalties, biases, masks or log-probabilities"
        return f"a beam search cannot have {cannot}; leave them out"
    if len(sampling.stop_token_ids) > MAX_ENDS:
        return f"{len(sampling.stop_token_ids)} tokens end the answer, a beam search takes {MAX_ENDS}; send fewer"
    if groups.state is not None:
        return "this model has recurrent layers, whose states beams cannot share; leave beam search out"
    longest = min(len(spec.prompt) + sampling.max_tokens, limits.context_limit_tokens)
    if len(spec.prompt) <= original < longest:
        why = f"the beams would cross {original} tokens, where this model changes its rotary table"
        return f"{why}; ask for fewer tokens, or send a longer prompt"
    lack = groups.lacks(len(spec.prompt), blocks_of_search(spec, limits), share=2)
    fix = "ask for fewer tokens or beams, or raise engine.num_blocks or engine.kv_memory_fraction"
    return f"{lack} for {beams.width} beams; {fix}" if lack else ""
