"""In: `demo`, a folder or a hub id. Out: config, tensors not yet read, tokenizer. Knows no model."""

from .folder import Checkpoint, open_checkpoint
from .tensor import Tensor
from .tokenizer import Tokenizer, TokenStream

__all__ = ["Checkpoint", "Tensor", "TokenStream", "Tokenizer", "open_checkpoint"]
