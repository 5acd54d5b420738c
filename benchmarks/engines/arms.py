"""Who takes part: for each format the ways in which each engine runs it, and the files that they need."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashformer.checkpoint import open_checkpoint
from flashformer.formats import F32, FORMATS, from_f32, to_f32

from . import gguf_file
from .child import Child

ROOT = Path(__file__).resolve().parents[2]
EXPORT = Path(__file__).with_name("openvino_ir.py")
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
Q8_0, Q6_K = 8, 14
FTYPES = {"int8": 7, "int4": 2}  # LLAMA_FTYPE_MOSTLY_Q8_0, _Q4_0
LLAMA_NAMES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
HEADS = {"q8_0": Q8_0, "q6_k": Q6_K, "default": None}
OPENVINO_NAMES = {"bf16": "fp16", "int8": "int8"}
QUANTS = {"bf16": ("none",), "int8": ("int8-g32", "int8-g128"), "int4": ("int4-g32", "int4-g128")}
PEERS = ("llama.cpp", "transformers", "OpenVINO")
OPENVINO_CACHE = "bf16"  # its attention's arithmetic; the others' caches have f16


@dataclass(frozen=True)
class Peers:
    """Interpreters of the peers' environments; None: not taken part."""

    llama: str | None
    openvino: str | None
    transformers: bool


@dataclass(frozen=True)
class Arm:
    """One process of a comparison. `engine` is a module beside this one, `options` those of its `load`."""

    name: str
    peer: str | None  # None: ours
    python: str
    engine: str
    options: Mapping[str, object]
    environment: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)  # that `load` does not know


def transparent_huge_pages() -> bool:
    return TRANSPARENT.exists() and "[never]" not in TRANSPARENT.read_text()


def checkpoint(model: str, work: Path) -> Path:
    """A folder, or the folder of a shape's random weights, made if it is not there."""
    if Path(model).is_dir():
        return Path(model)
    out = work / model
    if not (out / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, ROOT / "tools" / "make_checkpoint.py", model, out], check=True)
    return out


def reference(folder: Path) -> Arm:
    return Arm("reference", None, sys.executable, "ours", {"folder": str(folder), "dtype": "f32"})


def make_arms(
    folder: Path, fmt: str, work: Path, peers: Peers, head: str, threads: int
) -> tuple[list[Arm], dict[str, str]]:
    """Everyone who runs a model in a format, files made where they are missing; and why others do not."""
    arms, left_out = [], {}
    arms += [_ours(folder, quant, "f16") for quant in QUANTS[fmt]]
    if peers.llama:
        arms += _llama_arms(_gguf(folder, fmt, work, peers.llama, head, threads), fmt, peers.llama)
    if peers.transformers and fmt == "bf16":
        arms.append(Arm("transformers bf16", PEERS[1], sys.executable, "eager", {"folder": str(folder)}))
    if peers.openvino:
        try:
            arms += [_openvino(folder, fmt, work, peers.openvino), _ours(folder, QUANTS[fmt][-1], OPENVINO_CACHE)]
        except subprocess.CalledProcessError as failed:
            left_out[PEERS[2]] = f"its export ended with {failed.returncode}; export.log has the reason"
    return arms, left_out


def _ours(folder: Path, quant: str, cache: str) -> Arm:
    name = f"flashformer {'bf16' if quant == 'none' else quant}{'' if cache == 'f16' else f' ({cache} cache)'}"
    options = {"folder": str(folder), "dtype": "bf16", "quant": quant, "kv_dtype": cache}
    return Arm(name, None, sys.executable, "ours", options)


def is_alike(ours: Arm, peer: str, fmt: str) -> bool:
    """The one of our ways that stands beside a peer."""
    quant, cache = (QUANTS[fmt][-1], OPENVINO_CACHE) if peer == "OpenVINO" else (QUANTS[fmt][0], "f16")
    return (ours.options["quant"], ours.options["kv_dtype"]) == (quant, cache)


def _llama_arms(file: Path, fmt: str, python: str) -> list[Arm]:
    tensors = list(gguf_file.infos(file))
    by_name = {t.name: gguf_file.TYPE_NAMES[t.type] for t in tensors}
    head = by_name.get("output.weight", by_name["token_embd.weight"])
    weights = LLAMA_NAMES[fmt] if head == LLAMA_NAMES[fmt] else f"{LLAMA_NAMES[fmt]}, head {head}"
    facts = {"weight_bytes": gguf_file.token_bytes(tensors), "weights": weights}
    ways: list[tuple[str, bool, Mapping[str, str]]] = [("mapped", True, {})]
    if transparent_huge_pages():
        ways.append(("huge pages", False, HUGE_MALLOC))
    return [
        Arm(f"llama.cpp {weights}, {way}", PEERS[0], python, "llama", {"file": str(file), "mmap": mmap}, env, facts)
        for way, mmap, env in ways
    ]


def _gguf(folder: Path, fmt: str, work: Path, python: str, head: str, threads: int) -> Path:
    whole = work / f"{folder.name}-bf16.gguf"
    if not whole.exists():
        part = whole.with_suffix(".part")
        write_gguf(folder, part)
        part.rename(whole)
    if fmt == "bf16":
        return whole
    out = work / f"{folder.name}-{fmt}-{head}.gguf"
    if not out.exists():
        part, child = out.with_suffix(".part"), Child(python, "llama", {}, work / "quantize.log")
        how = {"ftype": FTYPES[fmt], "head": HEADS[head] if fmt == "int4" else Q8_0, "threads": threads}
        try:
            child("quantize", source=str(whole), out=str(part), **how)
        finally:
            child.close()
        part.rename(out)
    return out


def write_gguf(folder: Path, out: Path) -> None:
    """Matrices as bf16, exact for checkpoints of bf16; norms and biases as float32."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if config["architectures"][0] not in gguf_file.ARCHITECTURES:
        raise SystemExit(f"{folder}: {config['architectures'][0]} is not written to GGUF here")
    _, neighbours = gguf_file.ARCHITECTURES[config["architectures"][0]]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in open_checkpoint(str(folder)).tensors.items():
        data = tensor.data
        projection = name.split(".")[-2]
        if neighbours and projection in heads:
            data = gguf_file.paired_neighbours(data, heads[projection])
        wide = to_f32(data, tensor.format)
        bf16 = FORMATS["bf16"]
        kept = wide if wide.ndim == 1 else data if tensor.format is bf16 else from_f32(wide, bf16)
        tensors[gguf_file.gguf_name(name)] = kept.astype(F32.storage) if wide.ndim == 1 else kept
    factors = gguf_file.rope_factors(config)
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    gguf_file.write(out, gguf_file.metadata(config), tensors)


def openvino_group(config: Mapping[str, Any]) -> int:
    """Elements that share a scale: 128 as ours, or the largest that divides every row, which nncf insists on."""
    query = config["num_attention_heads"] * gguf_file.head_dim(config)
    return math.gcd(128, config["hidden_size"], config["intermediate_size"], query)


def _openvino(folder: Path, fmt: str, work: Path, python: str) -> Arm:
    group = openvino_group(json.loads((folder / "config.json").read_text()))
    kind = f"int4-g{group}" if fmt == "int4" else OPENVINO_NAMES[fmt]
    out = work / f"{folder.name}-openvino-{kind}"
    file = out / "openvino_model.xml"
    if not file.exists():
        print(f"exporting {folder.name} to OpenVINO {kind}", file=sys.stderr)
        part = out.with_name(f"{out.name}.part")
        with (work / "export.log").open("w") as log:
            subprocess.run([python, EXPORT, folder, part, fmt, str(group)], check=True, stdout=log, stderr=log)
        part.rename(out)
    facts = {"weights": f"{kind}, head int8" if fmt == "int4" else kind}
    return Arm(f"OpenVINO {kind}", PEERS[2], python, "openvino_ir", {"file": str(file)}, facts=facts)
