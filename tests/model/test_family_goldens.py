"""Deformable DETR and DINO against the numbers of the published code: outputs, losses, matches, gradients, detections.

DINO's denoising queries start from the noise that was recorded there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_goldens import (
    BOXES,
    GRADIENT,
    LOGITS,
    LOSS,
    SCORES,
    TOTAL,
    FamilyGolden,
    family_config,
    load_family_golden,
    load_family_weights,
)  # fmt: skip
from torch import Tensor

from detr_ray.detector import postprocess
from detr_ray.loss import SetCriterion, build_criterion
from detr_ray.model import DetectionModel, build_model, deformable_detr, dino, published_state_dict
from detr_ray.model.denoising import DenoisingQueries
from detr_ray.model.proposals import best_cells
from detr_ray.structures import LayerOutput, ModelOutput


class Case:
    """A model with the case's weights, its output in training mode, and its criterion."""

    def __init__(self, golden: FamilyGolden) -> None:
        self.golden = golden
        config = family_config(golden)
        self.model: DetectionModel = build_model(config.model, golden.settings["num_classes"])
        load_family_weights(self.model, golden)
        self.criterion: SetCriterion = build_criterion(config, golden.settings["num_classes"])
        inputs = (golden.arrays["images"], golden.arrays["mask"], *denoising(golden))
        self.output: ModelOutput = self.model.train()(*inputs)


def denoising(golden: FamilyGolden) -> tuple[DenoisingQueries, ...]:
    """The recorded denoising queries, where there are any."""
    if "dn/labels" not in golden.arrays:
        return ()
    names = ("labels", "reference_logits", "groups")
    labels, logits, groups = (golden.arrays[f"dn/{name}"] for name in names)
    return (DenoisingQueries(labels, logits, int(groups)),)


@pytest.fixture(scope="module", params=["deformable_base", "deformable_two_stage", "dino_4scale"])
def case(request: pytest.FixtureRequest, shared_data: Path) -> Case:
    return Case(load_family_golden(shared_data, request.param))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def outputs_of(case: Case) -> dict[str, LayerOutput]:
    """Each of a case's predictions by the beginning of its names in the file."""
    outputs: dict[str, LayerOutput] = {}
    for start, output in {"": case.output, "dn/": case.output.get("dn_outputs")}.items():
        if output is not None:
            outputs |= {f"{start}aux{number}/": layer for number, layer in enumerate(output["aux_outputs"])}
            outputs[start] = output
    others = {"enc/": "enc_outputs", "interm/": "interm_outputs"}
    return outputs | {start: case.output[name] for start, name in others.items() if name in case.output}


def test_outputs_of_all_layers(case: Case) -> None:
    arrays, compared = case.golden.arrays, set()
    for start, output in outputs_of(case).items():
        logits = output["pred_logits"]
        parts = {"pred_boxes": output["pred_boxes"], "pred_logits": logits, "logits_channel0": logits[..., 0]}
        if start == "enc/":
            parts["logits_max"] = logits.amax(-1)
        for part, found in parts.items():
            if f"{start}{part}" in arrays:
                compared.add(f"{start}{part}")
                assert_close(found, arrays[f"{start}{part}"], BOXES if part == "pred_boxes" else LOGITS)
    recorded = {name for name in arrays if "pred_" in name and not name.startswith("eval/")}
    assert recorded <= compared


def test_chosen_cells_and_what_is_found_in_evaluation(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, noted = case.golden.arrays, []

    def noting(scores: Tensor, is_usable: Tensor, count: int) -> Tensor:
        noted.append((scores, best_cells(scores, is_usable, count)))
        return noted[-1][1]

    for module in (deformable_detr, dino):
        monkeypatch.setattr(module, "best_cells", noting)
    with torch.no_grad():
        output = case.model.eval()(arrays["images"], arrays["mask"])
    case.model.train()
    prefix = "eval/" if "eval/pred_logits" in arrays else ""
    assert_close(output["pred_logits"], arrays[f"{prefix}pred_logits"], LOGITS)
    assert_close(output["pred_boxes"], arrays[f"{prefix}pred_boxes"], BOXES)
    assert "dn_outputs" not in output and bool(noted) == ("enc/top" in arrays)
    for scores, chosen in noted:
        assert torch.equal(chosen, arrays["enc/top"])
        ranked_by = "enc/logits_max" if prefix else "enc/logits_channel0"
        assert_close(scores, arrays[ranked_by], LOGITS)


def test_losses_matches_and_gradients(case: Case) -> None:
    golden = case.golden
    for image, (queries, targets) in enumerate(case.criterion.matcher(case.output, golden.targets)):
        assert torch.equal(queries, golden.arrays[f"match{image}/query"])
        assert torch.equal(targets, golden.arrays[f"match{image}/target"])
    losses = case.criterion(case.output, golden.targets)
    assert {name for name in losses if name.startswith("loss_")} == golden.losses.keys()
    for name, value in golden.losses.items():
        assert losses[name].item() == pytest.approx(value, rel=LOSS), name
    assert case.criterion.weights == golden.described["loss_weights"]
    total = case.criterion.total(losses)
    assert total.item() == pytest.approx(float(golden.arrays["total"]), rel=TOTAL)

    case.model.zero_grad()
    total.backward()
    found = {name: p.grad.norm().item() for name, p in case.model.named_parameters() if p.grad is not None}
    expected = golden.described["grad_norms"]
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(expected.values())
    for name, norm in expected.items():
        if norm > floor:
            assert found[name] == pytest.approx(norm, rel=GRADIENT), name


def test_detections_are_the_best_scores_over_queries_and_classes(case: Case) -> None:
    arrays = case.golden.arrays
    sizes = torch.tensor([[480, 640]]).expand(len(arrays["images"]), 2)
    for image, found in enumerate(postprocess(case.output, sizes, case.criterion.class_loss)):
        scores = arrays[f"post{image}/scores"]
        assert_close(found["scores"], scores, SCORES)
        gaps = (scores[:-1] - scores[1:]).abs() > SCORES
        clear = torch.cat((gaps, gaps.new_zeros(1))) & torch.cat((gaps.new_ones(1), gaps))
        assert clear.any()
        assert torch.equal(found["labels"][clear], arrays[f"post{image}/labels"][clear])
        assert_close(found["boxes"][clear], arrays[f"post{image}/boxes"][clear], BOXES * 640 * 2)


def test_the_published_names_are_given_back(case: Case) -> None:
    described = case.golden.described
    state = published_state_dict(case.model)
    assert {name: list(value.shape) for name, value in state.items()} == described["state_dict"]
    for twin, name in described["same_tensor"].items():
        assert torch.equal(state[twin], state[name])
