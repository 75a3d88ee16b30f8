"""The error of predictions for which no loss can be computed.

The training loop decides whether the step is skipped or the run ends; it also knows image ids, step and learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence


class NonFiniteOutputs(ArithmeticError):  # noqa: N818 - the name says what was found, and the loop catches it by that
    """Predictions hold NaN or infinity.

    Attributes:
        image_indices: places in the micro-batch (0 first) of the images whose predictions are bad, ascending.
        layers: decoder layers (0 first) that gave bad predictions for any of them, ascending.
        parts: which predictions are bad: ``"logits"``, ``"boxes"`` or both.
    """

    def __init__(self, image_indices: Sequence[int], layers: Sequence[int], parts: Sequence[str] = ()) -> None:
        self.image_indices = tuple(image_indices)
        self.layers = tuple(layers)
        self.parts = tuple(parts)
        super().__init__(self.image_indices, self.layers, self.parts)

    def __str__(self) -> str:
        parts = " and ".join(self.parts) or "outputs"
        return (
            f"the model's {parts} are not finite for image(s) {list(self.image_indices)} of the micro-batch, "
            f"in decoder layer(s) {list(self.layers)}"
        )
