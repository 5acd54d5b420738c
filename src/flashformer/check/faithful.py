"""Faithful: every phase has the tensors, switches and factors that the model says; no branch is lost or added twice.

The phases must stand in the order that coverage proves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..model.spec import LayerSpec, ModelSpec
from ..program.ir import Fold, Op, Order, Phase, Program, Space, Vector
from .facts import Finding, phase_name

RULE = "faithful"


def faithful(program: Program) -> tuple[list[Finding], dict[str, int]]:
    """Findings, and how many properties of phases were compared with the model."""
    findings, n_compared = [], 0
    for index, phase in enumerate(program.phases):
        wanted = _wanted(program.spec, phase)
        found = _found(phase)
        n_compared += len(wanted)
        for name, value in wanted.items():
            if found[name] != value:
                message = f"{phase_name(program, index)}: {name} is {found[name]}, the model says {value}"
                findings.append(Finding(RULE, message))
    for index, adds in _added_by(program):
        if program.phases[index].fold != program.phases[adds].fold:
            message = f"{phase_name(program, index)} and {phase_name(program, adds)} differ in what the residual lacks"
            findings.append(Finding(RULE, message))
    return findings, {"faithful": n_compared}


def _found(phase: Phase) -> dict[str, Any]:
    return {
        "matrix": (phase.matrix.roles, phase.matrix.order) if phase.matrix else None,
        "norm": _roles(phase.norm),
        "norm_eps": phase.norm_eps,
        "bias": _roles(phase.bias),
        "q_norm": _roles(phase.q_norm),
        "k_norm": _roles(phase.k_norm),
        "scale": phase.scale,
        "to": phase.to,
        "fold": _fold_facts(phase.fold),
    }


def _roles(vector: Vector | None) -> tuple[str, ...] | None:
    return None if vector is None else vector.roles


def _fold_facts(fold: Fold | None) -> tuple[Any, ...] | None:
    return None if fold is None else (fold.space, fold.norm.roles, fold.norm_eps, fold.scale)


def _wanted(spec: ModelSpec, phase: Phase) -> dict[str, Any]:
    """What `_found` must give. Nothing applies where the op does not use it."""
    wanted: dict[str, Any] = dict.fromkeys(("matrix", "norm", "bias", "q_norm", "k_norm", "fold"))
    wanted |= {"norm_eps": 0.0, "scale": 1.0, "to": Space.RESIDUAL}
    match phase.op:
        case Op.EMBED:
            wanted["scale"] = spec.embed_multiplier
        case Op.LM_HEAD:
            wanted |= {
                "matrix": (("embed" if spec.tied else "lm_head",), Order.PLAIN),
                "norm": ("final_norm",),
                "norm_eps": spec.final_norm_eps,
                "scale": spec.logits_multiplier,
                "fold": _lacking(spec, spec.n_layers, Space.FFN_OUT),
            }
        case Op.SAMPLE:
            pass
        case _:
            wanted |= _wanted_in_layer(spec, spec.layers[phase.layer], phase)
    return wanted


def _wanted_in_layer(spec: ModelSpec, layer: LayerSpec, phase: Phase) -> dict[str, Any]:
    i = phase.layer

    def roles(*names: str) -> tuple[str, ...]:
        return tuple(f"layers.{i}.{name}" for name in names)

    def given(present: bool, *names: str) -> tuple[str, ...] | None:
        return roles(*names) if present else None

    before, within = _lacking(spec, i, Space.FFN_OUT), _lacking(spec, i + 1, Space.ATTENTION_OUT)
    branch_scale = 1.0 if layer.post_norm else layer.residual_multiplier
    qk_norm = layer.qk_norm is not None
    wanted: dict[Op, dict[str, Any]] = {
        Op.QKV: {
            "matrix": (roles("q", "k", "v"), Order.PLAIN),
            "norm": given(layer.pre_norm, "attn_norm"),
            "norm_eps": layer.norm_eps,
            "bias": given(layer.qkv_bias, "q_bias", "k_bias", "v_bias"),
            "fold": before,
        },
        Op.ATTEND: {
            "norm_eps": layer.norm_eps,
            "q_norm": given(qk_norm, "q_norm"),
            "k_norm": given(qk_norm, "k_norm"),
        },
        Op.O_PROJ: {
            "matrix": (roles("o"), Order.PLAIN),
            "bias": given(layer.o_bias, "o_bias"),
            "scale": branch_scale,
            "to": Space.ATTENTION_OUT if layer.post_norm else Space.RESIDUAL,
            "fold": before,
        },
        Op.GATE_UP: {
            "matrix": (roles("gate", "up"), Order.ALTERNATE),
            "norm": given(layer.pre_norm, "ffn_norm"),
            "norm_eps": layer.norm_eps,
            "bias": given(layer.mlp_bias, "gate_bias", "up_bias"),
            "fold": within,
        },
        Op.DOWN: {
            "matrix": (roles("down"), Order.PLAIN),
            "bias": given(layer.mlp_bias, "down_bias"),
            "scale": branch_scale,
            "to": Space.FFN_OUT if layer.post_norm else Space.RESIDUAL,
            "fold": within,
        },
    }
    return wanted[phase.op]


def _lacking(spec: ModelSpec, n_layers: int, space: Space) -> tuple[Any, ...] | None:
    """The branch of layer n_layers - 1 that waits in `space` for its norm, as `_fold_facts` gives it."""
    if n_layers == 0 or not spec.layers[n_layers - 1].post_norm:
        return None
    layer, i = spec.layers[n_layers - 1], n_layers - 1
    name = "attn_post_norm" if space is Space.ATTENTION_OUT else "ffn_post_norm"
    return (space, (f"layers.{i}.{name}",), layer.norm_eps, layer.residual_multiplier)


def _added_by(program: Program) -> Iterator[tuple[int, int]]:
    """(phase that folds a branch in, phase that adds it to the residual)."""
    for index, phase in enumerate(program.phases):
        if phase.op is Op.QKV:
            yield index, index + 2
        elif phase.op is Op.GATE_UP:
            yield index, index + 1
