"""Names from data on terminals of all kinds: shown in full or escaped, never the end of a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from coco_folder import CocoFolder, encoded

from detr_ray.printable import printable, printable_lines, shortened

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name", "plain name"),
        ("月 lună Ωµ", "月 lună Ωµ"),
        ("wide\u3000and\xa0hard blanks", "wide\u3000and\xa0hard blanks"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("\x9b2Jgone", r"\x9b2Jgone"),
        ("se\udcf1or", r"se\udcf1or"),
        ("a\u2028b\u202egpj", r"a\u2028b\u202egpj"),
        ("a\0b\x7f", r"a\x00b\x7f"),
    ],
)
def test_only_what_does_harm_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable_lines(f"{text.replace(chr(10), ' ')}\n{text.replace(chr(10), ' ')}").count("\n") == 1


@pytest.fixture
def odd_names(tmp_path):
    """A set whose categories and files are called what no terminal should be sent."""
    folder = CocoFolder(tmp_path / "set", [(1, "月\x1b[2J"), (2, "two\nerror: lines")])
    for split in ("train", "val"):
        folder.fill(split, 4)
        folder.add(split, "gone 月\x1b[31m.jpg", None)
        folder.add(split, "gone\nerror: too.jpg", None)
        folder.add(split, "月.jpg", encoded())
    return folder.write()


KEYS = ["model.backbone_weights=none", "model.backbone_norm=batch", "eval.size=48"]


def test_output_goes_on_where_the_terminal_lacks_characters(odd_names, tmp_path):
    keys = [f"data.root={odd_names}", f"run.storage={tmp_path}/runs", *KEYS]
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    script = (
        "import sys\nfrom detr_ray import check, prepare\n"
        "codes = [check.main(sys.argv[1:]), prepare.main([*sys.argv[1:], '--shards', sys.argv[1][10:] + '-shards'])]\n"
        "sys.exit(codes != [1, 2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *keys],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=300,
    )
    said = (done.stdout + done.stderr).decode("ascii")
    assert done.returncode == 0, said
    assert "Traceback" not in said and "\x1b" not in said
    assert r"\u6708\x1b[2J" in said, "the category"
    assert r"gone \u6708\x1b[31m.jpg" in said and r"gone\nerror: too.jpg" in said
    assert [line for line in said.splitlines() if line.startswith("error:")] == said.splitlines()[-1:]


def test_names_are_kept_as_they_are_in_reports_for_programs(odd_names, tmp_path, capsys):
    from detr_ray.check import main

    report = tmp_path / "report.json"
    main([f"data.root={odd_names}", f"run.storage={tmp_path}/runs", *KEYS, "--json", str(report)])
    categories = json.loads(report.read_text())["splits"]["train"]["boxes_per_category"]
    assert [category["name"] for category in categories] == ["月\x1b[2J", "two\nerror: lines"]
    assert "\x1b" not in capsys.readouterr().out


def test_shortened_text_says_so() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abc..."
