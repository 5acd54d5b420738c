"""Other projects' interfaces to the engine: vLLM's classes here, a model of lm-evaluation-harness in `lm_eval`.

    from flashformer.compat import LLM, SamplingParams

    for answer in LLM("demo").generate(["def f(", "class "], SamplingParams(temperature=0, max_tokens=32)):
        print(answer.outputs[0].text)

Names and defaults are theirs. What is not supported is refused by name, never ignored.
"""

from .llm import LLM
from .outputs import CompletionOutput, Logprob, RequestOutput
from .sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]
