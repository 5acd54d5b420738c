"""Mutated files against the parsers of what others made: ours are the only errors, time and memory are bounded.

Each target runs over its corpus as it is and then over mutations of it: for 2 s from a fixed seed, with --long for 60 s
from a fresh one. An input that breaks a target is printed; it belongs into the corpus.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from folders import CONFIG
from mutations import join_weights, mutate_bytes, mutate_json, split_weights
from weight_files import random_tensors, write_shards

from flashformer.backends.packed import layout, require_given
from flashformer.checkpoint.files import parse_json
from flashformer.checkpoint.folder import has_tensors, open_tensors
from flashformer.checkpoint.packed import PAGE, PackedFormats, encode_header, find_packed
from flashformer.checkpoint.safetensors import open_safetensors
from flashformer.checkpoint.template import ChatTemplate
from flashformer.errors import FlashformerError, LoadError, RequestError
from flashformer.formats import BF16, F32, QUANTS
from flashformer.model import bind, read_family, read_spec, shape_config, shape_names
from flashformer.program import Program, build
from flashformer.program import Target as ProgramTarget

CORPUS = Path(__file__).parent / "corpus"
SHORT_S, LONG_S = 2.0, 60.0
MESSAGE_CHARS = 3000
INPUT_S = 1.0  # of CPU time, for one input
SPARE_BYTES = 2**30  # of address space beyond what is in use at the start
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_end|>"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]


@dataclass(frozen=True)
class Target:
    """`mutate` makes an input from a seed and all seeds; `run` takes one, `errors` are all that it may raise."""

    seeds: list[bytes]
    mutate: Callable[[random.Random, bytes, list[bytes]], bytes]
    run: Callable[[bytes], None]
    errors: tuple[type[FlashformerError], ...] = (LoadError,)


def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def json_or_bytes(rng: random.Random, seed: bytes, seeds: list[bytes]) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(rng, seed, seeds)
    values = [json.loads(s) for s in (seed, rng.choice(seeds))]
    return mutate_json(rng, values[0], values[1:])


def header_target(tmp_path: Path) -> Target:
    path = tmp_path / "model.safetensors"

    def mutate(rng: random.Random, seed: bytes, seeds: list[bytes]) -> bytes:
        if rng.random() < 0.2:
            return mutate_bytes(rng, seed, seeds)
        header, data = split_weights(seed)
        header = json_or_bytes(rng, header, [split_weights(s)[0] for s in seeds])
        return join_weights(header, data if rng.random() < 0.8 else mutate_bytes(rng, data, seeds))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        tensors = open_safetensors(path)
        assert b"".join(t.data.tobytes() for t in tensors.values()) == split_weights(data)[1]

    return Target(corpus("header"), mutate, run)


def index_target(tmp_path: Path) -> Target:
    weight_map = write_shards(tmp_path, random_tensors())
    (tmp_path / "sub").mkdir()

    def run(data: bytes) -> None:
        (tmp_path / "model.safetensors.index.json").write_bytes(data)
        has_tensors(tmp_path)
        assert open_tensors(tmp_path).keys() <= weight_map.keys()

    return Target(corpus("index"), json_or_bytes, run)


def config_target(tmp_path: Path) -> Target:
    def run(data: bytes) -> None:
        config = parse_json(data, "config.json")
        spec = read_spec(config, config)
        with pytest.raises(LoadError, match="tensors do not fit"):
            bind(read_family(config), spec, {})

    shapes = [json.dumps(shape_config(name)).encode() for name in shape_names()]
    return Target(corpus("config") + shapes, json_or_bytes, run)


def template_target(tmp_path: Path) -> Target:
    def run(data: bytes) -> None:
        template = ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>", "eos_token": "</s>"})
        text = template.render(MESSAGES, add_generation_prompt=True)
        assert isinstance(text, str)

    return Target(corpus("template"), mutate_bytes, run, (LoadError, RequestError))


def packed_target(tmp_path: Path) -> Target:
    """Packed files whose digest is right, so that what they say of themselves is looked at; the weights are zeros."""
    spec = read_spec(CONFIG)

    def program(formats: PackedFormats, tied: bool) -> Program:
        target = ProgramTarget(
            1, formats.weights, F32, 64, 1, 96, body_quant=formats.body_quant, head_quant=formats.head_quant
        )
        return build(replace(spec, tied=tied), target)

    def made(formats: PackedFormats, tied: bool) -> bytes:
        found = layout(program(formats, tied))
        return encode_header(
            {"formats": formats.to_json(), "tied": tied, "layout": found, "original": "m", "error": {"kl": 0.5}}
        )

    def finished(header: bytes) -> bytes:
        sums = bytes(8)
        size = -(-program(quantized, True).memory.weights_bytes // PAGE) * PAGE
        return header + bytes(size) + sums + hashlib.sha256(header + sums).digest()

    def mutate(rng: random.Random, seed: bytes, seeds: list[bytes]) -> bytes:
        if rng.random() < 0.2:
            return mutate_bytes(rng, seed, seeds)
        texts = [s[16 : 16 + int.from_bytes(s[8:16], "little")] for s in (seed, *seeds)]
        text = json_or_bytes(rng, texts[0], texts[1:])
        size = -(-(16 + len(text)) // PAGE) * PAGE
        return finished((seed[:8] + len(text).to_bytes(8, "little") + text).ljust(size))

    def run(data: bytes) -> None:
        (tmp_path / "weights.ffpack").write_bytes(data)
        given = find_packed(tmp_path)
        assert given is not None
        require_given(program(given.formats, given.tied), given)

    quantized = PackedFormats(BF16, QUANTS["int4-g32"], QUANTS["int8-g128"])
    same = made(quantized, True)
    return Target([finished(same), finished(same.replace(b'"m"', b'"n"'))], mutate, run)


TARGETS = {
    "header": header_target,
    "index": index_target,
    "config": config_target,
    "template": template_target,
    "packed": packed_target,
}


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Allocations beyond SPARE_BYTES raise MemoryError, which is not ours."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def accepts(target: Target, data: bytes, what: str) -> bool:
    """Whether the target takes the input; fails the test for any error but its own, and for slowness."""
    begin, said = time.process_time(), ""
    try:
        target.run(data)
        accepted = True
    except target.errors as error:
        accepted, said = False, str(error)
    except BaseException as error:
        pytest.fail(f"{what}: {type(error).__name__}: {str(error)[:300]}; input: {data[:20000]!r}")
    assert len(said) < MESSAGE_CHARS, f"{what}: {said[:300]}... ({len(said)} characters); input: {data[:20000]!r}"
    spent = time.process_time() - begin
    assert spent < INPUT_S, f"{what}: {spent:.2f} s; input: {data[:20000]!r}"
    return accepted


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_itself(name: str, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path)
    accepted = [accepts(target, seed, f"seed {i}") for i, seed in enumerate(target.seeds)]
    assert sum(accepted) >= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jinja2's, of escapes in templates
@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    long = bool(request.config.getoption("--long"))
    seed = random.SystemRandom().randrange(2**32) if long else 0
    rng, target, counts = random.Random(seed), TARGETS[name](tmp_path), [0, 0]
    end = time.monotonic() + (LONG_S if long else SHORT_S)
    with bounded_memory():
        while time.monotonic() < end:
            data = target.mutate(rng, rng.choice(target.seeds), target.seeds)
            counts[accepts(target, data, f"{name}, seed {seed}, input {sum(counts)}")] += 1
    print(f"{name}: seed {seed}, {counts[0]} refused, {counts[1]} accepted")
    assert counts[0] > 50
    assert counts[1] > 0
