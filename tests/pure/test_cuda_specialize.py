"""What the CUDA kernel is compiled with: constants, shared memory, refusals; and the layout of its argument."""

from __future__ import annotations

import dataclasses
import re
from contextlib import suppress
from itertools import pairwise

import pytest
from cuda_models import H100, RTX_5090, checked, cuda_program, cuda_target
from programs import spec

import flashformer as ff
from flashformer.backends.cuda.launch import LAUNCH, site_names
from flashformer.backends.cuda.nvrtc import device_headers
from flashformer.backends.cuda.specialize import DeviceFacts, Specialization, refusals, row_counts, specialize
from flashformer.formats import BF16, F16, F32, QUANTS, Format
from flashformer.model.spec import ModelSpec, QkNorm
from flashformer.program import fragments

FORMATS = [BF16, F16, *(fmt for name, fmt in QUANTS.items() if name.startswith("int"))]
WIDE = spec(d_model=2100, d_ff=4300, n_heads=4, head_dim=128, vocab_size=4000)  # k of more than one slice everywhere


def parts(one: Specialization) -> list[tuple[str, int, int]]:
    """(name, begin, end) in shared memory, from the constants and the contract's sizes."""
    c, rows = dict(one.constants), one.n_rows
    sizes = {
        "kSmemRing": c["kSlots"] * c["kSlotBytes"],
        "kSmemFull": c["kSlots"] * 8,
        "kSmemEmpty": c["kSlots"] * 8,
        "kSmemX": rows * (4096 + 64),
        "kSmemPartial": 2 * 8 * rows * 20 * 4,
        "kSmemAccumulators": c["kAccTiles"] * rows * 16 * 4,
        "kSmemSmall": 4096,
    }
    return [(name, c[name], c[name] + size) for name, size in sizes.items()]


@pytest.mark.parametrize("n_rows", [1, 4, 8, 16])
@pytest.mark.parametrize("quant", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("model", [spec(), WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("facts", [H100, dataclasses.replace(H100, n_sm=7, shared_bytes=200_000)], ids=["H100", "less"])
def test_shared_memory_is_laid_out_without_overlap(
    facts: DeviceFacts, model: ModelSpec, quant: Format, n_rows: int
) -> None:
    target = {"quant": quant} if quant.scale_group else {"fmt": quant}
    one = specialize(checked(model, n_workers=facts.n_sm, **target), facts, n_rows=n_rows)
    constants, found = dict(one.constants), parts(one)
    area = -(-8 * (1088 + 2 * constants["kHeadDimPadded"] + 64 * (constants["kHeadDimPadded"] % 64 == 0)) // 128) * 128
    assert constants["kSmemSmall"] - constants["kSmemX"] >= area
    assert (constants["kRows"], constants["kCols"]) == (n_rows, 16 if n_rows > 8 else 8)
    assert found[0][1] == 0
    for (_, _, end), (name, begin, _) in pairwise(found):
        grown = name == "kSmemSmall" and begin == constants["kSmemX"] + area  # attention needs so much
        assert end <= begin, name
        assert begin < end + 128 or grown, name
        assert begin % (8 if name in ("kSmemFull", "kSmemEmpty") else 128) == 0
    assert found[-1][2] == constants["kSmemBytes"] == one.shared_bytes <= facts.shared_bytes
    assert constants["kSlots"] >= 2
    assert one.shared_bytes + constants["kSlotBytes"] + 16 > facts.shared_bytes - 256  # no slot more would fit
    assert constants["kSlotBytes"] >= fragments.slot_units(quant) * fragments.unit_bytes(quant)
    assert constants["kSlotBytes"] % 128 == 0


def test_accumulators_beyond_shared_memory_are_counted() -> None:
    program = checked(WIDE, n_workers=4)
    most = max(len(span) for phase in program.program.phases if phase.matrix for span in phase.spans)
    for n_rows, least in ((1, 128), (4, 32), (8, 16), (16, 16)):
        one = specialize(program, H100, n_rows=n_rows)
        constants = dict(one.constants)
        assert constants["kAccTiles"] + constants["kMoreAccTiles"] == most
        assert constants["kAccTiles"] == min(most, least)
        assert one.accumulator_bytes == 4 * constants["kMoreAccTiles"] * n_rows * 64
        assert one.accumulator_bytes > 0
    single = specialize(checked(spec(), n_workers=4), H100, n_rows=8)
    assert (dict(single.constants)["kAccTiles"], single.accumulator_bytes) == (0, 0)  # one slice: nothing to keep


def test_formats_are_named_by_their_codes() -> None:
    tied = spec(tied=True)
    c = dict(
        specialize(
            checked(tied, quant=QUANTS["int4-g64-zp"], head_quant=QUANTS["int8-g32"], kv=F16), H100, n_rows=8
        ).constants
    )
    assert (c["kBodyFormat"], c["kBodyGroup"], c["kBodyZeroPoints"]) == (4, 64, 1)
    assert (c["kHeadFormat"], c["kHeadGroup"], c["kHeadZeroPoints"]) == (3, 32, 0)
    assert (c["kEmbedFormat"], c["kKvFormat"]) == (3, 2)
    assert (c["kBodyUnitK"], c["kBodyUnitBytes"], c["kBodySlotUnits"]) == (64, 512 + 32 + 16, 32)
    untied = dict(specialize(checked(quant=QUANTS["int8-g32"]), H100, n_rows=8).constants)
    assert (untied["kEmbedFormat"], untied["kKvFormat"], untied["kHeadDimPadded"]) == (1, 1, 32)


def test_the_header_defines_each_constant_once() -> None:
    one = specialize(checked(), H100, n_rows=8, times=True)
    found = re.findall(r"^constexpr unsigned (k\w+) = (\d+);$", one.header(), re.MULTILINE)
    assert [(name, int(value)) for name, value in found] == list(one.constants)
    assert len({name for name, _ in found}) == len(found)
    assert dict(one.constants)["kTimes"] == 1
    others = set(re.findall(r"constexpr \w+ (k\w+)", "".join(device_headers().values())))
    assert len(others) > 20
    assert not {name for name, _ in found} & others


SMALL = dataclasses.replace(H100, name="small", shared_bytes=40 << 10)
REFUSED = {
    "capability": (H100, {}, "compute capability 8.6, needed is 9.0"),
    "f32": (H100, {"fmt": F32}, "weights in f32: load with dtype='bf16'"),
    "nf4": (H100, {"quant": QUANTS["nf4-g64"]}, "weights in nf4-g64: load with an int8 or int4 format"),
    "kv": (H100, {"kv": F32}, "KV cache in f32: load with kv_dtype='bf16'"),
    "exact": (H100, {"exact": True}, "exact activations: load without exact"),
    "rows": (H100, {"rows": 17}, "17 rows in a forward, at most 16"),
    "shared": (SMALL, {}, "bytes of shared memory for a block, small has 40,960"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_out_is_refused_by_name(case: str) -> None:
    facts, target, words = REFUSED[case]
    if case == "capability":
        facts = dataclasses.replace(facts, capability=(8, 6))
    found = list(refusals(spec(), cuda_target(**target), facts))  # type: ignore[arg-type]
    assert len(found) == 1
    assert words in found[0]
    with pytest.raises(ff.DeviceError, match=re.escape(words)):
        specialize(checked(**target), facts, n_rows=1)


def test_heads_that_are_too_wide_are_refused() -> None:
    layer = dataclasses.replace(spec().layers[0], head_dim=257)
    wide = dataclasses.replace(spec(), layers=(layer,))
    assert list(refusals(wide, cuda_target(), H100)) == ["head_dim 257, at most 256"]


def test_heads_of_different_widths_are_refused() -> None:
    layer = spec().layers[0]
    for other, n in ((64, 1), (17, 0)):  # 14 and 17 are both padded to 32
        mixed = dataclasses.replace(spec(), layers=(layer, dataclasses.replace(layer, head_dim=other)))
        found = list(refusals(mixed, cuda_target(), H100))
        assert found == ["heads of 32, 64 elements in different layers, of one width in all"][:n]


def test_what_is_supported_is_not_refused() -> None:
    for fmt in FORMATS:
        target = cuda_target(quant=fmt) if fmt.scale_group else cuda_target(fmt=fmt, kv=fmt)
        assert list(refusals(spec(), target, H100)) == []
    both = list(refusals(spec(), cuda_target(fmt=F32, exact=True), H100))
    assert len(both) == 2


def test_shared_memory_is_refused_one_byte_below_what_two_slots_need() -> None:
    program = checked()
    least = next(
        n
        for n in range(40_000, 100_000)
        if not list(refusals(spec(), cuda_target(), dataclasses.replace(H100, shared_bytes=n)))
    )
    facts = dataclasses.replace(H100, shared_bytes=least)
    assert dict(specialize(program, facts, n_rows=1).constants)["kSlots"] == 2
    assert specialize(program, facts, n_rows=1).shared_bytes <= least
    assert row_counts(program.program, facts) == (1,)
    for shared_bytes, n_rows in ((least - 1, 1), (least, 16)):
        with pytest.raises(ff.DeviceError, match="shared memory"):
            specialize(program, dataclasses.replace(facts, shared_bytes=shared_bytes), n_rows=n_rows)


@pytest.mark.parametrize(
    ("facts", "quant", "counts"),
    [
        (H100, BF16, (1, 8, 16)),
        (H100, QUANTS["int4-g32-zp"], (1, 8, 16)),
        (RTX_5090, BF16, (1, 8)),
        (RTX_5090, QUANTS["int8-g32"], (1, 8)),
        (RTX_5090, QUANTS["int4-g32-zp"], (1, 4)),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_kernels_are_made_for_the_rows_that_fit(facts: DeviceFacts, quant: Format, counts: tuple[int, ...]) -> None:
    """With at least three slots each."""
    target = {"quant": quant} if quant.scale_group else {"fmt": quant}
    program = checked(WIDE, n_workers=3, **target)  # of many tiles, whose accumulators take what slots leave
    assert row_counts(program.program, facts) == counts
    for n_rows in counts:
        assert specialize(program, facts, n_rows=n_rows).n_slots >= 3
    for n_rows in {4, 8, 16} - {*counts, 4 if 8 in counts else 0}:
        with suppress(ff.DeviceError):
            assert specialize(program, facts, n_rows=n_rows).n_slots == 2


def test_one_row_leaves_the_ring_most_of_shared_memory() -> None:
    one = specialize(checked(n_workers=132), H100, n_rows=1)
    assert one.n_slots * one.slot_bytes > 200 << 10


def test_what_the_phases_need_is_switched_on() -> None:
    def switches(model: ModelSpec) -> tuple[int, ...]:
        constants = dict(specialize(checked(model), H100, n_rows=8).constants)
        return tuple(constants[name] for name in ("kFours", "kUsesFolds", "kUsesQkNorm", "kUsesScoreCap"))

    assert switches(spec(d_model=64, d_ff=96, head_dim=32)) == (1, 0, 0, 0)
    assert switches(spec(d_model=62, d_ff=96, head_dim=32))[0] == 0
    assert switches(spec(d_model=64, d_ff=96, head_dim=14))[0] == 0
    assert switches(spec(d_model=64, d_ff=90, head_dim=32))[0] == 0
    every = spec(d_model=64, d_ff=96, head_dim=32, qk_norm=QkNorm.HEAD, post_norm=True, score_softcap=50.0)
    assert switches(every) == (1, 1, 1, 1)


# ---- the argument ------------------------------------------------------------------------------------------------

DEVICE_TYPES = {"i32": "<i4", "u32": "<u4", "f32": "<f4", "u64": "<u8", "i64": "<i8"}


def test_the_argument_is_laid_out_as_on_the_device() -> None:
    """Every field of launch.cuh in its order, and the offsets that C++ gives them."""
    body = re.search(r"struct Launch \{(.*?)\n\n", device_headers()["launch.cuh"], re.DOTALL)
    assert body is not None
    fields = re.findall(r"^  (?:const )?(\w+)(\*?) (\w+)(\[kMaxRows\])?;", body[1], re.MULTILINE)
    assert [name for *_, name, _ in fields] == list(LAUNCH.names or ())
    at = 0
    for kind, pointer, name, array in fields:
        dtype, offset = LAUNCH.fields[name][:2]  # type: ignore[index]
        base = "<u8" if pointer else DEVICE_TYPES[kind]
        assert (dtype.base.str, dtype.shape) == (base, (16,) if array else ()), name
        at = -(-at // dtype.base.itemsize) * dtype.base.itemsize
        assert offset == at, name
        at += dtype.itemsize
    assert LAUNCH.itemsize == -(-at // 8) * 8
    assert f"sizeof(Launch) == {LAUNCH.itemsize}" in device_headers()["launch.cuh"]


def test_sites_are_known_by_number() -> None:
    assert len(site_names()) == device_headers()["sites.h"].count("  X(k") > 10
    assert all(site_names())


def test_every_product_of_the_wide_model_but_one_is_cut() -> None:
    program = cuda_program(WIDE)
    assert all(len(phase.matrix.item_bytes) > 1 for phase in program.phases if phase.matrix and phase.op != "o_proj")
