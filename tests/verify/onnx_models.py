"""ONNX files written by hand."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

QONNX = "qonnx.custom_op.general"


def model(path, nodes, constants, shape, out_shape, metadata=None, batch=1, dtype=TensorProto.FLOAT):
    """Writes a network of one input x and one output y."""
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "network",
            [helper.make_tensor_value_info("x", dtype, [batch, *shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, *out_shape])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(QONNX, 2)],
        ir_version=10,
    )
    if metadata is not None:
        helper.set_model_props(made, {"qflax": json.dumps(metadata)})
    onnx.save(made, path)
    return path
