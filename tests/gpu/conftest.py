"""What the tests of the GPU share.

Each test is written for any device. On the CPU it is part of the default suite, where it shows that the test itself is
right; on a GPU it is marked ``gpu`` and run by ``make test-gpu``. These files import nothing but torch, torchvision,
scipy, numpy, pydantic, PyYAML, Pillow and pytest, so that a machine with a GPU needs no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

REASON = f"torch {torch.__version__} finds no CUDA device on this machine"
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON))
SHOWN = pytest.StashKey[list[str]]()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


PLACES = [("cpu", "fp32"), ("cpu", "bf16"), ("cuda", "fp32"), ("cuda", "bf16"), ("cuda", "fp16")]  # fp16 needs a GPU


@pytest.fixture(
    params=[pytest.param(place, id="-".join(place), marks=ON_GPU * (place[0] == "cuda")) for place in PLACES]
)
def placed(request: pytest.FixtureRequest) -> tuple[torch.device, str]:
    """A device, and a precision that it has."""
    return torch.device(request.param[0]), request.param[1]


@pytest.fixture(params=[pytest.param("cuda", marks=ON_GPU)])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, for what the CPU has nothing of."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _exact_arithmetic() -> Iterator[None]:
    """fp32 is fp32: TF32, which keeps 10 bits of each factor, is off."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Shows a measured figure at the end of the run; figures are never asserted."""
    return request.config.stash.setdefault(SHOWN, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(SHOWN, []):
        terminalreporter.write_line(line)
    skipped = sum(REASON in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"NOTHING RAN ON A GPU: {skipped} tests were skipped, since {REASON}")
    elif "not gpu" in str(config.option.markexpr):
        why = "" if torch.cuda.is_available() else f" ({REASON})"
        terminalreporter.write_line(f"tests on a GPU are left out here, and run by `make test-gpu`{why}")
