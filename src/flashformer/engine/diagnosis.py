"""Why a model does not run here, or that it does: every step of a load tried by itself, as far as those before allow.

Reads no weights and downloads none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from ..backends.packed import require_given
from ..checkpoint import Checkpoint, PackedWeights, Tokenizer, open_checkpoint
from ..errors import FlashformerError, LoadError
from ..formats import BF16, Format
from ..model import ModelSpec, bind, read_family, read_spec, shape_config
from ..model.load import as_stored, require_vocabulary, stated_format, stored_format
from ..model.random import PREFIX
from ..program import build
from .setup import Options, require_memory, set_up

T = TypeVar("T")

MAX_REFUSALS = 32
GREETING = ({"role": "user", "content": "Hello"},)


class Verdict(StrEnum):
    OK = "ok"
    REFUSED = "refused"
    UNTRIED = "not tried"


@dataclass(frozen=True)
class Step:
    """`messages`: what was found, or every reason for the refusal. A model runs without a step that is not `needed`."""

    name: str
    verdict: Verdict
    messages: tuple[str, ...]
    needed: bool = True


@dataclass
class Diagnosis:
    """The steps of one model, in order."""

    model: str
    steps: list[Step] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return not any(step.needed and step.verdict is Verdict.REFUSED for step in self.steps)

    def to_json(self) -> dict[str, object]:
        steps = [{"name": s.name, "verdict": s.verdict.value, "messages": list(s.messages)} for s in self.steps]
        return {"model": self.model, "runs": self.runs, "steps": steps}

    def note(self, name: str, verdict: Verdict, *messages: str, needed: bool = True) -> None:
        self.steps.append(Step(name, verdict, messages, needed))

    def attempt(self, name: str, make: Callable[[], T], say: Callable[[T], str], *, needed: bool = True) -> T | None:
        """The result, which `say` describes, or None where it is refused."""
        try:
            result = make()
            self.note(name, Verdict.OK, say(result), needed=needed)
        except FlashformerError as e:
            self.note(name, Verdict.REFUSED, str(e), needed=needed)
            return None
        return result


def diagnose(model: str, options: Options, *, revision: str | None = None, offline: bool = False) -> Diagnosis:
    """Tries to load `model` step by step. Raises nothing of ours: what fails is in the steps."""
    found = Diagnosis(model)
    if model.startswith(PREFIX):
        config = found.attempt(
            "files", lambda: shape_config(model.removeprefix(PREFIX)), lambda _: "random weights, made in memory"
        )
        spec = None if config is None else _try_config(found, config, {})
        _try_memory(found, spec, BF16, options)
        return found
    checkpoint = found.attempt(
        "files",
        lambda: open_checkpoint(model, revision=revision, offline=offline),
        lambda c: f"{c.path}",
    )
    if checkpoint is None:
        return found
    spec = _try_config(found, checkpoint.config, checkpoint.generation_config)
    packed = None
    if _has_packed(checkpoint):
        spec, packed = _try_packed(found, checkpoint, spec, options)
        stored = packed.formats.weights if packed else None
    else:
        spec, stored = _try_tensors(found, checkpoint, spec)
    _try_tokenizer(found, checkpoint, spec)
    _try_memory(found, spec, stored, options, packed)
    return found


def config_refusals(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> list[str]:
    """What `read_spec` says of a config, MAX_REFUSALS times at most: each time the keys it names are taken out."""
    left, refusals = dict(config), list[str]()
    while len(refusals) < MAX_REFUSALS:
        try:
            read_spec(left, generation_config)
        except LoadError as e:
            blamed = [key for key in left if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", str(e))]
            if blamed or not refusals:  # a message without such keys is about what was taken out
                refusals.append(str(e))
            if not blamed or "architectures" in blamed or "model_type" in blamed:
                break
            for key in blamed:
                del left[key]
        else:
            break
    return refusals


def _try_config(found: Diagnosis, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelSpec | None:
    refusals = config_refusals(config, generation)
    if refusals:
        found.note("config", Verdict.REFUSED, *refusals)
        return None
    spec = read_spec(config, generation)
    found.note(
        "config",
        Verdict.OK,
        f"{read_family(config).architecture}: {spec.n_layers} layers of width {spec.d_model}, "
        f"vocabulary {spec.vocab_size}, {spec.max_positions} positions",
    )
    return spec


def _try_tensors(
    found: Diagnosis, checkpoint: Checkpoint, spec: ModelSpec | None
) -> tuple[ModelSpec | None, Format | None]:
    """The spec as the tensors refine it, and their format."""
    if not _at_hand(checkpoint):
        found.note("tensors", Verdict.UNTRIED, "not downloaded yet; `flashformer run` downloads them")
        stated = found.attempt(
            "format", lambda: stated_format(checkpoint.config), lambda f: f[1] or f"config.json says {f[0].name}"
        )
        return spec, stated[0] if stated else None
    tensors = found.attempt("tensors", lambda: checkpoint.tensors, lambda t: f"{len(t)} in {checkpoint.path}")
    if tensors is None or spec is None:
        return spec, None
    weights = found.attempt(
        "fit",
        lambda: bind(read_family(checkpoint.config), spec, tensors),
        lambda w: f"{len(w)} weights, names and shapes as the config implies",
    )
    return (spec, None) if weights is None else (as_stored(spec, weights), stored_format(weights))


def _has_packed(checkpoint: Checkpoint) -> bool:
    try:
        return checkpoint.packed is not None
    except LoadError:  # which trying it will say again
        return True


def _try_packed(
    found: Diagnosis, checkpoint: Checkpoint, spec: ModelSpec | None, options: Options
) -> tuple[ModelSpec | None, PackedWeights | None]:
    """The spec as the packed file refines it, and that file."""

    def make() -> PackedWeights:
        packed = checkpoint.packed
        assert packed is not None
        return packed

    packed = found.attempt("packed", make, lambda p: f"{p.file.path}, made from {p.original}")
    if packed is None or spec is None:
        return spec, packed
    refined = as_stored(spec, packed)

    def fit() -> PackedWeights:
        setup = set_up(refined, packed.formats.weights, options, packed.formats)
        require_given(build(refined, setup.target), packed)
        return packed

    found.attempt("fit", fit, lambda p: f"{p.file.n_bytes} bytes, header and layout as the config implies")
    return refined, packed


def _at_hand(checkpoint: Checkpoint) -> bool:
    """Whether the weights can be looked at without a download."""
    try:
        return checkpoint.at_hand
    except LoadError:  # which reading them will say again
        return True


def _try_tokenizer(found: Diagnosis, checkpoint: Checkpoint, spec: ModelSpec | None) -> None:
    def make() -> Tokenizer:
        tokenizer = checkpoint.tokenizer
        if spec is not None:
            require_vocabulary(tokenizer, spec)
        return tokenizer

    tokenizer = found.attempt("tokenizer", make, lambda t: f"{t.vocab_size} ids")
    if tokenizer is None:
        return
    if tokenizer.chat_template is None:
        found.note("chat template", Verdict.UNTRIED, "there is none: the model takes prompts, no chats", needed=False)
        return
    found.attempt(
        "chat template",
        lambda: tokenizer.render_chat(GREETING),
        lambda text: f"a greeting becomes {len(text)} characters",
        needed=False,
    )


def _try_memory(
    found: Diagnosis,
    spec: ModelSpec | None,
    stored: Format | None,
    options: Options,
    packed: PackedWeights | None = None,
) -> None:
    if spec is None or stored is None:
        found.note("memory", Verdict.UNTRIED, "needs a config and tensors that are accepted")
        return

    def make() -> str:
        setup = set_up(spec, stored, options, packed.formats if packed else None)
        memory = build(spec, setup.target).memory
        require_memory(memory, setup)
        free = f" of {setup.free.value / 2**30:.2f} free ({setup.free.source})" if setup.free else ""
        return f"{memory.total_bytes / 2**30:.2f} GiB{free}, with {setup.target.ctx} positions"

    found.attempt("memory", make, str)
