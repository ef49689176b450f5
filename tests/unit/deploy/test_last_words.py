"""One line that tells why something ended: the first that names the cause, not the last."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploy.last_words import useful_line
from deploy.processes import Processes

SERVE = """The deployment failed to start 3 times in a row. This may be due to a problem with its constructor.
Error:
ray::ServeReplica:diptych:DecodeWorker.initialize_and_get_metadata() (pid=7, ip=127.0.0.1)
Traceback (most recent call last):
  File "/x/concurrent/futures/_base.py", line 449, in result
    return self.__get_result()
           ^^^^^^^^^^^^^^^^^^^^^^^
engine.model_check.ModelLoadError: /m/model.safetensors is empty; download or copy it again

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/x/replica.py", line 1, in initialize
RuntimeError: Traceback (most recent call last):
  raise RuntimeError(traceback.format_exc()) from None
RuntimeError: the replica's constructor failed
Failed to update the deployments ['DecodeWorker'].
"""
CHAINED = """INFO starting
Traceback (most recent call last):
  File "a.py", line 1, in f
    g()
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in h
    raise ValueError("first: line\\nsecond: line")
ValueError: first: line
second: line
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (SERVE, "/m/model.safetensors is empty; download or copy it again"),
        (CHAINED, "ValueError: first: line"),
        ("INFO a\n12:00 ERROR b: broken\nINFO c\n", "12:00 ERROR b: broken"),
        ("INFO a\nINFO c\n\n", "INFO c"),
        ("ValueError: said by a log, without a traceback\nINFO on we go", "INFO on we go"),
        ("", ""),
    ],
)
def test_the_line_that_names_the_cause(text: str, line: str) -> None:
    assert useful_line(text) == line


def test_what_a_process_wrote_as_its_last_words_is_told_whole(tmp_path: Path) -> None:
    (tmp_path / "speaks").mkdir()
    (tmp_path / "speaks" / "__main__.py").write_text(
        "from settings.process import say_last\nsay_last('one: cause; fix\\ntwo: cause; fix')\nprint('bye')"
    )
    processes = Processes(tmp_path, {"PYTHONPATH": ":".join([str(tmp_path), *sys.path])})
    processes.spawn("speaks", "speaks", {})
    processes.running["speaks"].wait(30)
    assert processes.last_words("speaks") == "one: cause; fix\ntwo: cause; fix"
    (tmp_path / "speaks.words").unlink()
    assert processes.last_words("speaks") == "bye"
    assert processes.last_words("nobody") == "no output"
