"""Test ``prompts: {dataset: ...}`` of a recipe, which ``datasets`` loads from a folder in the place of the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from dmfast.training import recipe
from dmfast.training.data import Contexts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the folder of a data set with two splits, and forbid the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    home = tmp_path / "questions"
    home.mkdir()
    for split, n in (("train", 5), ("test", 2)):
        rows = [{"question": f"{split} {i}", "answer": str(i), "prompt": "other"} for i in range(n)]
        datasets.Dataset.from_list(rows).to_parquet(home / f"{split}.parquet")
    return str(home)


def test_a_split_and_a_column(folder: str) -> None:
    rows = recipe._prompts({"dataset": folder, "split": "test", "column": "question"})
    found = Contexts(rows, "prompts")
    assert [prompt for _, prompt in found] == ["test 0", "test 1"]
    whole = found.whole(list(found))
    assert whole is not None and whole[1] == {"prompt": "test 1", "answer": "1"}  # a scorer sees the other columns
    assert len(recipe._prompts({"dataset": folder, "split": "train[:3]"})) == 3
    assert recipe._prompts({"dataset": folder})[4]["prompt"] == "other"


def test_chats_of_a_jsonl_file(tmp_path: Path, folder: str) -> None:
    home = tmp_path / "chats"
    home.mkdir()
    chat = [{"role": "user", "content": "Hello"}]
    (home / "train.jsonl").write_text(json.dumps({"messages": chat}))
    rows = recipe._prompts({"dataset": str(home), "column": "messages"})
    assert Contexts(rows, "prompts")[0][1] == chat


@pytest.mark.parametrize(("change", "message"), [
    ({"dataset": "someone/nothing-here"}, r"prompts: can't load split 'train' of the data set 'someone/nothing-here'.*"
                                          "whether this machine reaches the hub"),
    ({"split": "validation"}, "can't load split 'validation' of the data set .*validation"),
    ({"column": "text"}, "has no column 'text'; it has question, answer, prompt"),
    ({"colunm": "text"}, "prompts: an unknown entry 'colunm'; did you mean 'column'?"),
    ({"split": 3}, "prompts: split must be a string, got 3"),
    ({"dataset": None}, "prompts: dataset is missing"),
])  # fmt: skip
def test_what_is_refused(folder: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(recipe.RecipeError, match=message):
        recipe._prompts({"dataset": folder} | change)


def test_a_data_set_that_is_a_script_is_refused(folder: str) -> None:
    (Path(folder) / "questions.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(recipe.RecipeError, match=r"can't load split 'train' of the data set .*scripts are no longer"):
        recipe._prompts({"dataset": folder})


def test_without_a_data_set_and_without_datasets(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(recipe.RecipeError, match="prompts: dataset is missing"):
        recipe._prompts({"split": "train"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(recipe.RecipeError, match="pip install datasets"):
        recipe._prompts({"dataset": folder})


def test_a_recipe_reads_it(tmp_path: Path, folder: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({
        "model": "tiny-bios", "constraints": [{"contains": {"word": "amazing"}}], "train": {"max_steps": 1},
        "prompts": {"dataset": folder, "column": "question"},
    }))  # fmt: skip
    assert recipe._prompts(recipe.read(path)["prompts"]).num_rows == 5
