"""OpenVINO, for serve.py: the stateful model that OpenVINO GenAI runs, through an InferRequest that gives its logits.

    python openvino_ir.py FOLDER OUT bf16|int8|int4 GROUP    exports one with optimum-intel: of bf16 as fp16, int8
                                                             with a scale per row, int4 with one per GROUP elements

Its cache has bf16 elements here, as its attention computes, where by default it has u8. It cannot be cut back, so that
a prompt is run again before every measurement, outside of the time.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as opset


class Engine:
    wants_logits = False

    def load(self, file: str, threads: int, ctx: int) -> dict[str, Any]:
        core = ov.Core()
        model = core.read_model(file)
        _last_position_only(model)
        constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "KV_CACHE_PRECISION": "bf16",
        }
        compiled = core.compile_model(model, "CPU", config)
        self.request = compiled.create_infer_request()
        self.names = {name for port in compiled.inputs for name in port.names}
        return {
            "version": ov.__version__,
            "weight_bytes": sum(map(_matrix_bytes, constants)),
            "kv": str(compiled.get_property("KV_CACHE_PRECISION")),
            "arithmetic": str(compiled.get_property("INFERENCE_PRECISION_HINT")),
        }

    def prompt(self, ids: NDArray[np.int32]) -> int:
        self.request.reset_state()
        self.n = 0
        return self._run(ids[None].astype(np.int64))

    def step(self, token: int) -> int:
        return self._run(np.array([[token]], np.int64))

    def rewind(self, n: int) -> bool:
        return False

    def last_logits(self) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self.request.get_tensor("logits").data[0, -1]
        return row

    def _run(self, ids: NDArray[np.int64]) -> int:
        n = ids.shape[1]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((1, self.n + n), np.int64),
            "position_ids": np.arange(self.n, self.n + n)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: value for name, value in inputs.items() if name in self.names}, share_inputs=True)
        self.n += n
        return int(self.last_logits().argmax())


def _matrix_bytes(constant: ov.Node) -> int:
    """Of weights and their scales; 0 for norms, biases and whatever else is a row of numbers."""
    shape, bits = list(constant.output(0).shape), constant.output(0).get_element_type().bitwidth
    n = int(np.prod(shape))
    return 0 if not shape or shape[-1] == n else n * bits // 8


def _last_position_only(model: ov.Model) -> None:
    """The head computes one row of a prompt, as GenAI has it, not all."""
    node = model.output("logits").node
    while node.get_type_name() != "MatMul":
        node = node.input(0).get_source_output().get_node()
    source = node.input(0).get_source_output()
    minus_1, minus_2, axis = (opset.constant(np.array([i], np.int64)) for i in (-1, -2, 1))
    node.input(0).replace_source_output(opset.slice(source, minus_1, minus_2, minus_1, axis).output(0))
    model.validate_nodes_and_infer_types()


def export(folder: str, out: str, fmt: str, group: str) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    quantized = {
        "bf16": None,
        "int8": OVWeightQuantizationConfig(bits=8, sym=True),
        "int4": OVWeightQuantizationConfig(bits=4, sym=True, group_size=int(group), ratio=1.0),
    }[fmt]
    model = OVModelForCausalLM.from_pretrained(
        folder, export=True, compile=False, load_in_8bit=False, quantization_config=quantized
    )
    model.save_pretrained(out)


if __name__ == "__main__":
    export(*sys.argv[1:])
