"""A model of lm-evaluation-harness: `--model flashformer`.

    lm_eval --model flashformer --model_args pretrained=FOLDER,dtype=float32 --tasks hellaswag
    python -m flashformer.compat.lm_eval --model flashformer ...     the same, where the former does not know the name

Versions of the harness that look for installed models find this one by itself; 0.4.13 does not yet, so running this
module registers it and then calls the harness' own command line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track

from ..engine import load
from ..errors import RequestError
from .arguments import dtype as format_name
from .arguments import require_neutral

NAME = "flashformer"
UNASKED_DEVICE = "cuda:0"  # what the harness says where its user named none
T = TypeVar("T")

# Their name of a setting in a task's generation_kwargs -> ours.
_SETTINGS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "seed": "seed",
}
_NEUTRAL_GENERATION: Mapping[str, tuple[object, ...]] = {"num_beams": (1,), "use_cache": (True,)}
_NEUTRAL_LOAD: Mapping[str, tuple[object, ...]] = {
    "batch_size": (1, "1", "auto"),  # requests run one after another
    "max_batch_size": (None, 1),
    "trust_remote_code": (False,),
}


class HarnessModel(TemplateLM):
    """`pretrained` is whatever flashformer.load takes; `max_length` its ctx, else as much as that chooses.

    `add_bos_token` None follows the tokenizer, `prefix_token_id` None is its BOS token, else its EOS token: both as
    in the harness' own model for transformers. Raises LoadError, RequestError, DeviceError.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        revision: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str = "auto",
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        threads: int | None = None,
        **others: object,
    ) -> None:
        super().__init__()
        require_neutral(others, _NEUTRAL_LOAD)
        self.llm = load(
            pretrained,
            dtype=format_name(dtype),
            revision=revision,
            ctx=max_length,
            device="auto" if device == UNASKED_DEVICE else device,
            threads=threads,
        )
        self._name = str(pretrained)
        self.max_gen_toks = max_gen_toks
        self.max_length = self.llm.setup.target.ctx
        self._add_bos_token = add_bos_token
        self._chat_template_args = dict(chat_template_args or {})
        texts = self.llm.tokenizer.special_tokens
        spec = self.llm.spec
        self._eot = self._id_of(texts.get("eos_token"), spec.eos_ids[0] if spec.eos_ids else None)
        bos = self._id_of(texts.get("bos_token"), spec.bos_id)
        self._prefix = next((i for i in (prefix_token_id, bos, self._eot) if i is not None), None)
        self._prefix_text = texts.get("bos_token") or texts.get("eos_token")

    # ---- what the harness calls ---------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Part of the names under which the harness keeps prepared requests."""
        return self._name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        return _present("EOS", self._eot)

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that is scored without a context."""
        return _present("BOS or EOS", self._prefix)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with BOS where the tokenizer's rule adds it and the text does not begin with it."""
        if add_special_tokens is None:
            begun = self._prefix_text is not None and string.startswith(self._prefix_text)
            add_special_tokens = self._add_bos_token is not False and not begun
        return self.llm.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log probability, whether greedy decoding gives it) of each continuation.

        A context that is too long loses its beginning, as in the harness' own models.
        """
        answers = []
        for texts, context, continuation in _shown("scoring", requests, disable_tqdm):
            room = self.max_length + 1 - len(continuation)  # the last token is scored, never read
            if room < 1:
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens, at most {self.max_length} can be scored: "
                    "give a larger max_length"
                )
            score = self.llm.score(context[-room:], continuation)
            answers.append((score.total, all(score.is_greedy)))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each whole text, in windows of the context's length where it is longer."""
        totals = []
        for request in _shown("scoring", requests, disable_tqdm):
            (text,) = request.args
            ids = self.tok_encode(text)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text up to the first of any number of stop strings; greedy unless the task samples."""
        answers = []
        for request in _shown("generating", requests, disable_tqdm):
            context, asked = request.args
            answers.append(self._generate(context, normalize_gen_kwargs(asked, self.max_gen_toks)))
            self.cache_hook.add_partial("generate_until", (context, asked), answers[-1])
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise RequestError("an answer that is begun beforehand is not supported: choose a task without one")
        return self.llm.tokenizer.render_chat(chat_history, **self._chat_template_args)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's only template, for the harness' report."""
        if isinstance(chat_template, str):
            raise RequestError(f"apply_chat_template={chat_template!r}: templates have no names here; give none")
        return self.llm.tokenizer.chat_template if chat_template else None

    # ---- our side -----------------------------------------------------------------------------------------

    def _generate(self, context: str, asked: dict[str, Any]) -> str:
        stops = [stop for stop in asked.pop("until") if stop]
        n_new, samples = asked.pop("max_gen_toks"), asked.pop("do_sample")
        settings = {ours: asked.pop(theirs) for theirs, ours in _SETTINGS.items() if theirs in asked}
        require_neutral(asked, _NEUTRAL_GENERATION)
        if not samples:
            settings["temperature"] = 0.0
        elif "temperature" not in settings:
            settings["temperature"] = self.llm.defaults.temperature or 1.0
        room = self.max_length - n_new
        if room < 1:
            raise RequestError(f"{n_new} new tokens fill the context of {self.max_length}: lower max_gen_toks")
        text = ""
        with self.llm.stream(self.tok_encode(context)[-room:], max_tokens=n_new, **settings) as pieces:
            for piece in pieces:
                text += piece.text
                if any(stop in text for stop in stops):
                    break
        text = self.llm.tokenizer.decode(pieces.output.token_ids)
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

    def _id_of(self, token: str | None, default: int | None) -> int | None:
        """The id of a special token given as text; `default` where there is none."""
        ids = self.llm.tokenizer.encode(token, add_special_tokens=False) if token else []
        return ids[0] if len(ids) == 1 else default


def _present(name: str, token_id: int | None) -> int:
    if token_id is None:
        raise RequestError(f"the tokenizer names no {name} token: give prefix_token_id")
    return token_id


def _shown(what: str, requests: Sequence[T], hidden: bool) -> Iterable[T]:
    """With a progress bar on a terminal."""
    console = Console(stderr=True)
    return track(requests, description=what, console=console, disable=hidden or not console.is_terminal)


if NAME not in model_registry:
    model_registry.register(NAME, target=HarnessModel)


def main() -> None:
    """The harness' command line, with the model registered."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    main()
