"""A draft model changes no token, be it the model itself, whose drafts are all right, or one that knows nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.draft_model import DraftModel
from engine.draft_plans import DraftPlans
from engine.drafting import Drafting
from engine.model_loader import ModelLoadError
from engine.overlap import InThread
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.speculation import SpeculationLimits
from engine.types import TO_COME, DraftWork, PlanItem, SamplingParams, SequenceSpec
from tests.model.test_families import greedy, saved
from tests.model.test_speculation import answers, made, prompts, sampled, tokens

BLOCK = 8


def other(path: Path, family: str = "Llama", **changes: Any) -> Path:
    """Another random model of the same vocabulary."""
    import transformers

    saved(path, family, **({"num_hidden_layers": 1, "hidden_size": 32} | changes))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(11)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.05)
    model.save_pretrained(path)
    return path


def drafted_by(path: Path, draft: Path, **settings: Any) -> ModelRunner:
    return made(path, speculation={"method": "draft", "model": str(draft)}, **settings)


def limits_of(runner: ModelRunner, most: int = 4) -> SpeculationLimits:
    assert runner.draft_limits is not None
    return SpeculationLimits(most, draft=runner.draft_limits)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def itself(llama: Path) -> ModelRunner:
    return drafted_by(llama, llama)


@pytest.fixture(scope="module")
def stranger(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return drafted_by(llama, other(tmp_path_factory.mktemp("other")))


def test_all_drafts_of_the_model_itself_are_accepted(llama: Path, itself: ModelRunner) -> None:
    asked = [(p, SamplingParams(max_tokens=24)) for p in prompts(40)]
    drafted, speculation = answers(itself, asked, limits_of(itself))
    assert tokens(drafted)[:4] == [greedy(llama, p, 24) for p, _ in asked[:4]]
    plain, _ = answers(itself, asked, None)
    assert tokens(drafted) == tokens(plain)
    assert speculation is not None
    counts = speculation.counts
    assert counts.accepted > 300
    assert counts.accepted > 0.95 * counts.proposed, "but for those that the end of an answer cut"


def test_hardly_any_of_another_model(stranger: ModelRunner) -> None:
    asked = [(p, SamplingParams(max_tokens=12)) for p in prompts(100)]
    plain, _ = answers(stranger, asked, None)
    drafted, speculation = answers(stranger, asked, limits_of(stranger))
    assert tokens(drafted) == tokens(plain)
    assert speculation is not None
    assert speculation.counts.proposed > 300
    assert speculation.counts.accepted < 0.2 * speculation.counts.proposed


def test_120_sampled_answers(itself: ModelRunner) -> None:
    asked = sampled(120)
    plain, _ = answers(itself, asked, None)
    drafted, speculation = answers(itself, asked, limits_of(itself))
    assert tokens(drafted) == tokens(plain)
    assert speculation is not None
    assert speculation.counts.accepted > 20, "a random model says nearly anything"


def test_overlapping_steps(itself: ModelRunner) -> None:
    asked = sampled(16)
    plain, _ = answers(itself, asked, None)
    drafted, speculation = answers(itself, asked, limits_of(itself), launcher=InThread(itself))
    assert tokens(drafted) == tokens(plain)
    assert speculation is not None
    assert speculation.counts.accepted > 0


GEMMA: dict[str, Any] = {"sliding_window": 12, "head_dim": 16, "num_hidden_layers": 4}


@pytest.mark.parametrize("draft", ["Gemma2", "Llama"])
def test_a_model_with_windows(tmp_path: Path, draft: str) -> None:
    """Its window groups leave blocks behind; the draft model has the tables of the group that keeps them."""
    path = saved(tmp_path / "model", "Gemma2", **GEMMA)
    smaller = path if draft == "Gemma2" else other(tmp_path / "draft")
    runner = drafted_by(path, smaller)
    asked = [(p, SamplingParams(max_tokens=24)) for p in prompts(3)]
    drafted, speculation = answers(runner, asked, limits_of(runner))
    assert tokens(drafted) == [greedy(path, p, 24) for p, _ in asked]
    assert speculation is not None
    assert speculation.counts.accepted > 0.95 * speculation.counts.proposed or draft == "Llama"
    asked = sampled(5)
    assert tokens(answers(runner, asked, limits_of(runner))[0]) == tokens(answers(runner, asked, None)[0])


def test_a_model_without_windows_and_a_draft_with(tmp_path: Path, llama: Path) -> None:
    runner = drafted_by(llama, saved(tmp_path, "Gemma2", **GEMMA))
    asked = [(p, SamplingParams(max_tokens=24)) for p in prompts(4)]
    plain, _ = answers(runner, asked, None)
    drafted, speculation = answers(runner, asked, limits_of(runner))
    assert tokens(drafted) == tokens(plain)
    assert speculation is not None
    assert speculation.counts.proposed > 0


# Where the draft's KV lags behind.


class Bench:
    """One engine over a runner, with its cache; the draft model is the model itself."""

    def __init__(self, runner: ModelRunner, blocks: int = 64, *, speculates: bool = True, batch: int = 64) -> None:
        facts = runner.facts
        limits = EngineLimits(BLOCK, batch, 16, 512, facts.context_limit_tokens, facts.vocab_size)
        self.runner = runner
        self.pool = BlockPool(blocks)
        speculation = limits_of(runner) if speculates else None
        self.core = EngineCore(limits, self.pool, "same", speculation=speculation)
        self.answers: dict[int, list[int]] = {}

    def step(self) -> bool:
        plan = self.core.schedule(0.0)
        if plan is None:
            return False
        events = self.core.commit(plan, self.runner.execute(plan), 0.0)
        assert not [end for end in events.ends if end.error]
        for token in events.tokens:
            self.answers.setdefault(token.sequence_id, []).append(token.token_id)
        self.core.check()
        return True

    def run(self) -> None:
        while self.step():
            pass
        assert self.core.is_idle()

    @property
    def share(self) -> float:
        assert self.core.speculation is not None
        counts = self.core.speculation.counts
        assert counts.proposed
        return counts.accepted / counts.proposed


def long_prompt(seed: int, length: int = 60) -> list[int]:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_preempted_sequences(llama: Path, itself: ModelRunner) -> None:
    b = Bench(itself, blocks=12)
    texts = [long_prompt(n, 20) for n in range(4)]
    for n, text in enumerate(texts):
        assert b.core.add(SequenceSpec(n, text, SamplingParams(max_tokens=30)), 0.0) is None
    b.run()
    assert b.core.load().preemptions_total > 0
    assert [b.answers[n] for n in range(4)] == [greedy(llama, text, 30) for text in texts]
    assert b.share > 0.9


def test_a_prefix_hit_has_nobodys_draft_kv(llama: Path, itself: ModelRunner) -> None:
    """The blocks were filled without drafts; then another's with others' draft KV."""
    text = long_prompt(1)
    b = Bench(itself)
    for round_ in range(3):
        assert b.core.add(SequenceSpec(round_, text, SamplingParams(max_tokens=1 if not round_ else 20)), 0.0) is None
        b.run()
        assert b.answers[round_] == greedy(llama, text, 20)[: len(b.answers[round_])]
    assert b.share > 0.9, "drafts knew the prompt"


def copied(source: Bench, target: Bench, blocks: tuple[int, ...], into: tuple[int, ...]) -> None:
    assert isinstance(source.runner.kv, torch.Tensor)
    assert isinstance(target.runner.kv, torch.Tensor)
    target.runner.kv[list(into)] = source.runner.kv[list(blocks)]


@pytest.fixture(scope="module")
def plain(llama: Path) -> ModelRunner:
    return made(llama)


@pytest.mark.parametrize("drafts", ["decode", "prefill"])
def test_one_sided_speculation(llama: Path, itself: ModelRunner, plain: ModelRunner, drafts: str) -> None:
    """A prompt computed on one worker, its answer on the other: KV of the draft model never moves."""
    assert [g.block_bytes(BLOCK) for g in itself.facts.groups] == [g.block_bytes(BLOCK) for g in plain.facts.groups]
    assert itself.facts.identity == plain.facts.identity
    assert len(itself.memory().areas) == 1
    first, second = (plain, itself) if drafts == "decode" else (itself, plain)
    prefill = Bench(first, speculates=first is itself)
    decode = Bench(second, speculates=second is itself)
    text = long_prompt(5)
    spec = SequenceSpec(1, text, SamplingParams(max_tokens=30), hand_over=True, retain=True)
    assert prefill.core.add(spec, 0.0) is None
    while prefill.step():
        pass
    assert decode.core.add(SequenceSpec(1, text, SamplingParams(max_tokens=30), hold=True), 0.0) is None
    room = decode.core.reserve(1, len(text), 0.0)
    assert room is not None
    copied(prefill, decode, prefill.core.block_table(1)[: len(room.block_ids)], room.block_ids)
    decode.core.adopt(1, len(text), prefill.answers[1], 0.0)
    decode.run()
    assert prefill.answers[1] + decode.answers[1] == greedy(llama, text, 30)
    if drafts == "decode":
        assert decode.share > 0.9


def test_a_migrated_sequence_is_drafted_for_again(llama: Path, itself: ModelRunner) -> None:
    """It moves in the middle of its answer: no draft while it is read, and what its reader lacks it computes."""
    text = long_prompt(6)
    here, there = Bench(itself, 32), Bench(itself, 32)
    assert here.core.add(SequenceSpec(1, text, SamplingParams(max_tokens=40)), 0.0) is None
    while len(here.answers.get(1, ())) < 10:
        here.step()
    assert here.core.serve(1) is not None
    here.step()
    here.core.freeze(1)
    stands = len(text) + len(here.answers[1]) - 1
    assert there.core.add(SequenceSpec(1, text, SamplingParams(max_tokens=40), hold=True), 0.0) is None
    room = there.core.reserve(1, stands, 0.0)
    assert room is not None
    kept = itself.kv[list(here.core.block_table(1)[: len(room.block_ids)])].clone()  # type: ignore[call-overload]
    itself.kv[list(room.block_ids)] = kept  # type: ignore[call-overload]
    there.core.adopt(1, stands, here.answers[1], 0.0)
    there.run()
    assert here.answers[1] + there.answers[1] == greedy(llama, text, 40)
    assert there.share > 0.9


def test_catching_up_takes_several_steps(llama: Path, itself: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.draft_plans.CATCH_UP_TOKENS", 16)
    b = Bench(itself)
    seen: list[PlanItem] = []
    draft = DraftModel.draft

    def looked_at(self: DraftModel, items: Any) -> Any:
        seen.extend(item for item in items if item.draft is not None)
        return draft(self, items)

    monkeypatch.setattr(DraftModel, "draft", looked_at)
    texts = [long_prompt(n) for n in (7, 8)]
    for n, text in enumerate(texts):
        assert b.core.add(SequenceSpec(n, text, SamplingParams(max_tokens=40)), 0.0) is None
    b.run()
    assert [b.answers[n] for n in range(2)] == [greedy(llama, text, 40) for text in texts]
    assert b.share > 0.9
    without = [item for item in seen if not item.drafts]
    assert len(without) >= 4
    assert all(item.draft.end - item.draft.start <= 16 for item in without if item.draft is not None)


def test_a_draft_model_that_fails_ends_no_answer(
    llama: Path, itself: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = long_prompt(9)
    draft = itself._draft
    assert draft is not None

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    b = Bench(itself)
    assert b.core.add(SequenceSpec(1, text, SamplingParams(max_tokens=24)), 0.0) is None
    for _ in range(3):
        b.step()
    with monkeypatch.context() as patched:
        patched.setattr(draft, "_pass", fails)
        b.step()
        b.step()
    b.run()
    assert b.answers[1] == greedy(llama, text, 24)
    assert draft._failures == 0, "it works again"
    assert caplog.text.count("goes on without drafts") == 2


class AllowsTwo:
    """Of a grammar as much as the draft model hears of it."""

    def accepts(self, tokens_: list[int]) -> int:
        return min(2, len(tokens_))


def test_what_a_grammar_does_not_allow_is_not_computed(itself: ModelRunner) -> None:
    draft = itself._draft
    assert draft is not None
    work = DraftWork(0, 3, 0)
    item = PlanItem(
        1, [7, *[TO_COME] * 4], 2, [0, 1], True, 1, SamplingParams(), 2, [5, 6, 7], drafts=[TO_COME] * 4, draft=work
    )
    with torch.inference_mode():
        ((free,), passes) = draft.draft([item])
        ((bound,), _) = draft.draft([replace(item, matcher=AllowsTwo())])  # type: ignore[arg-type]
    assert len(passes) == len(free.drafts) == 4
    assert list(bound.drafts) == list(free.drafts)[:2]
    assert list(bound.token_ids) == [7, *bound.drafts]


# What others have got wrong, and what would be easy to: no answer changes, but hardly a draft is right.


def _kv_is_not_kept(self: DraftModel, rows: Any) -> Any:
    """The draft model runs, and what it writes is lost before it runs again (vLLM 34529)."""
    assert isinstance(self._kv, torch.Tensor)
    self._kv.zero_()
    return _PASS(self, rows)


def _a_prefix_is_known(self: DraftPlans, sequence: Any) -> Drafting:
    """Cached and received prompts are taken to have draft KV (SGLang 30393, 17212)."""
    new = sequence.drafting is None
    drafting = _DRAFTING(self, sequence)
    if new:
        drafting.wrote(sequence.tables[0], sequence.num_computed)
    return drafting


_PASS, _DRAFTING = DraftModel._pass, DraftPlans._drafting

PLANTED = {
    "draft KV is not kept": (DraftModel, "_pass", _kv_is_not_kept),
    "a prefix is thought to have draft KV": (DraftPlans, "_drafting", _a_prefix_is_known),
}


@pytest.mark.parametrize("bug", ["", *PLANTED])
def test_drafts_know_what_came_before(
    llama: Path, itself: ModelRunner, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert itself._draft is not None
    assert isinstance(itself._draft._kv, torch.Tensor)
    itself._draft._kv.zero_()
    if bug:
        monkeypatch.setattr(*PLANTED[bug])
    text = long_prompt(3)
    b = Bench(itself)
    for n, count in enumerate((1, 24)):
        assert b.core.add(SequenceSpec(n, text, SamplingParams(max_tokens=count)), 0.0) is None
        b.run()
    assert b.answers[1] == greedy(llama, text, 24)
    assert (b.share > 0.9) == (not bug)


# What it refuses.


@pytest.mark.parametrize(
    ("family", "changes", "draft", "own", "words"),
    [
        ("Llama", {}, "Llama", {"vocab_size": 64}, "a vocabulary of 64 tokens and .* one of 128"),
        ("Mistral", {"sliding_window": 12}, "Llama", {}, "every layer of .* leaves blocks behind"),
        (
            "Llama",
            {},
            "Mamba2",
            {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "expand": 2},
            "has recurrent layers, whose state cannot go back",
        ),
    ],
)
def test_what_cannot_draft_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], draft: str, own: dict[str, Any], words: str
) -> None:
    path = saved(tmp_path / "model", family, **changes)
    smaller = saved(tmp_path / "draft", draft, **own)
    settings = {"model": str(path), "speculation": {"method": "draft", "model": str(smaller)}, "num_blocks": 16}
    with pytest.raises(ModelLoadError, match=words):
        ModelRunner(EngineConfig.model_validate(settings))


def test_a_draft_model_that_is_not_there(llama: Path) -> None:
    settings = {"model": str(llama), "speculation": {"method": "draft", "model": "/no/such"}, "num_blocks": 16}
    with pytest.raises(ModelLoadError, match=r"speculation\.model: there is no model at /no/such"):
        ModelRunner(EngineConfig.model_validate(settings))


def words(path: Path, *tokens_: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({word: i for i, word in enumerate(tokens_)}, unk_token=tokens_[0])).save(
        str(path / "tokenizer.json")
    )


def test_other_words_for_the_same_numbers_are_refused(tmp_path: Path) -> None:
    path, smaller = saved(tmp_path / "model", "Llama"), saved(tmp_path / "draft", "Llama", vocab_size=160)
    words(path, "a", "b", "c")
    words(smaller, "a", "c", "b")
    settings = {"model": str(path), "speculation": {"method": "draft", "model": str(smaller)}, "num_blocks": 16}
    with pytest.raises(ModelLoadError, match="it has 'c' for token 1, which is 'b'"):
        ModelRunner(EngineConfig.model_validate(settings))
    words(smaller, "a", "b", "c", "d")
    runner = drafted_by(path, smaller)
    asked = [(p, SamplingParams(max_tokens=6)) for p in prompts(3)]
    assert tokens(answers(runner, asked, limits_of(runner))[0]) == tokens(answers(runner, asked, None)[0])


def test_its_kv_is_in_the_memory_that_blocks_are_counted_by(llama: Path, plain: ModelRunner) -> None:
    counted = {}
    for name, method in (("without", {}), ("with", {"speculation": {"method": "draft", "model": str(llama)}})):
        settings = {"model": str(llama), "dtype": "float32", "block_tokens": BLOCK, "threads": 1} | method
        counted[name] = made_blocks(settings)
    assert counted["with"] == pytest.approx(counted["without"] / 2, abs=1)
    assert "drafts by" not in plain.describe_path()


def made_blocks(settings: dict[str, Any]) -> int:
    runner = ModelRunner(EngineConfig.model_validate(settings | {"kv_memory_fraction": 0.01}))
    assert ("drafts by" in runner.describe_path()) == ("speculation" in settings)
    return runner.num_blocks[0]
