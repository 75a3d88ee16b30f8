"""The engine runs without Ray and MLflow, and files can be read in one sitting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "mlflow"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, "tests")
from pathlib import Path
from tiny import fit_here, make_dataset, tiny_config
folder = Path(sys.argv[1])
dataset = make_dataset(folder / "data", num_train=8, num_val=2)
print(fit_here(tiny_config(dataset, folder / "runs", "train.epochs=1")).status)
"""


def test_a_model_is_trained_and_evaluated_where_ray_and_mlflow_are_absent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "finished", done.stderr


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "detr_ray").rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}
