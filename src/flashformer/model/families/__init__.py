"""The families there are. A further one is a file beside these and an entry here."""

from ..family import Family
from . import llama, mistral, qwen2

FAMILIES: dict[str, Family] = {f.architecture: f for f in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY)}
