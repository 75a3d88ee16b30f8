"""The resizing of images in ONNX's own operators, to be put before a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def resizing_graph(short: int, long: int, opset: int, ir_version: int) -> onnx.ModelProto:
    """Resizes an image to the model's input, as `resized_sizes` and `Picture.resize` do.

    Args:
        short: length of the resized short side, pixels.
        long: longest allowed long side, pixels.
        opset: of the model that follows.
        ir_version: likewise.

    Returns:
        ``image`` [H, W, 3] uint8 -> ``image_resized`` [1, 3, h, w] uint8 and ``image_size`` [2] int64 (H, W).
    """
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, values: Any, dtype: type) -> Any:
        return numpy_helper.from_array(np.array(values, dtype), f"image_{name}")

    def node(operator: str, inputs: str, output: str, **attributes: Any) -> Any:
        names = [f"image_{name}" if name != "image" and name else name for name in inputs.split(",")]
        return helper.make_node(operator, names, [f"image_{output}"], **attributes)

    nodes = [
        node("Shape", "image", "size", end=2),
        node("Cast", "size", "sides", to=TensorProto.DOUBLE),
        node("ReduceMin", "sides", "shortest", keepdims=1),
        node("ReduceMax", "sides", "longest", keepdims=1),
        # The short side; smaller if the long side would exceed its limit: rounded, half to even.
        node("Div", "longest,shortest", "aspect"),
        node("Mul", "aspect,short", "long_side"),
        node("Greater", "long_side,limit", "is_too_long"),
        node("Mul", "limit,shortest", "limited_product"),
        node("Div", "limited_product,longest", "limited_quotient"),
        node("Round", "limited_quotient", "limited_rounded"),
        node("Max", "limited_rounded,one", "limited"),
        node("Where", "is_too_long,limited,short", "new_short"),
        # The long side, rounded down; unchanged if the short side is.
        node("Mul", "new_short,longest", "long_product"),
        node("Div", "long_product,shortest", "long_quotient"),
        node("Floor", "long_quotient", "scaled_long"),
        node("Equal", "shortest,new_short", "is_unchanged"),
        node("Where", "is_unchanged,longest,scaled_long", "new_long"),
        node("Equal", "sides,shortest", "is_shortest"),
        node("Where", "is_shortest,new_short,new_long", "new_sides"),
        node("Cast", "new_sides", "new_size", to=TensorProto.INT64),
        node("Concat", "batch_and_channels,new_size", "new_shape", axis=0),
        node("Transpose", "image", "channels_first", perm=[2, 0, 1]),
        node("Unsqueeze", "channels_first,first_axis", "batch"),
        node(
            "Resize", "batch,,,new_shape", "resized", mode="linear", antialias=1,
            coordinate_transformation_mode="half_pixel", exclude_outside=1,
        ),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "resizing",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])],
        [
            helper.make_tensor_value_info(
                "image_resized", TensorProto.UINT8, [1, 3, "resized_height", "resized_width"]
            ),
            helper.make_tensor_value_info("image_size", TensorProto.INT64, [2]),
        ],
        [
            constant("short", [short], np.float64),
            constant("limit", [long], np.float64),
            constant("one", [1], np.float64),
            constant("batch_and_channels", [1, 3], np.int64),
            constant("first_axis", [0], np.int64),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
