"""What kernels take: registers, stack, code, compile time. As a program it prints a table of them."""

from __future__ import annotations

import dataclasses
import time
from functools import cache

from cuda_models import B200, H100, RTX_5090, checked

from flashformer.backends.cuda.nvrtc import Resources, Source, compile_cubin, resources, source_of
from flashformer.backends.cuda.specialize import DeviceFacts, Specialization, row_counts, specialize
from flashformer.check import CheckedProgram
from flashformer.formats import find_quant
from flashformer.model.outline import read_outline

QUANTS = ("none", "int8-g32", "int8-g128", "int4-g32-zp", "int4-g64", "int4-g128")
BESIDE_A_LAYER = {  # what runs once per launch, by its header
    "embed.cuh": "inline DEVICE void embed(Context&, const Phase&, const Span&) {}",
    "sample.cuh": "inline DEVICE void sample(Context&, const Phase&, const Span&) {}",
    "tokens.cuh": "inline DEVICE void copy_tokens(const Launch&, u32, u32) {}\n"
    "inline DEVICE bool is_over(const Launch&, u32) { return false; }",
}
HEAD_FORMAT = [f"kHead{part}" for part in ("Format", "Group", "ZeroPoints", "UnitBytes", "UnitK", "SlotUnits")]


@cache
def program(shape: str, facts: DeviceFacts, quant: str = "none", **target: object) -> CheckedProgram:
    return checked(
        read_outline(f"shape:{shape}").spec, n_workers=facts.n_sm, ctx=4096, quant=find_quant(quant), **target
    )


def layer_source(one: Specialization) -> Source:
    """The kernel without what is outside the layers; the head is as if it had the layers' format."""
    constants = dict(one.constants)
    as_body = {name: constants[name.replace("Head", "Body")] for name in constants if name in HEAD_FORMAT}
    assert as_body
    source = source_of(dataclasses.replace(one, constants=tuple((constants | as_body).items())))
    empty = {name: _header(text) for name, text in BESIDE_A_LAYER.items()}
    assert empty.keys() <= dict(source.headers).keys()
    return dataclasses.replace(source, headers=tuple((name, empty.get(name, text)) for name, text in source.headers))


def _header(text: str) -> str:
    return f'#pragma once\n#include "context.cuh"\nnamespace flashformer {{\n{text}\n}}\n'


def main() -> None:
    print(f"{'':34}{'registers':>10}{'local':>7}{'code':>9}{'layer':>9}{'slots':>7}{'ring':>9}{'CPU s':>7}")
    for facts in (H100, B200, RTX_5090):
        for quant in QUANTS:
            made = program("llama-3.1-8b", facts, quant)
            for n_rows in row_counts(made.program, facts):
                _print(facts.arch, quant, specialize(made, facts, n_rows=n_rows))


def _print(arch: str, quant: str, one: Specialization) -> None:
    begin = time.process_time()
    whole = _measured(source_of(one))
    seconds = time.process_time() - begin
    layer = _measured(layer_source(one))
    name = f"{arch} {quant} {one.n_rows} rows"
    print(f"{name:34}{whole.registers:10}{whole.local_bytes:7}{whole.code_bytes:9}{layer.code_bytes:9}", end="")
    print(f"{one.n_slots:7}{one.n_slots * one.slot_bytes:9}{seconds:7.1f}", flush=True)


def _measured(source: Source) -> Resources:
    return resources(compile_cubin(source)[0])


if __name__ == "__main__":
    main()
