"""What every family's config and tensors mean, without a kernel: spec_forward against transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from families import CASES, CTX, Case
from spec_forward import spec_logits
from tiny import BASE, relative_error

from flashformer.model import Activation, LayerSpec, ModelSpec, RopeKind, RopeSpec, read_spec

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_spec_and_weights_compute_what_transformers_computes(case: Case) -> None:
    model = case.make()
    ids = case.prompt()
    found = spec_logits(model.spec, model.tensors, ids, CTX)
    assert relative_error(found, model.logits(ids)) <= 2e-5
    assert len(model.spec.layers) == case.config["num_hidden_layers"]


@every_case
def test_config_means_the_same_as_written_and_as_saved_by_transformers(case: Case) -> None:
    written = {k: v for k, v in (BASE | case.config).items() if (k, v) != ("head_dim", None)}
    written |= {"architectures": [case.architecture]}
    assert read_spec(written) == case.make().spec


def without_features(spec: ModelSpec) -> dict[str, ModelSpec]:
    """The spec with each of its features left out or, where it has none, put in; by name."""

    def layers(**change: Any) -> ModelSpec:
        return replace(spec, layers=tuple(replace(layer, **change) for layer in spec.layers))

    def ropes(change: Callable[[LayerSpec, RopeSpec], RopeSpec]) -> ModelSpec:
        changed = (replace(la, rope=la.rope and change(la, la.rope)) for la in spec.layers)
        return replace(spec, layers=tuple(changed))

    first = spec.layers[0]
    variants = {
        "scaled rope": ropes(lambda layer, rope: RopeSpec(RopeKind.DEFAULT, rope.theta, rope.rotary_dim)),
        "rope theta": ropes(lambda layer, rope: replace(rope, theta=rope.theta * 1.1)),
        "two ropes": ropes(lambda layer, rope: spec.ropes[0]),
        "partial rope": ropes(lambda layer, rope: replace(rope, rotary_dim=rope.rotary_dim - 2)),
        "rope factor of attention": ropes(lambda layer, rope: replace(rope, attention_factor=1.0)),
        "layers without rope": layers(rope=spec.ropes[0] if spec.ropes else RopeSpec(RopeKind.DEFAULT, 1e4, 2)),
        "window": layers(window=None),
        "score softcap": layers(score_softcap=None),
        "residual multiplier": layers(residual_multiplier=1.0),
        "attention scale": layers(attention_scale=first.attention_scale * 1.05),
        "activation": layers(activation=next(a for a in Activation if a is not first.activation)),
        "embed multiplier": replace(spec, embed_multiplier=1.0),
        "logits multiplier": replace(spec, logits_multiplier=1.0),
        "logits softcap": replace(spec, logits_softcap=None),
    }
    long_factors = {rope.long_factors for rope in spec.ropes} - {()}
    if long_factors or max((rope.rotary_dim for rope in spec.ropes), default=0) <= 2:
        del variants["partial rope"]  # its lists of factors are as long
    return {name: variant for name, variant in variants.items() if variant != spec}


@every_case
def test_every_feature_of_a_case_matters(case: Case) -> None:
    """Else neither the comparison above nor those of the kernels would notice that it is not computed."""
    model, ids = case.make(), case.prompt()
    expected = model.logits(ids)
    for name, spec in without_features(model.spec).items():
        assert relative_error(spec_logits(spec, model.tensors, ids, CTX), expected) > 1e-3, name


def test_the_table_covers_every_feature() -> None:
    specs = {case.name: case.make().spec for case in CASES}
    assert Counter(case.architecture for case in CASES) == dict.fromkeys({c.architecture for c in CASES}, 10)
    ropes = [rope for spec in specs.values() for rope in spec.ropes]
    assert Counter(rope.kind for rope in ropes).keys() == set(RopeKind)
    kinds_by_family = {(name.split("-")[0], rope.kind) for name, spec in specs.items() for rope in spec.ropes}
    assert all(sum(kind is k for _, kind in kinds_by_family) >= 5 for k in RopeKind if k is not RopeKind.DEFAULT)
    layers = [layer for spec in specs.values() for layer in spec.layers]
    for values in (
        {layer.pre_norm for layer in layers},
        {layer.post_norm for layer in layers},
        {layer.qkv_bias for layer in layers},
        {layer.o_bias for layer in layers},
        {layer.mlp_bias for layer in layers},
        {layer.rope is None for layer in layers},
        {layer.window is None for layer in layers},
        {layer.score_softcap is None for layer in layers},
        {layer.rope is not None and layer.rope.rotary_dim < layer.head_dim for layer in layers},
        {layer.residual_multiplier != 1 for layer in layers},
        {spec.tied for spec in specs.values()},
        {spec.logits_softcap is None for spec in specs.values()},
        {spec.logits_multiplier != 1 for spec in specs.values()},
        {spec.embed_multiplier != 1 for spec in specs.values()},
        {len(spec.ropes) > 1 for spec in specs.values()},
        {len({layer.window for layer in spec.layers}) > 1 for spec in specs.values()},
        {case.config["head_dim"] is None for case in CASES},
    ):
        assert values == {True, False}
    assert len({layer.qk_norm for layer in layers}) == 3
    assert len({layer.activation for layer in layers}) == 2
    assert len({layer.n_heads // layer.n_kv_heads for layer in layers}) >= 6
    assert {spec.n_layers for spec in specs.values()} == {1, 2, 3, 4, 5, 6}
    assert np.ptp([spec.vocab_size for spec in specs.values()]) >= 1400
