"""`diptych convert FILE.gguf DIRECTORY`: a GGUF file as a checkpoint that is served like any other.

transformers reads and de-quantizes it. What it would leave out is not left out silently: a tensor that it does not
know, a weight of the model that the file lacks, or a setting that changes what is computed is refused. Llama 3.1's
frequency factors are such a tensor: without them every answer beyond some thousand tokens would be wrong.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.console import fail, out
from deploy.model_store import save_plain

_MAGIC = b"GGUF"
# Settings of the file that say again what the configuration follows from, or nothing about what is computed.
_IMPLIED = {
    "vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length", "block_count",
    "attention.layer_indices", "rope.scaling.finetuned", "expert_weights_norm",
}  # fmt: skip
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "attention.causal": (True,),
}


class ConvertError(Exception):
    """Names cause and fix."""


class _Recorded(dict[str, str]):
    """The names of tensors that transformers knows, and those that it asked for in vain."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(names)
        self.lost: list[str] = []

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if not found:
            self.lost.append(str(name))
        return found


def convert(
    file: Annotated[Path, typer.Argument(help="A GGUF file")],
    directory: Annotated[Path, typer.Argument(help="Where the checkpoint goes; must not exist")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
) -> None:
    """Write a GGUF file's model as a checkpoint (safetensors), de-quantized. Refuses what would be another model."""
    try:
        converted(file, directory, dtype)
    except ConvertError as error:
        fail(str(error))
    out.print(f"wrote {directory}; `diptych check {directory}` says whether it is served", soft_wrap=True)


def converted(file: Path, directory: Path, dtype: str = "bfloat16") -> None:
    """Raises ConvertError; `directory` exists only if all of it is there."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConvertError(f"--dtype is {dtype}; use bfloat16, float16 or float32")
    if directory.exists():
        raise ConvertError(f"{directory} exists; name a directory that does not")
    reader = _opened(file)
    architecture = _architecture(file, reader)
    ignored = sorted(_ignored_settings(reader, architecture))
    if ignored:
        raise ConvertError(
            f"{file} has settings that transformers ignores ({_some(ignored)}): it would be another model; "
            "fetch the model's own checkpoint"
        )
    making = directory.with_name(f".{directory.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    try:
        _write(file.resolve(), making, dtype, architecture)
        making.rename(directory)
    except OSError as error:
        raise ConvertError(f"cannot write {directory}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _opened(file: Path) -> Any:
    """A GGUFReader."""
    try:
        with file.open("rb") as opened:
            if opened.read(4) != _MAGIC:
                raise ConvertError(f"{file} is no GGUF file")
    except OSError as error:
        raise ConvertError(f"cannot read {file}: {error.strerror or error}") from None
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except Exception as error:  # a file from anywhere
        raise _broken(file, error) from None


def _broken(file: Path, error: Exception) -> ConvertError:
    return ConvertError(f"{file} is a broken GGUF file ({error}); fetch it again")


def _plain(architecture: str) -> str:
    """Its name is written with and without these."""
    return architecture.replace("_", "").replace("-", "")


def _architecture(file: Path, reader: Any) -> str:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, read_field

    try:
        (architecture,) = read_field(reader, "general.architecture")
    except Exception as error:
        raise _broken(file, error) from None
    if _plain(architecture) not in map(_plain, GGUF_SUPPORTED_ARCHITECTURES):
        raise ConvertError(
            f"{file} is of the architecture {architecture!r}, which transformers does not read from GGUF; "
            "fetch the model's own checkpoint"
        )
    return str(architecture)


def _write(file: Path, making: Path, dtype: str, architecture: str) -> None:
    import torch
    import transformers.modeling_gguf_pytorch_utils as reading
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place, name = str(file.parent), file.name
    names_of = reading.get_gguf_hf_weights_map
    recorded: list[_Recorded] = []

    def recording(*arguments: Any, **options: Any) -> dict[str, str]:
        names = names_of(*arguments, **options)
        if options.get("qual_name"):  # called by itself, for a part of the model
            return names
        recorded.append(_Recorded(names))
        return recorded[-1]

    reading.get_gguf_hf_weights_map = recording  # it has no other word on what it leaves out
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=name,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        model, told = loaded
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    except Exception as error:
        why = next(iter(str(error).splitlines()), "")[:300]
        raise ConvertError(f"transformers cannot read {file} ({why}); fetch the model's own checkpoint") from None
    finally:
        reading.get_gguf_hf_weights_map = names_of
    lost = sorted({tensor for names in recorded for tensor in names.lost})
    if lost or not recorded:
        raise ConvertError(
            f"{file} has tensors that transformers leaves out ({_some(lost) or 'all'}): it would be another model; "
            "fetch the model's own checkpoint"
        )
    missing = sorted(told["missing_keys"])
    if missing:
        raise ConvertError(f"{file} lacks weights of a {architecture} model ({_some(missing)}); fetch it again")
    save_plain(model, tokenizer, making)


def _ignored_settings(reader: Any, architecture: str) -> Iterator[str]:
    """Of the architecture's own, those that no field of the configuration is made from."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING, read_field

    of_config = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    wanted = _plain(architecture)
    known = {key for name, keys in of_config.items() if _plain(name) == wanted for key in keys}
    if architecture == "llama":
        known |= set(of_config.get("mistral", {}))
    if wanted == "gptoss":  # it reads these by itself
        known |= {f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "attention_factor")}
    for key in reader.fields:
        prefix, _, setting = key.partition(".")
        if prefix != architecture or setting in known or setting in _IMPLIED:
            continue
        value = read_field(reader, key)
        if len(value) == 1 and value[0] in _NEUTRAL.get(setting, ()):
            continue
        yield key


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
