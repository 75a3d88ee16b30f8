"""The check command: what it refuses, and where its report goes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from check_outcome import SMALL
from coco_folder import sound_folder
from data.format_sets import FORMATS
from terminal import COLOUR, terminal

from detr_ray.check import main
from detr_ray.engine.reporting.progress import Pace

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([], "error: data.root: no training data is given"),
        (["data.rot=here"], "error: unknown key 'data.rot'; did you mean 'data.root'?"),
        (["data.root=here", "--decod"], "error: '--decod' is neither an option nor key=value"),
    ],
)
def test_an_unusable_configuration_is_exit_code_2(argv, error, capsys):
    assert main([*SMALL, *argv]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(error)


def test_the_report_can_go_to_standard_output(tmp_path, capsys):
    root = sound_folder(tmp_path / "set")
    assert main([*SMALL, f"data.root={root}", f"run.storage={tmp_path}/runs", "--json", "-"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["ok"] is True
    assert "0 errors, 0 warnings" in output.err


def test_work_on_many_images_is_a_bar_in_a_terminal_and_lines_in_a_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("detr_ray.data.image_sizes._GROUP_IMAGES", 4)
    monkeypatch.setattr("detr_ray.data.inspection._GROUP_IMAGES", 4)
    monkeypatch.setattr(Pace.__init__, "__defaults__", (0.0,))
    root = FORMATS["yolo"](tmp_path / "set")  # whose sizes are in the images' headers alone
    argv = [*SMALL, f"data.root={root}", f"run.storage={tmp_path}/runs", "train.global_batch_size=2"]
    pieces = ["read the sizes of", "read the headers of"]
    assert main(argv) == 0
    logged = capsys.readouterr().out
    assert main([*argv, "--json", "-"]) == 0
    piped = capsys.readouterr()
    with terminal(monkeypatch) as shown:
        assert main(argv) == 0
    drawn = b"".join(shown).decode()
    plain = re.sub(COLOUR, "", drawn)
    for piece in pieces:
        assert re.search(rf"\n  train: {piece} 4 of 12 images, [\d.]+ images/s, left ", logged), logged
        assert f"train: {piece}" in piped.err and "{" in piped.out[:2]
        assert re.search(rf"train: {piece} +\d+/12 ━", plain), plain
    assert len(re.findall(" ━+ ", plain)) == 4, "a bar is gone when its work is done"
    assert "\x1b" not in logged + piped.err and "images/s" not in plain
    assert re.search(r"\n0 errors, \d warnings?:", plain.replace("\r", "")), "lines are above the bar"


def test_a_report_that_cannot_be_written_is_told(tmp_path, capsys):
    root = sound_folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    argv = [f"data.root={root}", f"run.storage={tmp_path}/runs", "--json", f"{tmp_path}/file/report.json"]
    assert main([*SMALL, *argv]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_as_a_process(tmp_path):
    root = sound_folder(tmp_path / "set")
    argv = [f"data.root={root}", f"run.storage={tmp_path}/runs", "train.global_batch_size=100"]
    command = [sys.executable, "-m", "detr_ray.check", *SMALL, *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert result.returncode == 1
    assert "error    12 training images are too few for one step" in result.stdout
    assert "Traceback" not in result.stderr
