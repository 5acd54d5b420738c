"""Trains the demo model from the Python standard library's source and writes it as a Hugging Face folder.

    python tools/train_demo.py --work DIR --out src/flashformer/demo [--tokens 30.1e6] [--threads 2]

About 4.2 M parameters, Llama architecture, byte-level BPE of 2048 tokens. The state goes to DIR every few
minutes; the same command resumes it. Batches depend only on (seed, step), so a resumed run sees what an
uninterrupted one would. Of the last POLISH_STEPS steps every POLISH_EVERYth teaches the model out of loops: it makes
greedy text and lowers the probability of what that repeats (Welleck et al. 2020, unlikelihood training).

Needs torch, tokenizers, safetensors and a C++ compiler (torch.compile).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import demo_corpus
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from demo_model import (
    D_FF,
    D_MODEL,
    HEAD_DIM,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    N_POS,
    NORM_EPS,
    ROPE_THETA,
    VOCAB_SIZE,
    Cache,
    Llama,
)
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

BATCH, PEAK_LR, WARMUP_STEPS, COOLDOWN, WEIGHT_DECAY, SEED = 8, 3e-3, 200, 0.4, 0.1, 20261121
SPECIALS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"]
BOS, EOS = 0, 1
POLISH_STEPS, POLISH_EVERY, POLISH_LR, POLISH_TOKENS, REPEATED = 400, 3, 5e-4, 112, 10

# Words, numbers and punctuation keep the space that follows them, so that a prompt such as "def " ends
# on a whole token; indentation is a token of its own.
PIECES = r"\n+| +|[A-Za-z_]+ ?|[0-9]{1,3} ?|[^\sA-Za-z0-9_]+ ?|\s"


# ---- data ---------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return tok


class Data:
    """All training files as one token stream, and the places where a sample may begin (line starts)."""

    def __init__(self, tok: Tokenizer, texts: dict[demo_corpus.File, str]) -> None:
        files = list(texts)
        encoded = tok.encode_batch([texts[f] for f in files])
        stream: list[int] = []
        line_starts: list[int] = []
        top_starts: list[int] = []
        vocab = [tok.decode([i], skip_special_tokens=False) for i in range(tok.get_vocab_size())]
        newline = np.array([set(v) == {"\n"} for v in vocab])
        indent = np.array([v.startswith(" ") for v in vocab])
        for file, enc in zip(files, encoded, strict=True):
            ids = np.array([*enc.ids[1:], EOS, BOS])
            begins = np.concatenate([[0], np.flatnonzero(newline[ids[:-3]]) + 1])
            weight = 1 if file.is_test else 2  # the library proper is seen twice as often as its tests
            line_starts += (begins + len(stream)).tolist() * weight
            top_starts += (begins[~indent[ids[begins]]] + len(stream)).tolist() * weight
            stream += ids.tolist()
        self.stream = torch.tensor(stream + stream[: N_POS + 1])
        self.starts = [torch.tensor(line_starts), torch.tensor(top_starts)]

    def batch(self, step: int) -> Tensor:  # (BATCH, N_POS + 1) int64
        rng = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        rows = []
        for i in range(BATCH):
            starts = self.starts[i % 2]
            begin = int(starts[int(torch.randint(len(starts), (1,), generator=rng))])
            rows.append(torch.cat([torch.tensor([BOS]), self.stream[begin : begin + N_POS]]))
        return torch.stack(rows)


# ---- losses -----------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def bits_per_byte(model: nn.Module, tok: Tokenizer, texts: list[str], limit_bytes: int) -> float:
    """Held-out text in windows of N_POS tokens behind a BOS each, total bits over total bytes."""
    bits, n_bytes = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = tok.encode(text).ids[1:]
            for begin in range(0, len(ids), N_POS):
                window = torch.tensor([[BOS, *ids[begin : begin + N_POS]]])
                bits += float(loss_of(model, window).detach()) * (window.shape[1] - 1) / math.log(2)
            n_bytes += len(text)
            if n_bytes > limit_bytes:
                break
    return bits / n_bytes


# ---- polish: fewer loops in greedy text -----------------------------------------------------------------


def greedy(model: Llama, prefix: Tensor, n: int) -> Tensor:
    """(b, t) -> (b, t + n)."""
    cache, ids, fed = Cache(), prefix, 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(n):
            logits = model(ids[:, fed:], fed, cache)
            fed = ids.shape[1]
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


def repeats(ids: Tensor, begin: int) -> Tensor:
    """(b, t) bool: tokens from `begin` on that complete a REPEATED-gram which the row already holds."""
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        seen = set()
        for end in range(REPEATED, len(tokens) + 1):
            gram = tuple(tokens[end - REPEATED : end])
            mask[row, end - 1] = end > begin and gram in seen
            seen.add(gram)
    return mask


def unlikelihood(model: Llama, data: Data, step: int) -> Tensor:
    """Sequence-level unlikelihood (Welleck et al. 2020): -log(1 - p) of tokens that repeat in greedy text."""
    rng = torch.Generator().manual_seed(SEED * 1_000_003 - 1 - step)
    length = int(torch.randint(2, 24, (1,), generator=rng))
    prefix = torch.cat([data.batch(-1 - step), data.batch(-1_000_000 - step)])[:, :length]
    ids = greedy(model, prefix, POLISH_TOKENS)
    mask = repeats(ids, length)[:, 1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1])
    p = logits.float().softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    loss = -torch.log((1 - p).clamp_min(1e-3)) * mask
    return loss.sum() / mask.numel()


# ---- training -----------------------------------------------------------------------------------------


def learning_rate(step: int, n_steps: int) -> float:
    """Warm-up, plateau, linear cool-down to zero; then once more from POLISH_LR to zero."""
    if step >= n_steps:
        return POLISH_LR * (1 - (step - n_steps) / POLISH_STEPS)
    return PEAK_LR * min((step + 1) / WARMUP_STEPS, 1.0, (n_steps - step) / (COOLDOWN * n_steps))


def write_state(path: Path, model: Any, optimizer: Any, step: int, seconds: float) -> None:
    """What training goes on from, as one safetensors file: `model.NAME`, `optimizer.INDEX.NAME`."""
    tensors = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.clone() for name, value in values.items()}
    aside = path.with_suffix(".tmp")
    save_file(tensors, str(aside), metadata={"step": str(step), "seconds": str(seconds)})
    aside.rename(path)


def read_state(path: Path, model: Any, optimizer: Any) -> tuple[int, float]:
    """Loads what `write_state` wrote; gives step and seconds."""
    with safe_open(str(path), "pt") as file:
        names, metadata = file.keys(), file.metadata()
        tensors = {name: file.get_tensor(name) for name in names}
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, part = name.split(".")
            state.setdefault(int(index), {})[part] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), float(metadata["seconds"])


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    files = demo_corpus.pinned_files()
    texts = demo_corpus.read_files([f for f in files if not f.held_out], strict=True)
    held_out = list(demo_corpus.read_files([f for f in files if f.held_out], strict=True).values())
    tok_path = work / "tokenizer.json"
    if not tok_path.exists():
        train_tokenizer(list(texts.values())).save(str(tok_path))
    tok = Tokenizer.from_file(str(tok_path))
    data = Data(tok, texts)
    n_bytes = sum(map(len, texts.values()))
    print(f"{len(texts)} files, {n_bytes / 1e6:.1f} MB, {len(data.stream) / 1e6:.2f} M tokens", flush=True)

    model = Llama()
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    state_path, step, seconds = work / "state.safetensors", 0, 0.0
    if state_path.exists():
        step, seconds = read_state(state_path, model, optimizer)
        print(f"resumed at step {step}", flush=True)

    def save_state() -> None:
        write_state(state_path, model, optimizer, step, seconds)

    n_steps = math.ceil(args.tokens / (BATCH * N_POS)) - POLISH_STEPS
    compiled = torch.compile(loss_of)
    last_save = last_log = time.monotonic()
    losses: list[float] = []
    repeated_losses: list[float] = []
    while step < n_steps + POLISH_STEPS:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps)
        loss = compiled(model, data.batch(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step >= n_steps and step % POLISH_EVERY == 0:
            repeated = unlikelihood(model, data, step)
            repeated.backward()
            repeated_losses.append(float(repeated.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        step += 1
        if step % 100 == 0:
            now = time.monotonic()
            seconds += now - last_log
            rate = 100 * BATCH * N_POS / (now - last_log)
            last_log = now
            said = f"step {step}/{n_steps} loss {sum(losses) / len(losses):.3f} {rate:.0f} tok/s"
            if repeated_losses:
                said += f" repeated {sum(repeated_losses) / len(repeated_losses):.4f}"
            print(said, flush=True)
            losses.clear()
            repeated_losses.clear()
            if now - last_save > 180:
                save_state()
                last_save = now
                bpb = bits_per_byte(model, tok, held_out, 60_000)
                print(f"  held out {bpb:.3f} bits per byte", flush=True)
    save_state()
    figures = {
        "held_out_bits_per_byte_fp32_weights": round(bits_per_byte(model, tok, held_out, 10**9), 4),
        "training_tokens": (n_steps + POLISH_STEPS) * BATCH * N_POS,
        "polish_steps": POLISH_STEPS,
        "training_text_bytes": n_bytes,
        "training_minutes": round(seconds / 60, 1),
        "corpus_list_sha256": demo_corpus.list_digest(),
        "seed": SEED,
    }
    export(model, tok, args.out, figures)


def export(model: Llama, tok: Tokenizer, out: Path, figures: dict[str, float | int | str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v.detach().to(torch.bfloat16).contiguous() for k, v in model.named_parameters()}
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    tok.save(str(out / "tokenizer.json"))

    def write(name: str, value: object) -> None:
        (out / name).write_text(json.dumps(value, indent=2) + "\n")

    write(
        "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": D_MODEL,
            "intermediate_size": D_FF,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "num_key_value_heads": N_KV_HEADS,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": N_POS,
            "rms_norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "torch_dtype": "bfloat16",
        },
    )
    write("generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|eos|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": N_POS,
        },
    )
    write("training.json", figures)
    print(json.dumps(figures, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("src/flashformer/demo"))
    parser.add_argument("--tokens", type=float, default=30.1e6)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
