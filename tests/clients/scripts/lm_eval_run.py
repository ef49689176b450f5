"""lm-evaluation-harness against a running cluster: multiple choice, rolling log-likelihood, generation.

Arguments: base URL, served model, directory of the tokenizer, directory for tasks. Its tasks and data are made here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

CHOICES = [
    {"question": "The capital of France is", "choices": ["Paris", "a bicycle", "seven"], "answer": 0},
    {"question": "Water is made of hydrogen and", "choices": ["marble", "oxygen", "jazz"], "answer": 1},
    {"question": "Two plus two is", "choices": ["blue", "Tuesday", "four"], "answer": 2},
    {"question": "The sun rises in the", "choices": ["east", "fridge", "novel about the sea"], "answer": 0},
]
TEXTS = [{"text": "The quick brown fox jumps over the lazy dog. " * n} for n in (1, 4)]

MULTIPLE_CHOICE = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
GENERATE = """
task: generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def main(url: str, model: str, tokenizer: str, directory: str) -> None:
    home = Path(directory)
    for name, rows, task in (
        ("choices", CHOICES, MULTIPLE_CHOICE),
        ("rolling", TEXTS, ROLLING),
        ("generate", CHOICES, GENERATE),
    ):
        data = home / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (home / f"{name}.yaml").write_text(task.format(data=data))
    arguments = {
        "base_url": f"{url}/completions",
        "model": model,
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 2,
        "max_length": 256,
    }
    found: Any = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["choices", "rolling", "generate"],
        task_manager=TaskManager(include_path=str(home), include_defaults=False),
        batch_size=3,
        log_samples=True,
    )
    samples = {
        name: [
            {"arguments": sample["arguments"], "responses": sample["filtered_resps"], "doc": sample["doc"]}
            for sample in sorted(rows, key=lambda sample: sample["doc_id"])
        ]
        for name, rows in found["samples"].items()
    }
    print(json.dumps({"results": found["results"], "samples": samples}, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
