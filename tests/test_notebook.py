"""The notebook runs, prints the numbers of the text that it retells, and lies in git without outputs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "explore.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]

# What a reader of the original code sees in a debugger, for an image whose features have 34 rows.
ANGLES = [
    0.1848, 0.3696, 0.5544, 0.7392, 0.9240, 1.1088, 1.2936, 1.4784, 1.6632, 1.8480, 2.0328, 2.2176, 2.4024, 2.5872,
    2.7720, 2.9568, 3.1416, 3.3264, 3.5112, 3.6960, 3.8808, 4.0656, 4.2504, 4.4352, 4.6200, 4.8048, 4.9896, 5.1744,
    5.3592, 5.5440, 5.7288, 5.9136, 6.0984, 6.2832,
]  # fmt: skip
HALF_A_WAVE = [0.1837, 0.3612, 0.5264, 0.6737, 0.7980, 0.8952, 0.9618, 0.9957]
WAVE = [*HALF_A_WAVE, *HALF_A_WAVE[::-1], 0.0, *(-x for x in HALF_A_WAVE), *(-x for x in HALF_A_WAVE[::-1]), 0.0]
LAST_CHANNEL = [
    0.0000, 0.0000, 0.0001, 0.0001, 0.0001, 0.0001, 0.0001, 0.0002, 0.0002, 0.0002, 0.0002, 0.0003, 0.0003, 0.0003,
    0.0003, 0.0003, 0.0004, 0.0004, 0.0004, 0.0004, 0.0004, 0.0005, 0.0005, 0.0005, 0.0005, 0.0006, 0.0006, 0.0006,
    0.0006, 0.0006, 0.0007, 0.0007, 0.0007, 0.0007,
]  # fmt: skip
BOXES_OF_IMAGE_9 = [
    [0.5205, 0.6888, 0.9556, 0.5955], [0.2635, 0.2472, 0.4989, 0.4764], [0.3629, 0.7329, 0.4941, 0.5106],
    [0.6606, 0.4189, 0.6789, 0.7815], [0.3532, 0.1326, 0.1180, 0.0969], [0.2269, 0.1298, 0.0907, 0.0972],
    [0.3317, 0.2269, 0.1313, 0.1469], [0.3571, 0.0792, 0.1481, 0.1481],
]  # fmt: skip
LOSSES = {
    name + suffix
    for suffix in ("", "_0", "_1", "_2", "_3", "_4")
    for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
} | {"class_error"}


@pytest.fixture(scope="module")
def run() -> Iterator[tuple[dict[str, Any], str]]:
    """The cells in this process, with few training steps: their variables, and what they print."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "Agg")
        patch.chdir(NOTEBOOK.parent)
        import matplotlib.pyplot as plt
        import torch

        before = plt.get_backend(), torch.get_default_dtype()
        plt.switch_backend("Agg")
        variables: dict[str, Any] = {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for cell in CODE:
                exec(compile(cell.replace("\nSTEPS = 80\n", "\nSTEPS = 3\n"), str(NOTEBOOK), "exec"), variables)
        yield variables, printed.getvalue()
        plt.close("all")
        plt.switch_backend(before[0])
        torch.set_printoptions(profile="default")


def test_it_lies_in_git_without_outputs() -> None:
    assert len(CODE) > 15
    for cell in CELLS:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_an_image_of_coco_has_the_originals_boxes(run: tuple[dict[str, Any], str]) -> None:
    variables, printed = run
    image = variables["image_9"]
    assert image.size == (736, 981) and image.labels.tolist() == [51, 51, 56, 51, 55, 55, 55, 55]
    np.testing.assert_allclose(image.boxes_cxcywh(), BOXES_OF_IMAGE_9, atol=5.1e-5)
    assert "[0.5205 0.6888 0.9556 0.5955]" in printed and "labels [51 51 56 51 55 55 55 55]" in printed
    assert "area of the first 282171.78" in printed


def test_the_position_embedding_has_the_originals_numbers(run: tuple[dict[str, Any], str]) -> None:
    variables, printed = run
    rows, angle, of_rows = (variables[name].numpy() for name in ("rows", "angle", "of_rows"))
    assert rows.shape == (1, 34, 26) and not rows[0, :, 24:].any() and (rows[0, :, :24] > 0).all()
    np.testing.assert_allclose(rows[0, :, 0], ANGLES, atol=5.1e-5)
    np.testing.assert_allclose(angle[0, :, 0, 0], ANGLES, atol=5.1e-5)
    np.testing.assert_allclose(angle[0, :, 0, 127], LAST_CHANNEL, atol=5.1e-5)
    np.testing.assert_allclose(of_rows[0, :, 0, 0], WAVE, atol=5.1e-5)
    np.testing.assert_allclose(of_rows[0, :, 0, 126], LAST_CHANNEL, atol=5.1e-5)
    wavelengths = variables["wavelengths"].numpy()
    np.testing.assert_allclose(wavelengths[:8], [1, 1, 1.1548, 1.1548, 1.3335, 1.3335, 1.5399, 1.5399], atol=5.1e-5)
    np.testing.assert_allclose(wavelengths[-4:], [7498.9419, 7498.9419, 8659.6426, 8659.6426], rtol=1e-6)
    for shown in ("[ 1.,  1.,  1.,  ...,  1.,  0.,  0.]", "[34., 34., 34.,  ..., 34.,  0.,  0.]", "0.1848, 0.1848",
                  "6.2832, 6.2832", "0.1837,", "0.3612,", "0.5264,", "0.6737,", "8659.64"):  # fmt: skip
        assert shown in printed, shown
    assert "shape [1, 34, 26, 256] - the same: True" in printed


def test_the_published_model_has_the_shapes_that_are_told(run: tuple[dict[str, Any], str]) -> None:
    printed = run[1]
    shapes = re.findall(r"^(\S.*?) +\[([\d, ]+)\]", printed[printed.index("41.5 million parameters") :], re.MULTILINE)
    told = [(what.strip(), shape) for what, shape in shapes][:12]
    assert told[0] == ("images", "2, 3, 1063, 813") and told[1] == ("backbone: features", "2, 2048, 34, 26")
    assert ("as a sequence", "2, 884, 256") in told and ("encoder", "2, 884, 256") in told
    assert ("decoder, every layer", "6, 2, 100, 256") in told
    assert ("classes, of the last layer", "2, 100, 92") in told and ("boxes, of the last layer", "2, 100, 4") in told


def test_what_is_done_by_hand_is_what_the_parts_do(run: tuple[dict[str, Any], str]) -> None:
    variables, printed = run
    assert printed.count("the same: True") == 2 and "the same: False" not in printed
    assert variables["by_matcher"][0].tolist() == variables["by_hand"][0].tolist()
    assert variables["by_matcher"][1].tolist() == variables["by_hand"][1].tolist()
    weights, allowed = variables["weights"], variables["allowed"]
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(variables["looks"].sum((-1, -2)), 1, atol=1e-5)
    on_padding = weights.masked_select(~allowed.expand_as(weights))
    assert len(on_padding) and not on_padding.any()


def test_there_are_25_losses_of_which_18_are_in_the_sum(run: tuple[dict[str, Any], str]) -> None:
    variables, printed = run
    assert "\n25 values, 18 in the sum\n" in printed
    assert set(variables["losses"]) == LOSSES
    total, by_hand = re.search(r"^loss ([\d.]+) - by hand ([\d.]+)$", printed, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert math.isclose(float(total), float(by_hand), rel_tol=1e-5)


@pytest.mark.slow  # a kernel of its own, and all training steps
def test_it_runs_in_a_kernel_from_a_clean_state_and_learns_its_images() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", texts, re.MULTILINE)]
    assert len(pictures) >= 7 and losses[-1] < losses[0] / 4, losses
    assert not [output for output in outputs if output.output_type == "error"]
