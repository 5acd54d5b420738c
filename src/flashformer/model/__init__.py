"""In: a checkpoint's names and config. Out: ModelSpec and weights by role. The last place that knows families."""

from .config import read_family, read_spec
from .load import Model, load_model, random_model
from .random import shape_config, shape_names
from .rope import rope_table
from .spec import Activation, LayerSpec, ModelSpec, QkNorm, RopeKind, RopeSpec
from .tensors import bind

__all__ = [
    "Activation",
    "LayerSpec",
    "Model",
    "ModelSpec",
    "QkNorm",
    "RopeKind",
    "RopeSpec",
    "bind",
    "load_model",
    "random_model",
    "read_family",
    "read_spec",
    "rope_table",
    "shape_config",
    "shape_names",
]
