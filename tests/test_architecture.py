"""The engine runs without Ray and MLflow, and files can be read in one sitting."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.seams import MODULES, TESTS

from detr_ray.config import ConfigError
from detr_ray.runtime.ray_internals import Internal

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


FEW_PACKAGES = """
import sys
from importlib.machinery import PathFinder

# torch's own requirements are there wherever torch is, and pytest's with pytest.
there = {
    "torch", "torchgen", "functorch", "torchvision", "scipy", "numpy", "pydantic", "pydantic_core", "annotated_types",
    "typing_inspection", "yaml", "_yaml", "PIL",
    "typing_extensions", "filelock", "fsspec", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "triton",
    "nvidia", "cuda", "setuptools", "pkg_resources", "_distutils_hack",
    "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py",
    "detr_ray", "benchmarks", "conftest", "drawn", "planned_memory", "torch_c_dlpack_ext",
}
find = PathFinder.find_spec

def find_few(finder, name, path=None, target=None):
    top = name.split(".")[0]
    if top in sys.stdlib_module_names or top in there or top.startswith(("test_gpu", "__editable__", "_")):
        return find(name, path, target)
    return None

PathFinder.find_spec = classmethod(find_few)
try:
    import pyarrow
except ModuleNotFoundError:
    pass
else:
    sys.exit("packages are not kept away")
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_tests_of_the_gpu_need_few_packages() -> None:
    """All of their modules are imported; on the CPU, the loop and a step run as well."""
    done = subprocess.run(
        [
            sys.executable, "-c", FEW_PACKAGES, "tests/gpu", "-q", "-p", "no:cacheprovider", "--no-header", "-k",
            "cpu and (bf16 and (run_ends or steps_are) or losses_matchings) or plan_counts",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b4 passed", done.stdout), done.stdout


def imported(source: str) -> set[str]:
    """Dotted names of what a source file imports, at its top or later."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_rays_own(name: str) -> bool:
    parts = name.split(".")
    return (
        parts[0] == "ray"
        and not name.startswith("ray.autoscaler.sdk")
        and (
            any(part.startswith("_") for part in parts)
            or name.startswith(("ray.core", "ray.autoscaler", "ray.experimental"))
        )
    )


def test_one_module_alone_imports_what_ray_does_not_promise() -> None:
    assert (
        is_rays_own("ray.train.v2._internal.x") and is_rays_own("ray._private") and not is_rays_own("ray.train.v2.api")
    )
    found = {path.name: imported(path.read_text()) for path in (ROOT / "detr_ray").rglob("*.py")}
    private = {name: own for name, names in found.items() if (own := [one for one in names if is_rays_own(one)])}
    assert private == {}, "say in runtime/ray_internals.py what it is for, and import it from there"


def test_another_ray_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from detr_ray.runtime import ray_internals

    ray_internals.refuse_other_ray()
    gone = (Internal("ray.train.v2._internal.gone", "Gone"), Internal("ray", "init", ("a_parameter_that_is_gone",)))
    monkeypatch.setattr(ray_internals, "INTERNALS", (*ray_internals.INTERNALS, *gone))
    monkeypatch.setitem(ray_internals._MODULES, "Gone", gone[0].module)
    with pytest.raises(ConfigError, match=r"install ray==2\.60\."):
        ray_internals.Gone  # noqa: B018 - as an import of it would
    with pytest.raises(ConfigError) as refused:
        ray_internals.refuse_other_ray()
    assert "(ray.train.v2._internal.gone.Gone, ray.init); install ray==2.60.*" in str(refused.value)


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "detr_ray").rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def test_mutants_are_made_of_modules_that_there_are() -> None:
    assert [name for name in (*MODULES, *TESTS) if not (ROOT / name).exists()] == []


def test_the_page_on_architecture_names_what_there_is() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    names = re.findall(r"`([^`]+)`", page)
    folders = [name for name in names if re.fullmatch(r"[a-z_/]+(\.py|/)", name)]
    classes = [name for name in names if re.fullmatch(r"[A-Z][A-Za-z]+", name)]
    assert len(folders) > 15 and len(classes) > 20
    code = "\n".join(path.read_text() for path in (ROOT / "detr_ray").rglob("*.py"))
    absent = [name for name in folders if not any((base / name).exists() for base in (ROOT / "detr_ray", ROOT))]
    absent += [name for name in classes if not re.search(rf"^class {name}\b", code, re.MULTILINE)]
    assert [name for name in absent if name != "__init__.py"] == []
