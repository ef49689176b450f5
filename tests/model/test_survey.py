"""docs/models.md says of each family what a tiny model of it does here, and nothing of any other."""

from __future__ import annotations

import re

import pytest
import torch

from tests.support.families import PEOPLE_SERVE, NotBuilt
from tests.support.published import PUBLISHED, row_of_published
from tests.support.survey import DOCUMENT, families, look, row_in_document
from tests.support.tiers import tiered

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the table has the paths of a CPU")


@pytest.mark.parametrize("model_type", tiered(PEOPLE_SERVE, [n for n in families() if n not in PEOPLE_SERVE]))
def test_a_family_is_served_as_the_document_says(model_type: str) -> None:
    """Exact, or refused with those words: `look` raises for what is served and wrong."""
    try:
        row = str(look(model_type))
    except NotBuilt as error:
        assert row_in_document(model_type) == ""
        pytest.skip(f"no tiny model of it: {error}")
    assert row_in_document(model_type) == row, "run python -m tests.support.survey"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_models_keep_is_what_their_configurations_say(name: str) -> None:
    row = row_of_published(name)
    assert row in DOCUMENT.read_text().splitlines(), f"run python -m tests.support.survey: {row}"


def test_each_family_has_a_row_once() -> None:
    found = re.findall(r"^\| ([\w.-]+) \| (?:exact|refused) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(found) == len(set(found))
    assert set(PEOPLE_SERVE) <= set(found) <= set(families())


def test_a_refusal_is_one_sentence_with_a_fix() -> None:
    """Of every family: none says what Python said, each says what to do."""
    for line in re.findall(r"^\| [\w.-]+ \| refused \| (.*) \|  \|$", DOCUMENT.read_text(), re.MULTILINE):
        assert re.search(r"[;:] (choose another model|set engine\.|download|it serves|convert)", line), line
        assert not re.search(r"\w+(Error|Exception)\b|NoneType|object has no|MaskSeen|unsupported operand", line), line
