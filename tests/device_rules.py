"""What device sources may not hold, so that the host build sees every access to memory that threads share.

Memory that changes during a launch and shared memory are touched by the wrappers of ptx.cuh alone; inline PTX and the
compiler's own names for such things are there too. Pointers may be passed on, counted up and given to a wrapper, but
not followed. Allowed elsewhere:

    records      launch.model->, and subscripts of launch.phases, schedule, tapes, tape_begin: constant during a launch
    arrays       subscripts of what is declared as an array, in registers or in the kernel's argument
    members      subscripts of arrays that are members of something in registers
"""

from __future__ import annotations

import re

from flashformer.backends.cuda.launch import POINTERS

WRAPPERS = "ptx.cuh"

WORDS = {
    r"\basm\b": "inline PTX",
    r"\b__shared__\b": "shared memory",
    r"\b__(?:sync|shfl|ballot|threadfence|nanosleep|ld|st|cvta)\w*": "a built-in of the compiler",
    r"\batomic\w+\s*\(": "an atomic of the compiler",
    r"\bvolatile\b": "volatile memory",
    r"\b(?:threadIdx|blockIdx|blockDim|gridDim)\b": "a register of the compiler",
}

RECORDS = ("model", "phases", "schedule", "tapes", "tape_begin")

# As clang-format writes them: `T* name`, several as `T *a, *b`; a product has spaces on both sides of its star.
_DECLARED = re.compile(r"[\w>]\* (?:const |__restrict__ )*(\w+)|(?<=[\w>,]) \*(\w+)")
_DECLARATION = re.compile(r"^\s*(?!return\b)(?:const )?[\w:]+(?:<[^<>]*>)? \*\w+")
_ARRAYS = re.compile(r"^\s*(?:const )?[\w:]+ \w+\[[^\]]*\](?:, \w+\[[^\]]*\])*;")
_LAUNCH_POINTER = re.compile(rf"\.({'|'.join(sorted({*POINTERS} - {*RECORDS}))})\s*(?:\[|->)")
_UNARY_STAR = re.compile(r"(?<![\w>])\*(?=[\w(])(?!launch\.model\b)")
_SUBSCRIPT_OF_RESULT = re.compile(r"\)\s*(?:\[|->)")
_REFERENCE_TO_ARRAY = re.compile(r"\(&\w+\)\[")


def violations(name: str, text: str) -> list[str]:
    """`name:line: what` of everything in a device source that the rules forbid."""
    if name == WRAPPERS:
        return []
    lines = _without_comments(text).splitlines()
    pointers = {p or q for line in lines for p, q in _DECLARED.findall(line)} - set(RECORDS)
    followed = re.compile(rf"(?<![.\w])({'|'.join(sorted(pointers)) or '(?!)'})\s*(?:\[|->)")
    found = []
    for number, line in enumerate(lines, 1):
        what = [words for pattern, words in WORDS.items() if re.search(pattern, line)]
        if match := _LAUNCH_POINTER.search(line) or (not _ARRAYS.match(line) and followed.search(line)):
            what.append(f"the pointer {match[1]} is followed")
        starred = _UNARY_STAR.search(line) and not _DECLARATION.match(line)
        if starred or _SUBSCRIPT_OF_RESULT.search(_REFERENCE_TO_ARRAY.sub("", line)):
            what.append("a pointer is followed")
        found += [f"{name}:{number}: {words}: {line.strip()}" for words in what]
    return found


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text))
