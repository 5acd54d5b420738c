"""Writes csrc/generated/program.h from the Python definitions it mirrors; `--check` only compares."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsFloat

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from flashformer.backends.base import ADJUST_COLUMNS, ROW_COLUMNS
from flashformer.formats import FORMATS, NF4, QUANTS
from flashformer.program.ops import OPS
from flashformer.program.records import ACTIVATIONS, CONSTANTS, QK_NORMS, RECORDS
from flashformer.quantize import INT4_STEPS, INT4_ZP_SHARES, NF4_SHARES

HEADER = Path(__file__).parents[1] / "csrc" / "generated" / "program.h"
C_TYPES = {"<i8": "int64_t", "<f8": "double", "<i4": "int32_t", "<f4": "float", "<u8": "uint64_t"}


def camel(name: str) -> str:
    return "k" + re.sub(r"(?:^|_)(\w)", lambda m: m[1].upper(), name)


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
    lines = [
        "// Written by tools/generate.py from src/flashformer/program/{ops,records}.py and formats.py. Do not edit.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace flashformer {",
        "",
        "enum class Op : int64_t {",
        *(f"  {camel(info.op)} = {info.code},  // {info.does}" for info in OPS.values()),
        "};",
        "",
        *enum("Format", {fmt.name.split("-")[0]: fmt.code for fmt in (*FORMATS.values(), *QUANTS.values())}),
        *enum("Activation", {activation.value: code for activation, code in ACTIVATIONS.items()}),
        *enum("QkNorm", {"none": 0, **{norm.value: code for norm, code in QK_NORMS.items()}}),
        *(f"constexpr int64_t {name} = {value};" for name, value in CONSTANTS.items()),
        "",
        "// quantize.py",
        *(f"constexpr float {name}[] = {{{_floats(values)}}};" for name, values in QUANT_TABLES.items()),
    ]
    for name, dtype in RECORDS.items():
        fields = dict(dtype.fields or {})
        lines += ["", f"struct {name} {{"]
        lines += [f"  {C_TYPES[fields[f][0].str]} {f};" for f in dtype.names or ()]
        lines += ["};", f"static_assert(sizeof({name}) == {dtype.itemsize});"]
    columns = {**ROW_COLUMNS, **ADJUST_COLUMNS}
    lines += ["", "// The rows of a forward as the caller keeps them; see backends/base.py.", "struct RowArrays {"]
    lines += [f"  {C_TYPES[dtype.str]}* {name};" for name, dtype in columns.items()]
    lines += ["};", f"constexpr int64_t kRowColumns = {len(ROW_COLUMNS)};  // with an entry per row"]
    sizes = ", ".join(str(dtype.itemsize) for dtype in columns.values())
    lines += [f"constexpr int64_t kColumnItemBytes[] = {{{sizes}}};"]
    return "\n".join([*lines, "", "}  // namespace flashformer", ""])


def main() -> None:
    text = generate()
    if sys.argv[1:] == ["--check"]:
        if not HEADER.exists() or HEADER.read_text() != text:
            raise SystemExit(f"{HEADER.name} is stale: run python tools/generate.py")
        return
    HEADER.parent.mkdir(exist_ok=True)
    HEADER.write_text(text)


if __name__ == "__main__":
    main()
