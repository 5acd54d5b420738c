"""The closed set of exceptions. Every message: what is wrong, where, found versus expected, what to do next."""

from __future__ import annotations


class FlashformerError(Exception):
    """Base of every error that this package raises on purpose."""


class LoadError(FlashformerError):
    """A checkpoint, its configuration or its tokenizer cannot be used."""


class RequestError(FlashformerError, ValueError):
    """An argument of a request, or a command line, is out of its range."""


class ContextError(RequestError):
    """A prompt does not fit into the context."""


class ProgramError(FlashformerError):
    """A Program failed its proof. Carries the findings; always a bug of this package."""


class DeviceError(FlashformerError):
    """The machine cannot run the kernel, or the kernel gave up (a wait expired, the model was forked)."""


class UnavailableError(DeviceError):
    """What was asked for, this machine does not have: a GPU, an instruction set, so much memory, so many threads."""


class NumericalError(FlashformerError):
    """NaN or Inf appeared in a forward. `layer` is the first layer where it appeared."""

    def __init__(self, message: str, layer: int) -> None:
        super().__init__(message)
        self.layer = layer
