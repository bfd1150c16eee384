"""Task files of lm-eval over a few questions for tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import torch

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: {second}
"""


def questions(folder: Path) -> Path:
    """Two tasks and a group of them, over twelve questions."""
    numbers = torch.randint(0, 90, (12, 9), generator=torch.Generator().manual_seed(5)).tolist()
    rows = [
        {
            "question": f"w{n[0]} w{n[1]} w{n[2]}",
            "choices": [f"w{n[3]}", f"w{n[4]} w{n[5]} w{n[6]}"],
            "answer": n[7] % 2,
        }
        for n in numbers
    ]
    (folder / "data").mkdir(parents=True)
    data = folder / "data" / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "a.yaml").write_text(TASK.format(name="tiny_choice", data=data, second="acc_norm"))
    (tasks / "b.yaml").write_text(TASK.format(name="mmlu_tiny", data=data, second="acc"))
    (tasks / "c.yaml").write_text(TASK.format(name="tiny_lost", data=folder / "nothing.jsonl", second="acc"))
    group = "group: tiny_group\ntask: [tiny_choice, mmlu_tiny]\naggregate_metric_list:\n  - metric: acc\n"
    (tasks / "group.yaml").write_text(group)
    return tasks
