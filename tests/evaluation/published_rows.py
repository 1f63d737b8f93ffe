"""A few rows of our own making in the layout of each published data set, and folders of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

TOOLS = '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]'
CALL = "<tool_call>\n{'name': 'get_weather', 'arguments': {'town': 'Oslo', 'days': 2}}\n</tool_call>"
SCHEMA = {
    "type": "object",
    "title": "Pet",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "kind": {"enum": ["cat"]}},
    "required": ["name", "age"],
}
DS1000_CONTEXT = '''
import numpy as np

def generate_test_case(test_case_id):
    return np.array([1, 2, 3]), 6

exec_context = """
import numpy as np
a = test_input
[insert]
"""

def test_execution(solution: str):
    code = exec_context.replace("[insert]", solution)
    test_input, expected = generate_test_case(1)
    space = {"test_input": test_input}
    exec(code, space)
    assert space["result"] == expected

def test_string(solution: str):
    assert "for" not in solution
'''
NO_DATE = {"day": "", "month": "", "year": ""}

# By kind. Each row's own target must score 1.
OURS: dict[str, list[dict[str, Any]]] = {
    "math401": [{"query": "5+2=", "response": "7"}, {"query": "1/3=", "response": "0.3333"}],
    "math23k": [
        {
            "id": "1",
            "original_text": "小明有3个苹果，吃了1个，还剩几个？",
            "segmented_text": "小 明 有 3 个 苹 果 ， 吃 了 1 个 ， 还 剩 几 个 ？",
            "equation": "x=3-1",
            "ans": "2",
        },
        {
            "id": "2",
            "original_text": "12的25%是多少？",
            "segmented_text": "12 的 25% 是 多 少 ？",
            "equation": "x=1/4",
            "ans": "25%",
        },
        {"id": "3", "original_text": "半", "segmented_text": "半", "equation": "x=1+1/2", "ans": "1(1/2)"},
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": 'def double(x):\n    """Twice x."""\n',
            "canonical_solution": "    return 2 * x\n",
            "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n",
            "entry_point": "double",
        }
    ],
    "mbpp": [
        {
            "task_id": 11,
            "text": "Write a function to add two numbers.",
            "code": "def add(a, b):\r\n  return a + b",
            "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
    ],
    "ds1000": [
        {
            "prompt": "Problem:\nSum a.\nA:\n<code>\nimport numpy as np\n</code>\nresult = ...\nBEGIN\n<code>\n",
            "reference_code": "result = a.sum()",
            "metadata": {"problem_id": 0, "library": "Numpy", "test_case_cnt": 1},
            "code_context": DS1000_CONTEXT,
        }
    ],
    "coqa-recall": [
        {
            "id": "a",
            "story": "Mira lives in an old house by the river.",
            "questions": {"input_text": ["Who lives there?", "Where is the house?"], "turn_id": [1, 2]},
            "answers": {"input_text": ["Mira", "by the river"], "turn_id": [1, 2]},
            "additional_answers": {"0": {"input_text": ["Mira does", "near the river"], "turn_id": [1, 2]}},
        }
    ],
    "drop-recall": [
        {
            "section_id": "s",
            "query_id": "q1",
            "passage": "They won 3 games in May 1990 and lost to Oslo and Riga.",
            "question": "How many games did they win?",
            "answer": {"number": "3", "date": NO_DATE, "spans": []},
            "validated_answers": {"number": ["", "3"], "date": [NO_DATE, NO_DATE], "spans": [["three"], []]},
        },
        {
            "section_id": "s",
            "query_id": "q2",
            "passage": "They won 3 games in May 1990 and lost to Oslo and Riga.",
            "question": "When did they win?",
            "answer": {"number": "", "date": {"day": "", "month": "May", "year": "1990"}, "spans": []},
            "validated_answers": {"number": [], "date": [], "spans": []},
        },
    ],
    "squad-f1": [
        {
            "id": "x",
            "title": "Towns",
            "context": "Oslo is the capital of Norway.",
            "question": "What is the capital of Norway?",
            "answers": {"text": ["Oslo"], "answer_start": [0]},
        }
    ]
    * 3,
    "function-calls": [
        {
            "id": "f1",
            "prompt": [
                {"role": "system", "content": f"You may call functions. <tools>{TOOLS}</tools>"},
                {"role": "user", "content": "Weather in Oslo for two days?"},
            ],
            "completion": CALL,
            "tools": TOOLS,
        },
        {
            "id": "f2",
            "conversations": [
                {"from": "system", "value": f"<tools>{TOOLS}</tools>"},
                {"from": "human", "value": "Weather in Oslo for two days?"},
                {"from": "gpt", "value": CALL},
            ],
            "tools": TOOLS,
        },
    ],
    "json-mode": [
        {
            "prompt": [{"role": "user", "content": "Describe the cat Tom, 3 years old."}],
            "completion": '{"name": "Tom", "age": 3, "kind": "cat"}',
            "schema": json.dumps(SCHEMA),
        }
    ],
    "code-switching": [
        {"prompt": "東京について教えてください。", "language": "japanese"},
        {"prompt": "Расскажи о Москве.", "language": "russian"},
    ],
    "multiple-choice": [
        {"question": "What is sizeof(char)?", "A": "1", "B": "2", "C": "4", "D": "8", "answer": "A"},
        {"question": "Which sorts?", "A": "bfs", "B": "heap", "C": "hash", "D": "dfs", "answer": "B"},
    ],
    "exact": [{"prompt": "what is 1 plus 1 ?", "answer": "2", "ignore": ["."]}] * 2,
}

_MMLU = {"question": "Two and two?", "subject": "x", "choices": ["3", "4", "5", "6"], "answer": 1}
_GSM8K = {"question": "Ann has 2 apples and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
_ARC = {
    "id": "a",
    "question": "Which is cold?",
    "choices": {"text": ["ice", "fire", "steam", "lava"], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
}
_RACE_PROBLEM = {"question": "Who is it about?", "answer": "B", "options": ["Tom", "Ann", "Bob", "Eve"]}
_WMT = {"translation": {"fr": "le chat dort", "en": "the cat sleeps"}}
_PIQA = {"goal": "Cool a drink", "sol1": "Add ice.", "sol2": "Add fire.", "label": 0}
_IFEVAL_KWARGS = {"num_words": None, "capital_frequency": None, "capital_relation": None}
_CAPITALS = {**_IFEVAL_KWARGS, "capital_frequency": 3, "capital_relation": "at least"}
_IFEVAL = [
    {"key": 1, "prompt": "Greet me without commas.", "instruction_id_list": ["punctuation:no_comma"],
     "kwargs": [_IFEVAL_KWARGS]},
    {"key": 2, "prompt": "Greet me in lowercase.", "instruction_id_list": ["change_case:english_lowercase"],
     "kwargs": [_IFEVAL_KWARGS]},
    {"key": 3, "prompt": "Greet me loudly, without commas.",
     "instruction_id_list": ["change_case:capital_word_frequency", "punctuation:no_comma"],
     "kwargs": [_CAPITALS, _IFEVAL_KWARGS]},
]  # fmt: skip
# Of the harness's own tasks: (data set, configuration) -> split -> rows.
HARNESS: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {
    ("openai/gsm8k", "main"): {"train": [_GSM8K] * 6, "test": [_GSM8K, {**_GSM8K, "question": "And with 3 more?"}]},
    ("allenai/ai2_arc", "ARC-Easy"): {split: [_ARC] * 2 for split in ("train", "validation", "test")},
    ("allenai/ai2_arc", "ARC-Challenge"): {split: [_ARC] * 2 for split in ("train", "validation", "test")},
    ("EleutherAI/race", "high"): {"test": [{"article": "Ann reads.", "problems": str([_RACE_PROBLEM])}] * 2},
    ("google/IFEval", "default"): {"train": _IFEVAL},
    ("baber/piqa", "default"): {"train": [_PIQA] * 2, "validation": [_PIQA] * 2},
    ("EleutherAI/drop", "default"): {"train": OURS["drop-recall"] * 2, "validation": OURS["drop-recall"]},
    ("wmt/wmt14", "fr-en"): {split: [_WMT] * 4 for split in ("train", "validation", "test")},
}
_HUB = {
    "humaneval": ("openai/openai_humaneval", "default", "test"),
    "mbpp": ("google-research-datasets/mbpp", "full", "test"),
    "ds1000": ("xlangai/DS-1000", "default", "test"),
    "coqa-recall": ("EleutherAI/coqa", "default", "validation"),
    "squad-f1": ("rajpurkar/squad", "default", "validation"),
    "function-calls": ("NousResearch/func-calling-eval", "default", "train"),
    "json-mode": ("NousResearch/json-mode-eval", "default", "train"),
}
_FILES = {
    "math401": "math401.json",
    "math23k": "math23k_test.json",
    "multiple-choice": "codeapex.jsonl",
    "code-switching": "code_switching.jsonl",
}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_all(folder: Path) -> Path:
    """Everything that the built-in suites read, as a local mirror."""
    import lm_eval.tasks

    for (hub, config), splits in HARNESS.items():
        for split, rows in splits.items():
            write_jsonl(folder / hub / config / f"{split}.jsonl", rows)
    for kind, (hub, config, split) in _HUB.items():
        write_jsonl(folder / hub / config / f"{split}.jsonl", OURS[kind])
    write_jsonl(folder / "google-research-datasets/mbpp/full/prompt.jsonl", OURS["mbpp"] * 3)
    write_jsonl(folder / "rajpurkar/squad/default/train.jsonl", OURS["squad-f1"])
    for kind, name in _FILES.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(OURS[kind], ensure_ascii=False), encoding="utf-8")
        else:
            write_jsonl(folder / name, OURS[kind])
    for skill in ("sum", "reverse", "sort", "index", "say", "facts"):
        write_jsonl(folder / f"{skill}.jsonl", OURS["exact"])
    for file in Path(lm_eval.tasks.__file__).parent.glob("mmlu/default/mmlu_*.yaml"):
        subject = yaml.safe_load(file.read_text())["dataset_name"]
        write_jsonl(folder / "cais/mmlu" / subject / "test.jsonl", [_MMLU])
        write_jsonl(folder / "cais/mmlu" / subject / "dev.jsonl", [_MMLU] * 5)
    return folder
