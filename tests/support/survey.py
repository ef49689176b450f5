"""What becomes of each family of causal language models that transformers has: the table of docs/models.md.

`python -m tests.support.survey` makes the table anew, `python -m tests.support.survey TYPE...` prints those rows.
tests/model/test_survey.py holds the document to what is found.
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.model_check import ModelLoadError, quietly
from engine.runner import ModelRunner
from kv_transfer.layout import Group
from tests.support.courses import BLOCK, BLOCKS, differences, run_course
from tests.support.families import CONTEXT, PEOPLE_SERVE, NotBuilt, reference_of, saved_family
from tests.support.published import PUBLISHED, row_of_published

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_MARK = "<!-- {} -->"


@dataclass(frozen=True, slots=True)
class Row:
    """`runs`: which path computes it; "" for what is refused, and then `why`."""

    name: str
    runs: str
    keeps: str
    why: str

    def __str__(self) -> str:
        said = self.why.replace("|", "\\|")
        return f"| {self.name} | {'exact' if self.runs else 'refused'} | {self.runs or said} | {self.keeps} |"


def look(model_type: str) -> Row:
    """Makes a tiny model of it, loads it as a worker does, and compares a course of answers. Raises NotBuilt, and
    AssertionError for a model that is served and wrong.
    """
    with tempfile.TemporaryDirectory() as name, quietly():
        path = saved_family(Path(name), model_type)
        try:
            runner = loaded(path)
        except ModelLoadError as error:
            return Row(model_type, "", "", _plain(str(error), path))
        reference = reference_of(path, model_type)
        course = run_course(runner)
        try:
            wrong = differences(course, reference)
        except (ValueError, RuntimeError, TypeError, AttributeError, StopIteration) as error:
            raise NotBuilt(f"transformers' own generate fails: {str(error).strip()[:150]}") from error
        assert wrong == [], f"{model_type} is served and wrong: {wrong}"
        return Row(model_type, path_of(runner), kept(runner.facts.groups), "")


def loaded(path: Path) -> ModelRunner:
    """With a context limit of ours only where the model states none."""
    settings: dict[str, Any] = {"num_blocks": BLOCKS, "block_tokens": BLOCK, "threads": 1, "dtype": "float32"}
    try:
        return ModelRunner(EngineConfig(model=str(path), **settings))
    except ModelLoadError as error:
        if "states no context limit" not in str(error):
            raise
        return ModelRunner(EngineConfig(model=str(path), context_limit_tokens=CONTEXT, **settings))


def path_of(runner: ModelRunner) -> str:
    """Without what the machine decides."""
    name = re.sub(r" \([^)]*\)", "", runner.forward.name)
    for ours, shown in (("native stack", "native, whole"), ("native", "native attention")):
        if name.startswith(ours):
            return shown
    return "torch"


def kept(groups: tuple[Group, ...]) -> str:
    """The kinds of the groups that keep something."""
    states = {layer for group in groups if group.rule.state for layer in group.layers}
    counts_only = [g for g in groups if not g.rule.state and g.width == 1 and set(g.layers) <= states]
    kinds = dict.fromkeys(re.sub(r"\(\d+\)", "", str(group.rule)) for group in groups if group not in counts_only)
    return ", ".join(kinds)


def _plain(refusal: str, path: Path) -> str:
    """Without names and figures of the moment."""
    refusal = re.sub(r"( is off) by [^;]* is rounding", r"\1", refusal)
    return refusal.replace(f"{path}/", "").replace(str(path), "the directory").replace(path.name, "it")


def families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *seeing()})


def seeing() -> list[str]:
    """Those that transformers makes no causal language model of."""
    from transformers.models.auto import modeling_auto as known

    images: Any = known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted(name for name in images if name not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def row_in_document(model_type: str) -> str:
    found = re.search(rf"^\| {re.escape(model_type)} \|.*$", DOCUMENT.read_text(), re.MULTILINE)
    return found[0] if found else ""


_HEAD = ("| family | | path, or why not | keeps |", "|---|---|---|---|")
_PUBLISHED_HEAD = ("| model | layers, KV heads x width | bytes a token | and a sequence |", "|---|---|---|---|")


def write(rows: dict[str, str]) -> None:
    text = DOCUMENT.read_text()
    others = [name for name in families() if name not in {*PEOPLE_SERVE, *seeing()}]
    for mark, head, names in (
        ("published", _PUBLISHED_HEAD, list(PUBLISHED)), ("served", _HEAD, PEOPLE_SERVE), ("others", _HEAD, others),
        ("seeing", _HEAD, seeing()),
    ):  # fmt: skip
        body = "\n".join([*head, *(rows[n] for n in names if n in rows)])
        first, last = _MARK.format(mark), _MARK.format(f"end of {mark}")
        before, after = text.split(first)[0], text.split(last)[1]
        text = f"{before}{first}\n{body}\n{last}{after}"
    DOCUMENT.write_text(text)


def main() -> None:
    wanted = sys.argv[1:] or families()
    rows: dict[str, str] = {}
    for model_type in wanted:
        try:
            rows[model_type] = str(look(model_type))
        except NotBuilt as error:
            print(f"{model_type}: not built ({error})", file=sys.stderr)
            continue
        except AssertionError as error:
            print(f"{model_type}: {str(error)[:300]}", file=sys.stderr)
            continue
        print(rows[model_type], flush=True)
    if not sys.argv[1:]:
        write(rows | {name: row_of_published(name) for name in PUBLISHED})


if __name__ == "__main__":
    main()
