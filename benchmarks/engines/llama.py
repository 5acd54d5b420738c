"""llama.cpp, for serve.py: the C interface, as llama-cpp-python binds it.

A token is one llama_decode and the largest of llama_get_logits_ith, found by NumPy. What llama.cpp chooses by itself
(flash attention, repacked weights, batches of 512) stays as it is.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

F16 = 1  # ggml_type


class Engine:
    wants_logits = False

    def __init__(self) -> None:
        lib.llama_backend_init()

    def load(self, file: str, threads: int, ctx: int, mmap: bool) -> dict[str, Any]:
        how = lib.llama_model_default_params()
        how.n_gpu_layers = 0
        how.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mmap else lib.LLAMA_LOAD_MODE_NONE
        self.model = lib.llama_model_load_from_file(file.encode(), how)
        if not self.model:
            raise SystemExit(f"{file}: llama.cpp cannot load it; its reasons are on stderr")
        asked = lib.llama_context_default_params()
        asked.n_ctx, asked.n_threads, asked.n_threads_batch = ctx, threads, threads
        asked.type_k = asked.type_v = F16
        self.ctx = lib.llama_init_from_model(self.model, asked)
        self.memory = lib.llama_get_memory(self.ctx)
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.n_batch = int(asked.n_batch)
        self.batch = lib.llama_batch_init(self.n_batch, 0, 1)
        info = lib.llama_print_system_info().decode()
        return {"version": f"of llama-cpp-python {lib.__version__}", "kv": "f16", "system": info}

    def quantize(self, source: str, out: str, ftype: int, head: int | None, threads: int) -> None:
        how = lib.llama_model_quantize_default_params()
        how.nthread, how.ftype = threads, ftype
        if head is not None:
            how.output_tensor_type = how.token_embedding_type = head
        if lib.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(how)):
            raise SystemExit(f"{source}: llama.cpp cannot quantize it; its reasons are on stderr")

    def prompt(self, ids: NDArray[np.int32]) -> int:
        lib.llama_memory_clear(self.memory, True)
        self.n = 0
        for begin in range(0, len(ids), self.n_batch):
            self._run(ids[begin : begin + self.n_batch].tolist())
        return int(self.last_logits().argmax())

    def step(self, token: int) -> int:
        self._run([token])
        return int(self.last_logits().argmax())

    def rewind(self, n: int) -> bool:
        self.n = n
        return bool(lib.llama_memory_seq_rm(self.memory, 0, n, -1))

    def last_logits(self) -> NDArray[np.float32]:
        row = lib.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(row, (self.n_vocab,))

    def _run(self, tokens: list[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, self.n + i, i == len(tokens) - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if failed := lib.llama_decode(self.ctx, batch):
            raise SystemExit(f"llama_decode of {len(tokens)} tokens at position {self.n} returned {failed}")
        self.n += len(tokens)
