"""Writes the C++ and CUDA mirrors of the Python definitions; `--check` only compares."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsFloat

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from flashformer.backends.base import ADJUST_COLUMNS, ROW_COLUMNS
from flashformer.formats import FORMATS, NF4, QUANTS
from flashformer.program import fragments
from flashformer.program.ops import OPS
from flashformer.program.records import ACTIVATIONS, CONSTANTS, QK_NORMS, RECORDS
from flashformer.quantize import INT4_STEPS, INT4_ZP_SHARES, NF4_SHARES

ROOT = Path(__file__).parents[1]
HEADER = ROOT / "csrc" / "generated" / "program.h"
DEVICE_HEADER = ROOT / "src" / "flashformer" / "backends" / "cuda" / "device" / "program.cuh"
C_TYPES = {"<i8": "int64_t", "<f8": "double", "<i4": "int32_t", "<f4": "float", "<u8": "uint64_t"}
DEVICE_TYPES = {"int64_t": "i64", "int32_t": "i32", "uint64_t": "u64", "double": "f64", "float": "f32"}
WRITTEN = "// Written by tools/generate.py from src/flashformer/program/{ops,records}.py and formats.py. Do not edit."


def camel(name: str) -> str:
    return "k" + re.sub(r"(?:^|_)(\w)", lambda m: m[1].upper(), name)


DEVICE_CONSTANTS = {
    "kTileOutputs": fragments.TILE_OUTPUTS,
    "kSliceK": fragments.SLICE_K,
    "kWarps": fragments.WARPS,
    "kAlternate": fragments.ALTERNATE_WIDTH,
}
QUANT_TABLES: dict[str, Sequence[SupportsFloat]] = {
    "kInt4Steps": INT4_STEPS,
    "kInt4ZpShares": INT4_ZP_SHARES,
    "kNf4Shares": NF4_SHARES,
    "kNf4": NF4,
}


def _floats(values: Sequence[SupportsFloat]) -> str:
    return ", ".join(f"{float(value)!r}f" for value in values)


def enum(name: str, codes: dict[str, int]) -> list[str]:
    values = [f"  {camel(value)} = {code}," for value, code in codes.items()]
    return [f"enum class {name} : int64_t {{", *values, "};", ""]


def generate() -> str:
    columns = {**ROW_COLUMNS, **ADJUST_COLUMNS}
    sizes = ", ".join(str(dtype.itemsize) for dtype in columns.values())
    lines = [
        *(WRITTEN, "#pragma once", "", "#include <cstdint>", "", "namespace flashformer {", ""),
        *enums(),
        *(f"constexpr int64_t {name} = {value};" for name, value in CONSTANTS.items()),
        "",
        "// quantize.py",
        *(f"constexpr float {name}[] = {{{_floats(values)}}};" for name, values in QUANT_TABLES.items()),
        *records(),
        *("", "// The rows of a forward as the caller keeps them; see backends/base.py.", "struct RowArrays {"),
        *(f"  {C_TYPES[dtype.str]}* {name};" for name, dtype in columns.items()),
        *("};", f"constexpr int64_t kRowColumns = {len(ROW_COLUMNS)};  // with an entry per row"),
        f"constexpr int64_t kColumnItemBytes[] = {{{sizes}}};",
        *("", "}  // namespace flashformer", ""),
    ]
    return "\n".join(lines)


def generate_device() -> str:
    lines = [
        *(WRITTEN, "#pragma once", "", '#include "layout.cuh"', "", "namespace flashformer {", ""),
        *enums(),
        *(f"constexpr int64_t {name} = {value};" for name, value in {**CONSTANTS, **DEVICE_CONSTANTS}.items()),
        *records(),
        *("", "}  // namespace flashformer", ""),
    ]
    return re.sub(r"\b(\w+)\b", lambda m: DEVICE_TYPES.get(m[1], m[1]), "\n".join(lines))


def enums() -> list[str]:
    return [
        "enum class Op : int64_t {",
        *(f"  {camel(info.op)} = {info.code},  // {info.does}" for info in OPS.values()),
        "};",
        "",
        *enum("Format", {fmt.name.split("-")[0]: fmt.code for fmt in (*FORMATS.values(), *QUANTS.values())}),
        *enum("Activation", {activation.value: code for activation, code in ACTIVATIONS.items()}),
        *enum("QkNorm", {"none": 0, **{norm.value: code for norm, code in QK_NORMS.items()}}),
    ]


def records() -> list[str]:
    lines = []
    for name, dtype in RECORDS.items():
        fields = dict(dtype.fields or {})
        lines += ["", f"struct {name} {{"]
        lines += [f"  {C_TYPES[fields[f][0].str]} {f};" for f in dtype.names or ()]
        lines += ["};", f"static_assert(sizeof({name}) == {dtype.itemsize});"]
    return lines


def main() -> None:
    for path, text in ((HEADER, generate()), (DEVICE_HEADER, generate_device())):
        if sys.argv[1:] == ["--check"]:
            if not path.exists() or path.read_text() != text:
                raise SystemExit(f"{path.name} is stale: run python tools/generate.py")
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
