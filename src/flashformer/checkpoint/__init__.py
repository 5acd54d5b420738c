"""In: `demo`, a folder or a hub id. Out: config, weights not yet read, tokenizer. Knows no model."""

from .folder import Checkpoint, open_checkpoint
from .packed import PackedFormats, PackedWeights
from .tensor import Tensor
from .token_stream import TokenStream
from .tokenizer import Tokenizer

__all__ = ["Checkpoint", "PackedFormats", "PackedWeights", "Tensor", "TokenStream", "Tokenizer", "open_checkpoint"]
