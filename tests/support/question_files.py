"""Files as SQuAD and HotpotQA have them."""

import json
from pathlib import Path
from typing import Any


def write_squad(folder: Path, paragraph: str, asked: str, right: str, **changes: Any) -> Path:
    entry = {"id": "1", "question": asked, "is_impossible": False, "answers": [{"text": right}], **changes}
    kept = {field: value for field, value in entry.items() if value is not None}
    file = folder / "squad.json"
    file.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"context": paragraph, "qas": [kept]}]}]}))
    return file


def write_hotpot(folder: Path, **changes: Any) -> Path:
    entry = {
        "_id": "1",
        "question": "Who built the ship that Bo sailed?",
        "answer": "Ann",
        "type": "bridge",
        "level": "easy",
        "supporting_facts": [["Bo", 0], ["Swan", 0]],
        "context": [
            ["Bo", ["Bo sailed the Swan."]],
            ["Far", ["Far is far."]],
            ["Swan", ["It is old.", " Ann built it."]],
        ],
        **changes,
    }
    file = folder / "hotpot.json"
    file.write_text(json.dumps([{field: value for field, value in entry.items() if value is not None}]))
    return file
