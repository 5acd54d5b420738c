"""transformers with PyTorch, not compiled, for serve.py: `model.forward` over a DynamicCache in the weights' dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache


class Engine:
    wants_logits = False

    def load(self, folder: str, threads: int, ctx: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        head = self.model.get_output_embeddings().weight
        layers = [p for name, p in self.model.named_parameters() if p.ndim == 2 and ".layers." in name]
        return {
            "version": f"{transformers.__version__}, torch {torch.__version__}",
            "weight_bytes": sum(p.numel() * p.element_size() for p in [head, *layers]),
            "weights": "bf16",
            "kv": "bf16",
        }

    def prompt(self, ids: NDArray[np.int32]) -> int:
        self.cache = DynamicCache(config=self.model.config)
        return self._run(torch.from_numpy(ids.astype(np.int64))[None])

    def step(self, token: int) -> int:
        return self._run(torch.tensor([[token]]))

    def rewind(self, n: int) -> bool:
        if surplus := self.cache.get_seq_length() - n:
            self.cache.crop(-surplus)
        return True

    def last_logits(self) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self.logits.float().numpy()
        return row

    def _run(self, ids: torch.Tensor) -> int:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.logits = out.logits[0, -1]
        return int(self.logits.argmax())
