"""Of a checkpoint that sees or hears besides reading (published as ...ForConditionalGeneration): the part that reads.

1. The configuration of the text, and the model that transformers has for it alone. Where it has none, or the tensors
   do not fit it, the whole model runs, and what sees and hears is dropped after loading.
2. The checkpoint's names become that model's: `language_model.model.layers` and `model.language_model.layers` are
   `model.layers`. Tensors of the other parts are left out: those under a name of OTHER_PARTS, and no others. What is
   left over is refused as in any checkpoint.

No request can hand over an image or sound: the doors take text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

_TEXT = ("model.language_model.", "language_model.model.", "model.text_model.", "text_model.model.")
_HEAD = ("language_model.lm_head.", "model.lm_head.", "text_model.lm_head.")
OTHER_PARTS = (
    *("vision_tower", "vision_model", "vision_encoder", "vision_embedder", "visual", "vit", "vision_backbone"),
    *("image_tower", "video_tower", "audio_tower", "audio_model", "audio_encoder", "embed_vision", "embed_audio"),
    *("multi_modal_projector", "mm_projector", "vision_projector", "vision_projection", "projector", "mlp1", "aligner"),
    *("connector", "vision_adapter", "patch_merger", "patch_merge_mlp", "merger", "language_projection", "qformer"),
    *("query_tokens", "vision_embed_tokens", "visual_embeddings_table", "image_newline"),
    *("high_res_vision_model", "high_res_vision_neck", "high_res_vision_proj", "high_res_vision_alpha"),
)


@dataclass(frozen=True, slots=True)
class TextPart:
    """`model_class` with `config` computes the text. `names`: its names of the checkpoint's tensors, without those that
    are left out. `whole`: it has parts that see or hear, too.
    """

    model_class: Any
    config: Any
    names: Mapping[str, str]
    whole: bool = False


def text_parts(config: Any, stored: Iterable[str]) -> list[TextPart]:
    """The ways to read the text, the best first. `stored`: names of the checkpoint's tensors. Empty: transformers has
    no causal language model for it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as causal
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as seeing

    alone_of, whole_of = cast("Mapping[type, Any]", causal), cast("Mapping[type, Any]", seeing)
    text = config.get_text_config()
    same = {name: name for name in stored}
    if text is config:
        alone = _alone(config, alone_of, whole_of)
        return [] if alone is None else [TextPart(alone, config, same)]
    found: list[TextPart] = []
    for alone in (_alone(c, alone_of, whole_of) for c in (text, config)):
        if alone is not None and alone.config_class is type(text) and not found:
            names = {name: _renamed(name) for name in same if not is_other_part(name)}
            found.append(TextPart(alone, _tied_or_not(text, config, names), names))
    whole = next((mapping[type(config)] for mapping in (whole_of, alone_of) if type(config) in mapping), None)
    if whole is not None and whole.config_class is type(config):
        found.append(TextPart(whole, config, same, whole=True))
    return found


def _alone(config: Any, alone_of: Mapping[type, Any], whole_of: Mapping[type, Any]) -> Any:
    """transformers lists some models that only read (Mistral 4) among those that see."""
    kind = type(config)
    if kind in alone_of:
        return alone_of[kind]
    if kind in whole_of and whole_of[kind].__name__.endswith("ForCausalLM"):
        return whole_of[kind]
    return None


def drop_other_parts(model: Any) -> None:
    """Of a whole model: the memory of what no request can reach."""
    for parent in (model, getattr(model, "model", None)):
        for name in OTHER_PARTS:
            if parent is not None and name in parent._modules:
                setattr(parent, name, None)


def text_section(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a config.json: what it says of the text, wherever it says it."""
    text = described.get("text_config")
    if not isinstance(text, Mapping):
        return described
    return {name: value for name, value in described.items() if not name.endswith("_config")} | dict(text)


def is_other_part(name: str) -> bool:
    return name.removeprefix("model.").split(".")[0] in OTHER_PARTS


def _renamed(name: str) -> str:
    for prefixes, own in ((_HEAD, "lm_head."), (_TEXT, "model.")):
        for prefix in prefixes:
            if name.startswith(prefix):
                return own + name.removeprefix(prefix)
    return name


def _tied_or_not(text: Any, config: Any, names: Mapping[str, str]) -> Any:
    """Whether the head is the embedding is said in the text's section, or beside it. A head that is stored is used, as
    transformers does where it differs from the embedding.
    """
    tied = bool(getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False))
    text = copy.deepcopy(text)
    text.tie_word_embeddings = tied and "lm_head.weight" not in names.values()
    return text
