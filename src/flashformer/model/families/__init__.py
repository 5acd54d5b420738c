"""The families there are. A further one is a file beside these and an entry here."""

from ..family import Family
from . import gemma2, gemma3, granite, llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3

_MODULES = (llama, mistral, qwen2, qwen3, granite, smollm3, olmo2, phi3, gemma2, gemma3)

FAMILIES: dict[str, Family] = {module.FAMILY.architecture: module.FAMILY for module in _MODULES}
