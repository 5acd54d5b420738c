"""Whole forwards of the CUDA kernel, its host side included, on the simulated GPU: logits and tokens. Every access of
every launch is checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import families
import pytest
import torch
from gpu_on_host.host_gpu import BUILDER
from gpu_on_host.whole import CTX, F32, PLAN, STREAMS, Case, error, exact_reference, load, run_plan, text
from spec_forward import spec_logits
from tiny import tiny

from flashformer.formats import FORMATS, QUANTS
from flashformer.model.spec import Activation, LayerSpec, ModelSpec
from flashformer.program import Target

# Unit roundoff of what is rounded to a format: half of the distance from 1 to the next number.
ROUNDOFF = {"bf16": 2.0**-9, "f16": 2.0**-12}

CASES = [
    Case("Llama", 4, "bf16", "", "", "bf16", 2),
    Case("Llama", 2, "f16", "int4-g64", "int4-g64-zp", "f16", 3),
    Case("Mistral", 2, "bf16", "int8-g32", "", "f16", 3),
    Case("Qwen2", 1, "bf16", "int4-g128-zp", "int8-g128", "bf16", 8),
    Case("Qwen3", 1, "f16", "", "", "f16", 5),
    Case("Granite", 0, "bf16", "int4-g32", "", "bf16", 4),
    Case("SmolLM3", 0, "bf16", "", "int8-g64", "f16", 7),
    Case("Olmo2", 1, "bf16", "", "", "f16", 3),
    Case("Phi3", 1, "f16", "int8-g128", "int8-g32", "bf16", 6),
    Case("Gemma2", 0, "bf16", "", "", "bf16", 2),
    Case("Gemma2", 2, "f16", "", "int4-g32-zp", "bf16", 4),
    Case("Gemma3", 0, "f16", "int8-g64", "int4-g128", "f16", 5),
]
BF16_CASES = [case for case in CASES if (case.stored, case.body, case.head) == ("bf16", "", "")]

FAMILIES = list(dict.fromkeys(case.architecture.removesuffix("ForCausalLM") for case in families.CASES))
BODIES = ["bf16", "f16", *(name for name, fmt in QUANTS.items() if not fmt.codebook)]
OTHERS = [name for name in BODIES if name not in ("bf16", "int8-g128")]


def every_pair() -> Iterator[Case]:
    """Every family in every format; what else there is varies along."""
    for (i, family), (j, body) in product(enumerate(FAMILIES), enumerate(BODIES)):
        stored = body if body in ROUNDOFF else ("bf16", "f16")[(i + j) % 2]
        head = ("", BODIES[2 + (i + j) % (len(BODIES) - 2)])[(i + j // 2) % 2]
        quant = "" if body in ROUNDOFF else body
        yield Case(family, (3 * i + j) % 10, stored, quant, head, ("bf16", "f16")[(i + j // 3) % 2], 2 + (i + j) % 7)


@pytest.fixture(scope="module", autouse=True)
def _built_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels of the cases whose tests will run, while the first of them runs."""
    here = [item for item in request.session.items if item.path == request.path]
    calls = [getattr(item, "callspec", None) for item in here]
    for case in dict.fromkeys(call.params["case"] for call in calls if call is not None and "case" in call.params):
        if case in CASES:
            case.load(gpu={"ahead": True}).close()
    yield
    BUILDER.give_up()


@cache
def logits(case: Case) -> list[F32]:
    return run_plan(case.load())


def tolerance(spec: ModelSpec, body: str, head: str, kv: str) -> float:
    """Of the error of logits, relative, in the mean: twice what rounding makes of it. `body` and `head`: what their
    inputs are rounded to.

    Rounding to a format moves a value by up to its unit roundoff u, and errors of many values add up as their squares
    do. A layer rounds the inputs of four products to the format of x; queries, keys, values and weights of attention
    to that of the KV cache; and lm_head rounds once more. What is rounded of queries and keys moves a weight by u times
    the score, which is about attention_scale sqrt(head_dim) for numbers of about 1. Were every branch all that is in
    the residual, all these errors would count in full, and their squares would be summed here.
    """
    squares = ROUNDOFF[head] ** 2
    for layer in spec.layers:
        score = max(1.0, layer.attention_scale * layer.head_dim**0.5)
        squares += 4 * ROUNDOFF[body] ** 2 + (2 + 2 * score**2) * ROUNDOFF[kv] ** 2
    return 2.0 * float(squares**0.5)


def tolerance_of(case: Case) -> float:
    body, head = ("f16" if quant else case.stored for quant in (case.body, case.head))
    return tolerance(case.tiny().spec, body, head, case.kv)


def test_cases_cover_pairs() -> None:
    """Of kind of format, KV format, head in a format of its own, tied head; and every format, family, number of blocks
    and of rows there is."""
    kinds = {
        (case.body.split("-")[0] or case.stored, case.kv, bool(case.head), case.tiny().spec.tied) for case in CASES
    }
    for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        values = [{kind[i] for kind in kinds} for i in (a, b)]
        assert {(kind[a], kind[b]) for kind in kinds} == set(product(*values)), (a, b)
    formats = {case.body or case.stored for case in CASES} | {case.head for case in CASES if case.head}
    assert formats == set(BODIES)
    assert {case.family for case in CASES} == set(FAMILIES)
    assert {case.blocks for case in CASES} == set(range(2, 9))
    assert {sum(n for _, n in runs) for runs in PLAN} == {1, 2, 5, 8, 16}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_the_reference(case: Case) -> None:
    assert 0 < error(logits(case), run_plan(case.reference())) < tolerance_of(case)


@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_bf16_errs_no_more_than_transformers(case: Case) -> None:
    """Both run the same bf16 weights; the judge is float64."""
    model, found = case.tiny(), logits(case)
    ids = [text(model.spec, slot, len(rows)) for slot, rows in enumerate(found)]
    truth = [spec_logits(model.spec, model.tensors, some, CTX) for some in ids]
    oracle = deepcopy(model.oracle)
    for parameter in oracle.parameters():
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        theirs = [oracle(torch.tensor([some])).logits[0].float().numpy() for some in ids]
    assert 0 < error(found, truth) <= error(theirs, truth)


@pytest.mark.parametrize("case", [CASES[2], CASES[7]], ids=str)
def test_keys_of_two_chunks(case: Case) -> None:
    """300 positions: two chunks of keys, merged where no window hides the first."""
    plan = [[(1, 16)]] * 18 + [[(1, 8)], [(1, 3)], [(1, 1)]]
    found, expected = run_plan(case.load(), plan), run_plan(case.reference(), plan)
    assert 0 < error([found[1][200:]], [expected[1][200:]]) < tolerance_of(case)


@pytest.mark.parametrize("body", ["bf16", "int8-g128", *(pytest.param(b, marks=pytest.mark.long) for b in OTHERS)])
def test_k_of_several_slices(body: str) -> None:
    """Inputs of 2080 and 4200 elements, of which shared memory holds 2048 at once."""
    stored = "f16" if body == "f16" else "bf16"
    sizes = {"hidden_size": 2080, "intermediate_size": 4200, "num_hidden_layers": 1, "head_dim": 32}
    model = tiny(1, stored=stored, scale=1.2 / 2080**0.5, **sizes)
    target = Target(4, FORMATS[stored], FORMATS[stored], 16, STREAMS, CTX, body_quant=QUANTS.get(body))
    plan = [[(0, 5)], [(0, 1)]]
    found = run_plan(load(model.spec, model.tensors, target), plan)
    expected = run_plan(exact_reference(model.spec, model.tensors, target), plan)
    assert 0 < error(found, expected) < tolerance(model.spec, "f16" if body in QUANTS else stored, stored, stored)


@pytest.mark.long
@pytest.mark.parametrize("case", list(every_pair()), ids=str)
def test_every_family_in_every_format(case: Case) -> None:
    assert 0 < error(run_plan(case.load(gpu={"ahead": True})), run_plan(case.reference())) < tolerance_of(case)


ALTERED: dict[str, Callable[[LayerSpec], dict[str, Any]]] = {
    "scores 3 percent larger": lambda layer: {"attention_scale": layer.attention_scale * 1.03},
    "scores capped at 20": lambda layer: {"score_softcap": 20.0},
    "branches 1 percent larger": lambda layer: {"residual_multiplier": 1.01},
    "epsilon 1e-3": lambda layer: {"norm_eps": 1e-3},
    "another theta": lambda layer: {"rope": layer.rope and replace(layer.rope, theta=layer.rope.theta * 1.1)},
    "no qk norm": lambda layer: {"qk_norm": None},
    "no biases": lambda layer: {"qkv_bias": False},
    "a window of 20": lambda layer: {"window": 20},
    "another activation": lambda layer: {"activation": Activation.GELU_TANH},
}


@pytest.mark.parametrize("name", ALTERED)
def test_the_tolerance_finds_mistakes(name: str) -> None:
    """Each is one that a kernel could make, in a model of which 24 and 9 positions are computed."""
    case = CASES[4]
    model = case.tiny()
    layers = tuple(replace(layer, **ALTERED[name](layer)) for layer in model.spec.layers)
    altered = exact_reference(replace(model.spec, layers=layers), model.tensors, case.target())
    assert error(run_plan(altered), run_plan(case.reference())) > tolerance_of(case)
