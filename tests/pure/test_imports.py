"""What importing costs and touches, and what the sources may not hold. The layers are import-linter's (tools/lint)."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flashformer

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp"))
PACKAGE = ROOT / "src" / "flashformer"

# Prints what `import flashformer` opens, starts or connects to, leaving out modules being looked up and read, and the
# processor time that it takes: unlike the clock's, it does not depend on what else the machine does.
PROBE = """
import json, sys, time
events = []
watched = ("open", "os.mkdir", "os.remove", "os.rename", "os.putenv", "os.system", "os.posix_spawn", "os.fork",
           "subprocess.Popen", "socket.__new__", "socket.connect", "socket.getaddrinfo", "mmap.__new__",
           "ctypes.dlopen", "shutil.copyfile", "tempfile.mkstemp", "glob.glob", "_thread.start_new_thread")
def hook(event, args):
    if event in watched and not (event == "open" and str(args[0]).endswith((".py", ".pyc"))):
        events.append([event, str(args[0]) if args else ""])
sys.addaudithook(hook)
before = time.process_time()
import flashformer
seconds = time.process_time() - before
print(json.dumps({"events": events, "seconds": seconds, "modules": sorted(sys.modules)}))
"""


def run_probe(code=PROBE):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def probe():
    return run_probe()


def test_import_touches_nothing(probe):
    assert probe["events"] == []


def test_probe_sees_a_file_and_a_thread():
    code = PROBE.replace("import flashformer", "open('/proc/self/status').close()\nimport flashformer")
    assert ["open", "/proc/self/status"] in run_probe(code)["events"]


def test_import_is_quick():
    assert min(run_probe()["seconds"] for _ in range(5)) < 0.2


def test_import_loads_no_heavy_library(probe):
    loaded = {name.partition(".")[0] for name in probe["modules"]}
    assert "flashformer" in loaded
    assert not loaded & {"numpy", "tokenizers", "huggingface_hub", "typer", "rich", "jinja2", "torch", "transformers"}


def test_every_public_name_is_there():
    assert all(getattr(flashformer, name) is not None for name in flashformer.__all__)
    assert set(flashformer.__all__) <= set(dir(flashformer))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flashformer.no_such_name


def test_reference_needs_no_extension_and_no_hub():
    code = """
import json, sys
sys.modules["flashformer._cpu"] = None
import flashformer.backends.reference
print(json.dumps(sorted(sys.modules)))
"""
    loaded = {name.partition(".")[0] for name in run_probe(code)}
    assert "numpy" in loaded
    assert not loaded & {"tokenizers", "huggingface_hub", "typer", "rich", "jinja2", "torch"}


def hits(paths, pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert paths
    return found


def test_intrinsics_live_in_simd():
    pattern = r"\b_mm\d*_|\b__m(?:64|128|256|512|mask)|intrin\.h|arm_neon|\b__builtin_ia32|\basm\b"
    simd = [p for p in NATIVE if p.parent.name == "simd"]
    assert hits([p for p in NATIVE if p not in simd], pattern) == []
    assert hits(simd, pattern)


def test_environment_is_read_in_one_place():
    assert hits([p for p in SOURCES if p.name != "env.py"], r"\bos\.(?:environ|getenv)\b") == []
    assert hits(NATIVE, r"\bgetenv\b") == []


def test_families_have_no_name_below_the_model():
    below = ("program", "check", "backends", "engine")
    paths = [p for p in SOURCES if p.relative_to(PACKAGE).parts[0] in below] + NATIVE
    assert hits(paths, r"(?i)\b(?:llama(?!3)|qwen|mistral|granite|smollm|gemma|phi\d)") == []


def test_no_build_for_one_machine():
    assert hits([ROOT / "CMakeLists.txt"], r"march=|mtune=|ffast-math|funsafe") == []


def test_nothing_deserialises_code():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names += [node.func.id] * (node.func.id in ("eval", "exec", "compile"))
            found += [(path.name, n) for n in names if n.split(".")[0] in BANNED]
    assert found == []


BANNED = ("pickle", "marshal", "shelve", "dill", "eval", "exec", "compile")


@pytest.mark.parametrize("folder", ["src", "csrc", "tests", "tools", "benchmarks"])
def test_a_file_is_read_in_one_sitting(folder):
    paths = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cuh", ".cpp", ".c")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    assert lengths
    assert {name: n for name, n in lengths.items() if n >= 400} == {}


def test_dependencies_are_what_is_imported():
    """Neither a library that nothing imports nor an import that no dependency brings."""
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"flashformer"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [need for extra, needs in project["optional-dependencies"].items() if extra != "test" for need in needs]
    needed = {re.split(r"[<>=!~ ]", name)[0] for name in [*project["dependencies"], *optional]}
    assert third_party == {IMPORTED_AS.get(name, name) for name in needed}


# cuda-bindings finds the library that nvidia-cuda-nvrtc brings.
IMPORTED_AS = {
    "cuda-bindings": "cuda",
    "nvidia-cuda-nvrtc": "cuda",
    "prometheus-client": "prometheus_client",
    "sse-starlette": "sse_starlette",
}
