"""The image of a cluster's nodes is pinned and has no root, and a job uploads little."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def check_dockerfile(text: str) -> None:
    steps = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    bases = [step.split()[1] for step in steps if step.startswith("FROM ")]
    users = [step.split()[1] for step in steps if step.startswith("USER ")]
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", bases[0]), "the base is not pinned"
    assert users, "the container would run as root"
    assert users[-1] not in ("root", "0")
    adding = next(step for step in steps if "useradd" in step).split("&&")[0]
    assert re.findall(r"--uid (\d+) .*\b(\w+)\s*$", adding) == [("1000", users[-1])]
    for install in (step for step in steps if "pip install" in step):
        assert "--constraint requirements.lock" in install, install
    for program in ("wget", "rsync", "openssh-client"):
        assert any(f" {program}" in step for step in steps if "apt-get install" in step), program
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for step in (step for step in steps if step.startswith("COPY ")):
        *sources, _ = [part for part in step.split()[1:] if not part.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            sent = any(source == name or source.startswith(f"{name}/") for name in kept)
            assert sent, f".dockerignore leaves {source} out"
    dependencies = next(n for n, step in enumerate(steps) if "requirements.lock ." in step)
    assert dependencies < next(n for n, step in enumerate(steps) if step == "COPY detr_ray detr_ray"), "no cached layer"


def test_the_image_is_pinned_and_has_no_root() -> None:
    check_dockerfile(DOCKERFILE)


@pytest.mark.parametrize(
    ("what", "instead"),
    [
        ("USER ray\n", ""),
        ("USER ray\n", "USER root\n"),
        ("--uid 1000", "--uid 999"),
        ("3.11.14-slim-bookworm", "slim"),
        ("--constraint requirements.lock .", "."),
        (" wget ", " "),
        ("COPY configs configs", "COPY docs docs"),
        ("COPY detr_ray/__init__.py detr_ray/", "COPY detr_ray detr_ray"),
    ],
)
def test_a_broken_dockerfile_is_refused(what: str, instead: str) -> None:
    assert what in DOCKERFILE
    with pytest.raises((AssertionError, StopIteration)):
        check_dockerfile(DOCKERFILE.replace(what, instead))


def locked_version(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found is not None, package
    return found[1]


def test_all_files_name_the_ray_that_is_locked_and_installed() -> None:
    import ray

    assert ray.__version__ == locked_version("ray")
    tags = {
        (path.name, tag)
        for path in CLUSTER.iterdir()
        if path.is_file()
        for tag in re.findall(r"detr_ray:(\d[\w.]*\d)", path.read_text())
    }
    assert {name for name, _ in tags} >= {
        "aws.yaml", "gcp.yaml", "kuberay-cluster.yaml", "kuberay-job.yaml", "Dockerfile", "README.md",
    }  # fmt: skip
    assert {tag for _, tag in tags} == {ray.__version__}


def upload_of(folder: Path, to: Path) -> tuple[int, set[str]]:
    """Size and files of what ``ray job submit --working-dir FOLDER`` uploads, by Ray's own function."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = to / "package.zip"
    package.unlink(missing_ok=True)
    create_package(
        str(folder), package, include_gitignore=True, excludes=get_runtime_env_default_excludes(),
        logger=logging.getLogger(__name__),
    )  # fmt: skip
    return package.stat().st_size, set(zipfile.ZipFile(package).namelist())


def test_a_job_uploads_the_package_and_the_recipes_only(tmp_path: Path) -> None:
    size, names = upload_of(ROOT, tmp_path)
    assert size < 4_000_000
    assert {name.split("/")[0] for name in names} == {"detr_ray", "configs"}
    sources = {str(path.relative_to(ROOT)) for kind in ("*.py", "*.html") for path in (ROOT / "detr_ray").rglob(kind)}
    assert sources | {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")} == names


def test_what_lies_beside_the_package_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    for name in ("detr_ray/train.py", "detr_ray/data/__init__.py", "configs/mine.yaml", "runs/a/model.pt", "coco/1.jpg",
                 "weights.pth", ".hidden/x", "tests/data/samples.py", "cluster/aws.yaml"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * 1000)
    assert len(upload_of(folder, tmp_path)[1]) == 9
    (folder / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    assert upload_of(folder, tmp_path)[1] == {"detr_ray/train.py", "detr_ray/data/__init__.py", "configs/mine.yaml"}
