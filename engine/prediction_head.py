"""A checkpoint's own prediction head (MTP) in place of a draft model: one layer that says the token after the next.

    row r       the model's hidden state of token r after its last norm, and the embedding of token r + 1
                -> eh_proj([enorm(embedding) | hnorm(state)]) -> decoder layer -> norm = the head's state; its product
                with the model's own output head says token r + 2
    next draft  row r + 1 with the head's state in place of the model's, which only comes with the verification

So transformers has it (MtpModel, whose code and names this uses; its MTPCandidateGenerator hands over the state after
the last norm), and SGLang (its deepseek_nextn). vLLM (its deepseek_mtp) chains the head's state before its norm, which
is the same for the first draft. The DeepSeek-V3 report (2.2) has one head for each further token; published checkpoints
have one, which is fed its own state.

1. The model's states are noted where its last norm makes them, in each step and for each row, and lie in a pool of
   their own under the block numbers of the model's tables: as many blocks, as the head's KV (engine/draft_model.py).
2. A sequence has the states that its own steps here have made: none of what came from the prefix cache, another worker
   or a migration. Where the first of them stands, the head's sequence begins (DraftWork.base): it attends to nothing
   before.
3. Rows that were drafted from the head's own states are computed again when the model's are there. So a step begins
   with a row for each token that the last one gave, and the last of them says the first draft.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from checkpoint.files import CheckpointError, read_object
from checkpoint.prediction_heads import HEAD_FAMILIES, head_prefix, heads_of
from checkpoint.quantized import unpacked
from checkpoint.weights import Weights, read_weights
from engine.attention.choose import AttentionChoiceError, AttentionShape, pick_backend
from engine.attention.grouped import GroupedBackend
from engine.attention.interface import AttentionBackend, Chunk
from engine.attention.native import NativeBackend
from engine.config import EngineConfig
from engine.draft_model import DraftModel, MakeForward, Rows, load_draft, whole_table
from engine.experts.choose import PLAIN, group_experts
from engine.forward import TorchForward
from engine.kv_shape import KvShape, zeroed
from engine.latent import serve_latent
from engine.merged_linear import merge_projections
from engine.model_check import check_loading, one_sentence, quietly
from engine.model_errors import ModelLoadError
from engine.model_loader import ModelFacts
from engine.model_probe import groups_of, probe_layers
from engine.native.choose import native_attention
from engine.native.layers import use_native_layers
from engine.native.library import Library
from engine.types import DraftWork, PlanItem
from engine.unpack import UnpackedWeight
from settings.model_path import ModelPathError, resolve_model
from settings.phases import phase

log = logging.getLogger(__name__)

_OFF = "set engine.speculation.method to off, lookup or draft"


def drafter_of(
    config: EngineConfig,
    model: Any,
    facts: ModelFacts,
    device: torch.device,
    library: Library | None,
    make: MakeForward,
) -> DraftModel | None:
    """What drafts for `model`, if anything does. Raises ModelLoadError."""
    match config.speculation.method:
        case "draft":
            phase("loading the draft model")
            return load_draft(config, facts, device, library, make)
        case "mtp":
            phase("loading the prediction head")
            return load_head(config, model, facts, device, library)
        case _:
            return None


def check_head(config: EngineConfig) -> None:
    """Before any weight is read: whether there is a head. What is wrong with the model itself is said when it is
    loaded. Raises ModelLoadError.
    """
    if config.speculation.method != "mtp":
        return
    with contextlib.suppress(ModelPathError):
        directory = Path(resolve_model(config.model))
        with one_sentence(directory), contextlib.suppress(CheckpointError):
            described = read_object(directory / "config.json")
            count = described.get("num_nextn_predict_layers", described.get("num_mtp_layers", 1))
            layers, family = described.get("num_hidden_layers"), described.get("model_type")
            text = SimpleNamespace(num_mtp_layers=count, num_hidden_layers=layers, model_type=family)
            _check_family(directory.name, text)
            if not isinstance(layers, int) or isinstance(layers, bool):
                raise ModelLoadError(
                    f"{directory / 'config.json'} has num_hidden_layers {str(layers)[:40]}, and a whole number is "
                    f"expected: the prediction head is the layer behind; correct it, or {_OFF}"
                )
            _names(directory, unpacked(directory, described, read_weights(directory)).weights, text)


def _check_family(name: str, text: Any) -> None:
    if text.model_type not in HEAD_FAMILIES:
        raise ModelLoadError(
            f"{name} is of the family {text.model_type}, whose prediction heads are not known "
            f"(those of {' and '.join(HEAD_FAMILIES)} are); {_OFF}"
        )


def load_head(
    config: EngineConfig, model: Any, facts: ModelFacts, device: torch.device, library: Library | None
) -> HeadDrafter:
    """Raises ModelLoadError."""
    table = whole_table(facts)
    _check_family(facts.name, model.config.get_text_config())
    head = _Head(_read(config.model, model, facts, device), model)
    serve_latent(head, facts.context_limit_tokens)
    merge_projections(head)
    layers = probe_layers(head, device, facts.context_limit_tokens)
    own = replace(facts, num_layers=1, groups=groups_of(layers, facts.dtype), own_groups=())
    own = replace(own, heads=max(seen.heads for seen in layers))
    shape = KvShape(own.groups, config.block_tokens)
    group_experts(head, library)
    if library is not None:
        use_native_layers(head, library)
    (group,) = own.groups
    backend = _backend(config, AttentionShape.of(group, own.heads, config.block_tokens, facts.extras), device, library)
    forward = TorchForward(head, backend if shape.is_plain else GroupedBackend(own.groups, [backend]))
    return HeadDrafter(head, LastStates(model), forward, own, shape, device, table)


def _backend(
    config: EngineConfig, shape: AttentionShape, device: torch.device, library: Library | None
) -> AttentionBackend:
    if library is not None and config.attention in ("auto", "native"):
        native = native_attention(library, shape)
        if isinstance(native, NativeBackend):
            return native
    try:
        return pick_backend("auto" if config.attention == "native" else config.attention, device, shape)
    except AttentionChoiceError as error:
        raise ModelLoadError(f"the prediction head: {error}; or {_OFF}") from error


def _read(path: str, model: Any, facts: ModelFacts, device: torch.device) -> Any:
    """transformers' MtpModel with the first head of the checkpoint, beside `model`. Raises ModelLoadError."""
    from safetensors import safe_open
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_layers import MtpModel
    from transformers.modeling_utils import LoadStateDictConfig

    directory = Path(resolve_model(path))
    theirs: Any = MtpModel
    dtype = getattr(torch, facts.dtype)
    with one_sentence(directory):
        found = unpacked(directory, read_object(directory / "config.json"), read_weights(directory))
        names = _names(directory, found.weights, model.config.get_text_config())
        packed = {name: found.packed[name] for name in names if name in found.packed}
        stored = {part for name in names for part in (packed[name].parts.values() if name in packed else (name,))}
        with contextlib.ExitStack() as opened, quietly():
            slices: dict[str, Any] = {}
            for file in found.weights.files:
                one: Any = opened.enter_context(safe_open(file, framework="pt"))
                slices |= {name: one.get_slice(name) for name in one.keys() if name in stored}  # noqa: SIM118
            tensors: dict[str, Any] = {name: slices[name] for name in names if name not in packed}
            for name, one in packed.items():
                tensors[name] = UnpackedWeight(one, {role: slices[part] for role, part in one.parts.items()})
            with contextlib.ExitStack() as made_so:
                for context in theirs.get_init_context(dtype, False, False, None):
                    made_so.enter_context(context)
                made = theirs(model, 1)
            settings = LoadStateDictConfig(
                weight_mapping=made.get_weight_conversions(model),
                device_map={"": device},
                dtype=dtype,
                dtype_plan=model._get_dtype_plan(dtype),
            )
            info, _ = convert_and_load_state_dict_in_model(model=made, state_dict=tensors, load_config=settings)
            made._adjust_missing_and_unexpected_keys(info)
    check_loading(
        directory,
        {"mismatched_keys": info.mismatched_keys, "missing_keys": info.missing_keys, "unexpected_keys": ()},
    )
    return made


def _names(directory: Path, weights: Weights, text: Any) -> list[str]:
    """Of the head's tensors, without those that it shares with the model. Raises ModelLoadError."""
    prefix = head_prefix(text)
    if not heads_of(text) or f"{prefix}eh_proj.weight" not in weights.tensors:
        raise ModelLoadError(
            f"{directory} has no prediction head ({prefix}eh_proj.weight is not there: transformers leaves heads out "
            f"when it saves a model); use the checkpoint as it was published, or {_OFF}"
        )
    shared = (f"{prefix}shared_head.head.", f"{prefix}embed_tokens.")
    return [name for name in weights.tensors if name.startswith(prefix) and not name.startswith(shared)]


class LastStates:
    """What the model's last norm made in the step that ran last: [1, T, hidden]."""

    def __init__(self, model: Any) -> None:
        self._found: torch.Tensor | None = None
        model.get_decoder().norm.register_forward_hook(self._note)

    def _note(self, _: Any, __: Any, made: torch.Tensor) -> None:
        self._found = made

    def take(self) -> torch.Tensor:
        found, self._found = self._found, None
        assert found is not None, "the model has run without its last norm"
        return found[0]


class _Head(nn.Module):
    """Called as a causal language model is, with the states that it is `given` for its rows, [1, T, hidden]. What it
    makes of the rows that are kept is in `made`.
    """

    def __init__(self, read: Any, model: Any) -> None:
        super().__init__()
        self.config = read.config
        self.config._experts_implementation = PLAIN
        self.layer = read.layers[0]
        self._of_the_model = (model.get_input_embeddings(), model.get_decoder().rotary_emb, model.lm_head)
        self.given: torch.Tensor | None = None
        self.made: torch.Tensor | None = None
        self.eval().requires_grad_(False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        embedding, rotary, output = self._of_the_model
        embedded = embedding(input_ids)
        given = torch.zeros_like(embedded) if self.given is None else self.given  # none: it is only looked at
        states = self.layer(
            embedded,
            given,
            position_embeddings=rotary(embedded, position_ids=position_ids),
            attention_mask=None,
            position_ids=position_ids,
            past_key_values=None,
        )
        kept = states if logits_to_keep is None else states[:, logits_to_keep]
        self.made = kept[0]
        return SimpleNamespace(logits=output(kept))


class HeadDrafter(DraftModel):
    def __init__(
        self,
        head: _Head,
        states: LastStates,
        forward: TorchForward,
        facts: ModelFacts,
        shape: KvShape,
        device: torch.device,
        table: int,
    ) -> None:
        super().__init__(forward, facts, shape, device, table, facts.vocab_size)
        self.limits = replace(self.limits, coupled=True)
        self._head = head
        self._states = states
        self._hidden = int(head.config.hidden_size)
        self._dtype = getattr(torch, facts.dtype)
        self._kept = torch.empty(0)  # [places, hidden]: of each token in the blocks of the model's table

    def __str__(self) -> str:
        return f"its prediction head ({self._forward.name}, {self.block_bytes} bytes a block)"

    @property
    def block_bytes(self) -> int:
        return super().block_bytes + self._shape.block_tokens * self._hidden * self._dtype.itemsize

    def begin(self, blocks: Sequence[int]) -> None:
        places = blocks[self._table] * self._shape.block_tokens
        self._kept = zeroed((places, self._hidden), self._dtype, self._device)
        super().begin(blocks)

    def keep(self, items: Sequence[PlanItem]) -> None:
        places: list[int] = []
        for item in items:
            places += self._places(self._table_of(item, self._table), item.start, item.start + len(item.token_ids))
        found = self._states.take()[: len(places)]  # the packed row may be padded
        self._kept.index_copy_(0, torch.tensor(places, device=self._device), found.to(self._dtype))

    def _places(self, table: Sequence[int], start: int, end: int) -> list[int]:
        size = self._shape.block_tokens
        return [(table[row // size] - self._first_id) * size + row % size for row in range(start, end)]

    def _known(self, item: PlanItem, work: DraftWork, table: Sequence[int]) -> Rows:
        states = self._kept[torch.tensor(self._places(table, work.start, work.end), device=self._device)]
        return self._rows(item.history[work.start + 1 : work.end + 1], work.start, work, table, states)

    def _said(self, drafts: list[int], work: DraftWork, table: Sequence[int], state: torch.Tensor | None) -> Rows:
        assert state is not None
        return self._rows(drafts[-1:], work.end + len(drafts) - 1, work, table, state[None])

    def _rows(
        self, tokens: Sequence[int], start: int, work: DraftWork, table: Sequence[int], states: torch.Tensor
    ) -> Rows:
        """In the head's own count. Positions are those of the embedded tokens."""
        own = table[work.base // self._shape.block_tokens :]
        return Rows(tokens, start - work.base, own, work.base + 1, states)

    def _run(
        self, rows: Sequence[Rows], token_ids: list[int], positions: list[int], chunks: list[Chunk], keep: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        given = [r.states if r.states is not None else self._kept[: len(r.tokens)] for r in rows]  # none: a first pass
        self._head.given = torch.cat(given)[None]
        try:
            logits, _ = super()._run(rows, token_ids, positions, chunks, keep)
            return logits, self._head.made
        finally:
            self._head.given = self._head.made = None
