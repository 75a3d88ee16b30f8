"""The five commands of docs/your_data.md from a folder to a model: each is run, and prints what the page shows."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from tiny import TINY, make_dataset

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your_data.md").read_text().replace("\\\n", " ")
(GUIDE,) = re.findall(r"^## From a folder to a model$(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
SMALL = (
    *TINY,
    "train.epochs=1",
    "optim.warmup_epochs=0",
    "data.augment={scales: [48], max_size: 64}",
    "eval={every_epochs: 1, max_size: 64}",
)


def shown() -> list[tuple[str, list[str]]]:
    """Each command of the guide, and the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for line in re.findall(r"^ {4}(.*)$", GUIDE, re.MULTILINE):
        if line.startswith("python -m "):
            found.append((line, []))
        elif line.strip():
            found[-1][1].append(line)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the guide begins with: images and a table of their boxes, and other photos."""
    monkeypatch.chdir(tmp_path)
    drawn = make_dataset(tmp_path / "drawn", num_train=20, num_val=3, empty_fraction=0.3)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(drawn / "train2017", tmp_path / "FOLDER" / "images")
    shutil.copytree(drawn / "val2017", tmp_path / "photos")
    content = json.loads((drawn / "annotations" / "instances_train2017.json").read_text())
    files = {image["id"]: image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    with (tmp_path / "FOLDER" / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "x1", "y1", "x2", "y2", "class"])
        annotated = {box["image_id"] for box in content["annotations"]}
        table.writerows([name, *[""] * 5] for image_id, name in files.items() if image_id not in annotated)
        for box in content["annotations"]:
            left, top, width, height = box["bbox"]
            row = [files[box["image_id"]], left, top, left + width, top + height, names[box["category_id"]]]
            table.writerow(row)
    return tmp_path


def shape(text: str) -> str:
    """A line without its numbers, and with single blanks."""
    return " ".join(re.sub(r"[0-9][0-9.,e+-]*", "#", text).split())


def is_printed(line: str, printed: str) -> bool:
    """Whether a line of the page, of which ``...`` stands for anything, was printed with whatever numbers."""
    wanted = ".*".join(map(re.escape, map(shape, line.split("..."))))
    return any(re.search(wanted, shape(found)) for found in printed.splitlines())


def test_five_commands_lead_from_a_folder_to_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = shown()
    assert [shlex.split(command)[2].removeprefix("detr_ray.") for command, _ in commands] == [
        "check", "show", "train", "evaluate", "predict",
    ]  # fmt: skip
    for command, lines in commands:
        module, *arguments = shlex.split(command)[2:]
        code = importlib.import_module(module).main([*arguments, *SMALL])
        printed, errors = capsys.readouterr()
        assert code == 0, f"{command}\n{printed}\n{errors}"
        assert lines and [line for line in lines if not is_printed(line, printed)] == [], f"{command}\n{printed}"
    for file in ("augmentation.png", "found.png", "found/predictions.csv"):
        assert (folder / file).is_file(), file
    assert len(list((folder / "found" / "pictures").iterdir())) == 3
