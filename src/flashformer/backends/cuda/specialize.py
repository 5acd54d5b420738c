"""Program + GPU -> what the device sources are compiled with: named constants, shared memory, launch facts.

One block per multiprocessor. Its shared memory, in bytes from its start:

    ring          (kSlots, kSlotBytes) weights on their way
    barriers      (kSlots) full, (kSlots) empty, 8 bytes each
    x             (kRows, 4160) a slice of a product's input, 2048 elements of 16 bits and a pad
    partial       (2, 8 warps, kRows, 20) f32 sums
    accumulators  (kAccTiles, kRows, 16) f32 sums of tiles whose k has several slices; other tiles' are in global memory
    small         4096 bytes for everything else

From x up to small is one area, which attention and the choice of tokens use for their own; it has room at least for
the query heads that share a kv head. Everything but the ring is fixed by the Program and the rows, the ring gets what
the device leaves: 208 KB of an H100's 227 for 1 row, 112 for 16. Weights are to be under way at any time: 3.35 TB/s
times a latency of 0.7 us over 132 multiprocessors is 18 KB of each, so 3 slots of 16 KiB keep memory busy and what is
beyond them bridges hand-offs. Smaller slots would fill the remainder, at most one slot, and cost twice the barriers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...check import CheckedProgram
from ...errors import DeviceError
from ...formats import BF16, F16, Format
from ...model.spec import MAX_HEAD_DIM, ModelSpec
from ...program import fragments
from ...program.ir import Layout, Program, Target
from ...program.memory import head_dim_padded

THREADS = 288  # 8 warps that compute and one that loads
MAX_ROWS = 16  # of one forward: what Launch has room for
MIN_CAPABILITY = (9, 0)
MIN_SLOTS = 2
ROW_COUNTS = (1, 4, 8, 16)  # of which there can be kernels
GOOD_SLOTS = 3  # with which a kernel for more than one row is worth having
MAX_SLOTS = 64
ACC_TILES, ACC_BYTES = 16, 8192  # in shared memory at most so many or so much: more would starve the ring
AREA_COLUMNS = 32  # of attention, that have room at once whatever the rows
X_STRIDE = 2 * fragments.SLICE_K + 64  # bytes of a row of a slice; the pad puts rows into different banks
SCORE_STRIDE = 1088  # bytes of a column of attention: scores of 256 keys and what is known of it
PARTIAL_STRIDE = 20  # floats of 16 outputs and a pad
SMALL_BYTES = 4096
ALIGNMENT = 128  # bytes of every part; a bulk copy needs 16
BARRIER_BYTES = 2 * 8  # per slot


@dataclass(frozen=True)
class DeviceFacts:
    """What a kernel is made for. `shared_bytes`: most that one block may have."""

    name: str
    n_sm: int
    shared_bytes: int
    capability: tuple[int, int]

    @property
    def arch(self) -> str:
        """As compilers name it, e.g. `sm_90`."""
        return "sm_{}{}".format(*self.capability)


@dataclass(frozen=True)
class Specialization:
    """One kernel. `constants` in the order in which the header has them."""

    capability: tuple[int, int]
    n_rows: int  # most of a forward
    times: bool  # whether the kernel notes when it enters and leaves phases
    n_workers: int  # blocks
    shared_bytes: int  # dynamic, per block
    n_slots: int
    slot_bytes: int
    more_tiles: int  # tiles of a block whose accumulators are in global memory
    constants: tuple[tuple[str, int], ...]

    @property
    def accumulator_bytes(self) -> int:
        """Of all blocks, in global memory."""
        return self.n_workers * self.more_tiles * _tile_bytes(self.n_rows)

    @property
    def n_cols(self) -> int:
        """Columns that tensor cores multiply."""
        return columns(self.n_rows)

    def header(self) -> str:
        """The text of specialization.h."""
        lines = [f"constexpr unsigned {name} = {value};" for name, value in self.constants]
        return "\n".join(["#pragma once", "namespace flashformer {", *lines, "}  // namespace flashformer", ""])


def refusals(spec: ModelSpec, target: Target, facts: DeviceFacts) -> Iterator[str]:
    """Why the CUDA kernel cannot run this here, one line each; nothing where it can."""
    if facts.capability < MIN_CAPABILITY:
        yield f"{facts.name} has compute capability {_dotted(facts.capability)}, needed is {_dotted(MIN_CAPABILITY)}"
    if target.weight_format not in (BF16, F16):
        yield f"weights in {target.weight_format.name}: load with dtype='bf16' or 'f16'"
    for quant in {q.name: q for q in (target.body_quant, target.head_quant) if q is not None}.values():
        if quant.codebook or quant.bits not in (4, 8):
            yield f"weights in {quant.name}: load with an int8 or int4 format"
    if target.kv_format not in (BF16, F16):
        yield f"a KV cache in {target.kv_format.name}: load with kv_dtype='bf16' or 'f16'"
    if target.exact:
        yield "exact activations: load without exact"
    if (head_dim := max(layer.head_dim for layer in spec.layers)) > MAX_HEAD_DIM:
        yield f"head_dim {head_dim}, at most {MAX_HEAD_DIM}"
    widths = sorted({head_dim_padded(layer, Layout.FRAGMENTS) for layer in spec.layers})
    if len(widths) > 1:
        yield f"heads of {', '.join(map(str, widths))} elements in different layers, of one width in all"
    if target.rows > MAX_ROWS:
        yield f"{target.rows} rows in a forward, at most {MAX_ROWS}: load with prompt_chunk={MAX_ROWS}"
    needed = _least_bytes(spec, target, 1, MIN_SLOTS)
    if needed > facts.shared_bytes:
        yield f"{needed:,} bytes of shared memory for a block, {facts.name} has {facts.shared_bytes:,}"


def columns(n_rows: int) -> int:
    """What a matrix instruction takes: rows are filled up to 8 or 16."""
    return 8 if n_rows <= 8 else 16


def row_counts(program: Program, facts: DeviceFacts) -> tuple[int, ...]:
    """The kernels to make: each for up to so many rows, 1 being the first. More rows take several launches."""

    def fits(n_rows: int) -> bool:
        return _least_bytes(program.spec, program.target, n_rows, GOOD_SLOTS) <= facts.shared_bytes

    return (1, *([n for n in (8, 16) if fits(n)] or [n for n in (4,) if fits(n)]))


def specialize(checked: CheckedProgram, facts: DeviceFacts, *, n_rows: int, times: bool = False) -> Specialization:
    """The kernel for forwards of up to `n_rows` rows, one of ROW_COUNTS.

    Raises DeviceError where the device lacks something or the kernel does not have what the Program asks for.
    """
    program = checked.program
    if reasons := list(refusals(program.spec, program.target, facts)):
        raise DeviceError(f"device='cuda' cannot run this: {'; '.join(reasons)}; or use device='cpu'")
    assert program.target.layout is Layout.FRAGMENTS, "built for another backend"
    assert n_rows in ROW_COUNTS
    slot_bytes, area_bytes = _slot_bytes(program.target), _area_bytes(program.spec)
    most_tiles = _most_tiles(program)
    good = _least_bytes(program.spec, program.target, n_rows, GOOD_SLOTS) <= facts.shared_bytes
    room = facts.shared_bytes - (GOOD_SLOTS if good else MIN_SLOTS) * (slot_bytes + BARRIER_BYTES)
    wanted = min(most_tiles, max(ACC_TILES, ACC_BYTES // _tile_bytes(n_rows)))
    fitting = (n for n in range(wanted, -1, -1) if _fixed_bytes(n_rows, n, area_bytes) <= room)
    acc_tiles = next(fitting, -1)
    if acc_tiles < 0:
        raise DeviceError(f"a kernel for {n_rows} rows does not fit into the shared memory of {facts.name}")
    free = facts.shared_bytes - _fixed_bytes(n_rows, acc_tiles, area_bytes)
    n_slots = min(free // (slot_bytes + BARRIER_BYTES), MAX_SLOTS)
    places = _places(n_rows, acc_tiles, n_slots, slot_bytes, area_bytes)
    return Specialization(
        capability=facts.capability,
        n_rows=n_rows,
        times=times,
        n_workers=program.target.n_workers,
        shared_bytes=places["kSmemBytes"],
        n_slots=n_slots,
        slot_bytes=slot_bytes,
        more_tiles=most_tiles - acc_tiles,
        constants=(
            ("kRows", n_rows),
            ("kCols", columns(n_rows)),
            ("kWorkers", program.target.n_workers),
            ("kTimes", int(times)),
            *_formats(program),
            *_switches(program),
            ("kHeadDimPadded", head_dim_padded(program.spec.layers[0], Layout.FRAGMENTS)),
            ("kSlots", n_slots),
            ("kSlotBytes", slot_bytes),
            *places.items(),
            ("kXStride", X_STRIDE),
            ("kXBytes", n_rows * X_STRIDE),
            ("kPartialBytes", _partial_bytes(n_rows)),
            ("kAccTiles", acc_tiles),
            ("kMoreAccTiles", most_tiles - acc_tiles),
            ("kSmallBytes", SMALL_BYTES),
        ),
    )


def _formats(program: Program) -> Iterator[tuple[str, int]]:
    target = program.target
    for name, fmt in (("Body", target.body_format), ("Head", target.head_format)):
        yield f"k{name}Format", fmt.code
        yield f"k{name}Group", fmt.scale_group
        yield f"k{name}ZeroPoints", int(fmt.zero_points)
        yield f"k{name}UnitBytes", fragments.unit_bytes(fmt)
        yield f"k{name}UnitK", fragments.unit_k(fmt)
        yield f"k{name}SlotUnits", fragments.slot_units(fmt)
    yield "kEmbedFormat", (target.head_format if program.spec.tied else target.weight_format).code
    yield "kKvFormat", target.kv_format.code


def _switches(program: Program) -> Iterator[tuple[str, int]]:
    """What some phase needs, and whose code is left out elsewhere."""
    phases, layers = program.phases, program.spec.layers
    widths = [phase.matrix.k for phase in phases if phase.matrix] + [layer.head_dim for layer in layers]
    yield "kFours", int(all(width % 4 == 0 for width in widths))  # inputs are read in whole fours
    yield "kUsesFolds", int(any(phase.fold is not None for phase in phases))
    yield "kUsesQkNorm", int(any(layer.qk_norm is not None for layer in layers))
    yield "kUsesScoreCap", int(any(layer.score_softcap for layer in layers))


def _places(n_rows: int, acc_tiles: int, n_slots: int, slot_bytes: int, area_bytes: int) -> dict[str, int]:
    """Where each part begins, and the end. From x to small are at least `area_bytes`."""
    sizes = {
        "kSmemRing": n_slots * slot_bytes,
        "kSmemFull": n_slots * 8,
        "kSmemEmpty": n_slots * 8,
        "kSmemX": n_rows * X_STRIDE,
        "kSmemPartial": 2 * _partial_bytes(n_rows),
        "kSmemAccumulators": acc_tiles * _tile_bytes(n_rows),
        "kSmemSmall": SMALL_BYTES,
    }
    places: dict[str, int] = {}
    end = 0
    for name, size in sizes.items():
        if name not in ("kSmemFull", "kSmemEmpty"):
            end = _aligned(end)
        if name == "kSmemSmall":
            end = max(end, places["kSmemX"] + _aligned(area_bytes))
        places[name] = end
        end += size
    return {**places, "kSmemBytes": end}


def _area_bytes(spec: ModelSpec) -> int:
    """What attention needs (attend.cuh), 8 columns or as many as a row has; more than what a choice needs."""
    per_kv = max(layer.n_heads // layer.n_kv_heads for layer in spec.layers)
    n_columns = min(-(-per_kv // 8) * 8, AREA_COLUMNS)
    query_bytes = 2 * head_dim_padded(spec.layers[0], Layout.FRAGMENTS)
    query_bytes += 0 if query_bytes % 128 else 64  # no bank conflicts
    return n_columns * (SCORE_STRIDE + query_bytes)


def _fixed_bytes(n_rows: int, acc_tiles: int, area_bytes: int) -> int:
    """All but slots and their barriers, with the room that aligning after the barriers may take."""
    return ALIGNMENT + _places(n_rows, acc_tiles, 0, 0, area_bytes)["kSmemBytes"]


def _least_bytes(spec: ModelSpec, target: Target, n_rows: int, n_slots: int) -> int:
    """Shared memory without which there is no kernel for so many rows with so many slots."""
    fixed = _fixed_bytes(n_rows, 0, _area_bytes(spec))
    return fixed + n_slots * (_slot_bytes(target) + BARRIER_BYTES)


def _slot_bytes(target: Target) -> int:
    def size(fmt: Format) -> int:
        return fragments.slot_units(fmt) * fragments.unit_bytes(fmt)

    return _aligned(max(size(target.body_format), size(target.head_format)))


def _most_tiles(program: Program) -> int:
    """Tiles of a block in a phase whose k has several slices."""
    sliced = [phase for phase in program.phases if phase.matrix and len(phase.matrix.item_bytes) > 1]
    return max((len(span) for phase in sliced for span in phase.spans), default=0)


def _partial_bytes(n_rows: int) -> int:
    return fragments.WARPS * n_rows * PARTIAL_STRIDE * 4


def _tile_bytes(n_rows: int) -> int:
    return n_rows * fragments.TILE_OUTPUTS * 4


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
