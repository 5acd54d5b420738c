"""A kernel in, tokens out: loading, sequences and their slots, validation of requests, statistics."""

from .diagnosis import Diagnosis, diagnose
from .engine import LLM, load
from .generate import Piece, Stream
from .logprobs import Score, TokenLogprobs
from .plan import Plan, plan_model
from .quantize import QuantizeReport, quantize_model
from .request import SamplingSettings
from .setup import Options
from .stats import Output, Timing

__all__ = [
    "LLM",
    "Diagnosis",
    "Options",
    "Output",
    "Piece",
    "Plan",
    "QuantizeReport",
    "SamplingSettings",
    "Score",
    "Stream",
    "Timing",
    "TokenLogprobs",
    "diagnose",
    "load",
    "plan_model",
    "quantize_model",
]
