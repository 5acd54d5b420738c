"""A kernel in, tokens out: loading, sequences and their slots, validation of requests, statistics."""

from .engine import LLM, load
from .generate import Piece, Stream
from .plan import Plan, plan_model
from .setup import Options
from .stats import Output, Timing

__all__ = ["LLM", "Options", "Output", "Piece", "Plan", "Stream", "Timing", "load", "plan_model"]
