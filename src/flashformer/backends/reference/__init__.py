"""CheckedProgram + tensors in, tokens and logits out, in NumPy: the living definition of every op."""

from .kernel import ReferenceKernel

__all__ = ["ReferenceKernel"]
