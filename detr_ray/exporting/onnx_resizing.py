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
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [*_side_nodes(), *_pixel_nodes()],
        "resizing",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])],
        [
            helper.make_tensor_value_info(
                "image_resized", TensorProto.UINT8, [1, 3, "resized_height", "resized_width"]
            ),
            helper.make_tensor_value_info("image_size", TensorProto.INT64, [2]),
        ],
        [
            _constant("short", [short], np.float64),
            _constant("limit", [long], np.float64),
            _constant("one", [1], np.float64),
            _constant("batch_and_channels", [1, 3], np.int64),
            _constant("first_axis", [0], np.int64),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def _side_nodes() -> list[onnx.NodeProto]:
    """From ``image`` and the wanted sides to the new size, in whole pixels."""
    from onnx import TensorProto

    return [
        _node("Shape", "image", "size", end=2),
        _node("Cast", "size", "sides", to=TensorProto.DOUBLE),
        _node("ReduceMin", "sides", "shortest", keepdims=1),
        _node("ReduceMax", "sides", "longest", keepdims=1),
        # The short side; smaller if the long side would exceed its limit: rounded, half to even.
        _node("Div", "longest,shortest", "aspect"),
        _node("Mul", "aspect,short", "long_side"),
        _node("Greater", "long_side,limit", "is_too_long"),
        _node("Mul", "limit,shortest", "limited_product"),
        _node("Div", "limited_product,longest", "limited_quotient"),
        _node("Round", "limited_quotient", "limited_rounded"),
        _node("Max", "limited_rounded,one", "limited"),
        _node("Where", "is_too_long,limited,short", "new_short"),
        # The long side, rounded down; unchanged if the short side is.
        _node("Mul", "new_short,longest", "long_product"),
        _node("Div", "long_product,shortest", "long_quotient"),
        _node("Floor", "long_quotient", "scaled_long"),
        _node("Equal", "shortest,new_short", "is_unchanged"),
        _node("Where", "is_unchanged,longest,scaled_long", "new_long"),
        _node("Equal", "sides,shortest", "is_shortest"),
        _node("Where", "is_shortest,new_short,new_long", "new_sides"),
        _node("Cast", "new_sides", "new_size", to=TensorProto.INT64),
    ]


def _pixel_nodes() -> list[onnx.NodeProto]:
    """From ``image`` and its new size to the resized pixels."""
    return [
        _node("Concat", "batch_and_channels,new_size", "new_shape", axis=0),
        _node("Transpose", "image", "channels_first", perm=[2, 0, 1]),
        _node("Unsqueeze", "channels_first,first_axis", "batch"),
        _node(
            "Resize", "batch,,,new_shape", "resized", mode="linear", antialias=1,
            coordinate_transformation_mode="half_pixel", exclude_outside=1,
        ),
    ]  # fmt: skip


def _node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    """An operator; ``inputs`` are names that commas part, and an empty one is left out."""
    from onnx import helper

    names = [f"image_{name}" if name != "image" and name else name for name in inputs.split(",")]
    return helper.make_node(operator, names, [f"image_{output}"], **attributes)


def _constant(name: str, values: Any, dtype: type) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(values, dtype), f"image_{name}")
