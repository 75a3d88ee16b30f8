"""What the check command finds, for its tests."""

from __future__ import annotations

SMALL = [
    "model.backbone=resnet18", "model.backbone_norm=batch", "model.backbone_weights=none", "model.hidden_dim=32",
    "model.dim_feedforward=32", "model.encoder_layers=1", "model.decoder_layers=1", "model.num_queries=10",
    "data.augment.scales=[48]", "data.augment.crop=0", "eval.size=48", "train.global_batch_size=4",
    "train.num_workers=2", "train.epochs=10000",
]  # fmt: skip


class Outcome:
    """What a run of the command gave."""

    def __init__(self, code: int, out: str, report: dict) -> None:
        self.code, self.out, self.report = code, out, report

    def messages(self, level: str, area: str | None = None) -> list[str]:
        return [
            f"{finding['message']} | {finding['advice']}"
            for finding in self.report["findings"]
            if finding["level"] == level and area in (None, finding["area"])
        ]

    def only(self, level: str, area: str) -> str:
        (message,) = self.messages(level, area)
        return message
