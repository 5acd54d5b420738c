"""`flashformer quantize`: a folder that is a model as any other, with the bits of quantizing at load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import D_MODEL, VOCAB_SIZE, model_folder, random_weights
from packed_files import header_of, region_of
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

import flashformer as ff
from flashformer.backends.cpu.native import load_native
from flashformer.cli.app import app
from flashformer.engine import engine, quantize_model
from flashformer.engine import quantize as quantize_module
from flashformer.engine.divergence import TEXT, fixed_text

PROMPT = [3, 4, 5, 6, 7, 250]
PACKED = "weights.ffpack"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that would keep weights of any size."""
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("flashformer.backends.packed.MIN_BYTES", 0)
    monkeypatch.setattr("flashformer.backends.kept.FREE_SHARE", 0)
    return tmp_path / "cache"


def untied_folder(path: Path) -> Path:
    model_folder(path, tie_word_embeddings=False)
    weights = random_weights(0)
    head = np.random.default_rng(9).normal(0, 0.3, (VOCAB_SIZE, D_MODEL)).astype(np.float32)
    save_file({**weights, "lm_head.weight": head}, str(path / "model.safetensors"))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    """The model of `folder` in int4."""
    quantize_model(folder, tmp_path / "out", quant="int4", threads=2)
    return tmp_path / "out"


def logits(model: Path, **options: Any) -> bytes:
    with ff.load(model, **{"threads": 1, **options}) as llm:
        return llm.logits(PROMPT).tobytes()


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


FORMATS = [
    {"quant": "int4"},
    {"quant": "int8-g32", "dtype": "bf16"},
    {"quant": "int4-g64-zp", "dtype": "f16"},
    {"quant": "nf4"},
    {"quant": "none"},
    {"quant": "none", "dtype": "bf16"},
]


@pytest.mark.parametrize("make", [model_folder, untied_folder])
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(f.values()))
def test_output_has_the_bits_of_quantizing_at_load(
    make: Callable[[Path], Path], formats: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    model, out = make(tmp_path / "model"), tmp_path / "out"
    quantize_model(model, out, **formats)
    assert not cache.exists() or not list(cache.rglob("*.ffpack"))
    with ff.load(out, threads=1) as llm:
        found = llm.logits(PROMPT).tobytes()
        data = (out / PACKED).read_bytes()
        (out / PACKED).write_bytes(b"")  # what runs has weights of its own
        text = llm.generate("def f", max_tokens=8, ignore_eos=True, temperature=0.7, seed=3).token_ids
        (out / PACKED).write_bytes(data)
    assert not cache.exists() or not list(cache.rglob("*.ffpack"))
    assert found == logits(model, **formats) == logits(out, **formats)
    with ff.load(model, threads=1, **formats) as llm:
        assert llm.generate("def f", max_tokens=8, ignore_eos=True, temperature=0.7, seed=3).token_ids == text
    others = {"quant": "int8", "dtype": "f32"} if formats["quant"] != "int8-g32" else {"quant": "int4"}
    assert found != logits(model, **others)


def test_files_of_the_model_are_copied_as_they_are(tmp_path: Path) -> None:
    model, out = model_folder(tmp_path / "model", generation={"temperature": 0.5}), tmp_path / "out"
    (model / "tokenizer.json").rename(model / "linked.json")
    (model / "tokenizer.json").symlink_to("linked.json")
    (model / "tokenizer_config.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (model / "README.md").write_text("not read, not copied")
    quantize_model(model, out, quant="int8")
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert names == [
        "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", PACKED,
    ]  # fmt: skip
    assert all((out / n).read_bytes() == (model / n).read_bytes() for n in names if n != PACKED)
    assert not (out / "tokenizer.json").is_symlink()
    shutil.rmtree(model)
    with ff.load(out) as llm:
        assert llm.chat_ids([{"role": "user", "content": "hi"}]) == llm.tokenizer.encode("hi", False)


def test_a_snapshot_in_the_hub_cache_is_copied_without_its_links(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--some--model"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "commit").mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(repo / "blobs" / path.name)
        (repo / "snapshots" / "commit" / path.name).symlink_to(f"../../blobs/{path.name}")
    quantize_model(repo / "snapshots" / "commit", tmp_path / "out", quant="int8-g32")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert logits(tmp_path / "out") == logits(repo / "snapshots" / "commit", quant="int8-g32")


def test_the_file_depends_on_no_thread_and_no_instruction_set(
    folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = (out / PACKED).read_bytes()
    for n in (1, 3):
        quantize_model(folder, tmp_path / f"{n}", quant="int4", threads=n)
        assert (tmp_path / f"{n}" / PACKED).read_bytes() == file
    isas = load_native().isas()
    assert isas[0] == "portable"
    for isa in isas:
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
        quantize_model(folder, tmp_path / isa, quant="int4", threads=1)
        assert region_of(tmp_path / isa / PACKED) == region_of(out / PACKED)
        expected = logits(folder, quant="int4", threads=2)
        for options in ({"threads": 1}, {"threads": 3}, {"threads": 4}, {"ctx": 32, "streams": 3}):
            assert logits(out, **options) == expected


def test_a_family_with_everything(tmp_path: Path) -> None:
    """Norms before and after with an offset, soft caps, windows: the offset is packed once and not added again."""
    names = {"attn": "post_attention_layernorm", "pre_ffn": "pre_feedforward_layernorm"}
    model = model_folder(
        tmp_path / "model", architectures=["Gemma2ForCausalLM"], model_type="gemma2", hidden_act=None,
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=16, sliding_window=8,
    )  # fmt: skip
    weights = random_weights(4)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name in (names["pre_ffn"], "post_feedforward_layernorm"):
            weights[f"{prefix}{name}.weight"] = weights[f"{prefix}{names['attn']}.weight"] * np.float32(0.5)
    save_file(weights, str(model / "model.safetensors"))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    quantize_model(model, tmp_path / "out", quant="int8")
    assert logits(tmp_path / "out") == logits(model, quant="int8")


def test_formats_of_the_file_are_taken_and_others_refused(out: Path) -> None:
    with ff.load(out) as llm:
        target = llm.setup.target
        assert target.body_quant is not None
        assert target.head_quant is not None
        assert (target.body_quant.name, target.head_quant.name, target.weight_format.name) == (
            "int4-g32", "int8-g128", "f32",
        )  # fmt: skip
    first = logits(out)
    for same in ({"quant": "int4"}, {"quant": "int4-g32"}, {"dtype": "f32"}, {"quant": None, "dtype": "auto"}):
        assert logits(out, **same) == first
    for other, found in (
        ({"quant": "int8"}, "int4-g32"),
        ({"quant": "int4-g64"}, "int4-g32"),
        ({"quant": "none"}, "int4-g32"),
        ({"dtype": "bf16"}, "f32"),
    ):
        with pytest.raises(ff.LoadError, match=f"found weights packed .*{found}.*quantize the original again"):
            ff.load(out, **other)  # type: ignore[arg-type]
    assert call("run", out, "x", "--quant", "int8").exit_code == 2
    assert call("plan", out, "--quant", "int8").exit_code == 2
    assert call("run", out, "x", "-n", "1", "--quant", "int4").exit_code == 0
    assert logits(out, exact=True, kv_dtype="bf16") != first  # these stay open


def test_devices_that_pack_nothing_are_refused(out: Path) -> None:
    with pytest.raises(ff.LoadError, match="packed weights are for the CPU kernel"):
        ff.load(out, device="reference")


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in ("model", "cache"))


def test_places_that_cannot_be_taken_exit_2_and_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    for name in ("full", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("target")
    before = leftovers(tmp_path)
    for name, why in (
        ("full", "not empty"), ("file", "no folder"), ("link", "no folder"), ("none/out", "make it first"),
        ("model", "not empty"),
    ):  # fmt: skip
        result = call("quantize", folder, tmp_path / name, "--quant", "int8")
        assert (result.exit_code, result.stdout) == (2, "")
        assert why in result.stderr
    assert leftovers(tmp_path) == before
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "kept"
    assert not list((tmp_path / "target").iterdir())


def test_an_empty_folder_is_taken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert call("quantize", folder, tmp_path / "out", "--quant", "int8", "--quiet").exit_code == 0
    assert logits(tmp_path / "out") == logits(folder, quant="int8")


def test_what_cannot_be_quantized_exits_2(folder: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bad")
    weights = random_weights(0)
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = np.nan
    save_file(weights, str(tmp_path / "bad" / "model.safetensors"))
    new = tmp_path / "new"
    for args, why in (
        ((folder,), "OUT"),
        ((folder, new, "--quant", "int5"), "int5"),
        ((folder, new, "--quant", "int8", "--dtype", "f64"), "f64"),
        ((folder, new, "--quant", "int8", "--threads", "0"), "threads"),
        ((tmp_path / "no", new, "--quant", "int8"), "no such folder"),
        (("shape:smollm2-135m", new, "--quant", "int8"), "random weights"),
        ((tmp_path / "bad", new, "--quant", "int8"), "[3, 4] is NaN"),
        ((out, new, "--quant", "int8"), "packed already"),
    ):
        result = call("quantize", *args)
        assert (result.exit_code, result.stdout) == (2, ""), args
        assert why in result.stderr
    assert leftovers(tmp_path) == ["bad", "out"]


def test_a_disk_that_is_full_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for where in ("flashformer.backends.packed.PackedFile.put", "flashformer.engine.quantize._to_disk"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(ff.RequestError, match="No space left on device"):
                quantize_model(folder, tmp_path / "out", quant="int8")
    usage = shutil._ntuple_diskusage(100, 90, 10)  # type: ignore[attr-defined]
    monkeypatch.setattr(quantize_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ff.RequestError, match=r"bytes are needed, 10 are free"):
        quantize_model(folder, tmp_path / "out", quant="int8")
    assert leftovers(tmp_path) == []


def test_a_folder_made_meanwhile_is_not_replaced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantize_module._to_disk

    def race(path: Path) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("kept")
        real(path)

    monkeypatch.setattr(quantize_module, "_to_disk", race)
    with pytest.raises(ff.RequestError, match="not empty"):
        quantize_model(folder, tmp_path / "out", quant="int8")
    assert leftovers(tmp_path) == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["theirs"]


def log_softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = x.astype(np.longdouble)
    return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))


def test_the_report_is_a_direct_computation(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    real = quantize_module.make_llm

    def spy(*args: Any, **kwargs: Any) -> ff.LLM:
        loaded.append(len(engine._LOADED))
        return real(*args, **kwargs)

    monkeypatch.setattr(quantize_module, "make_llm", spy)
    result = call("quantize", folder, tmp_path / "out", "--quant", "int4-g64", "--dtype", "bf16", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert loaded == [loaded[0]] * 2  # one after the other
    with ff.load(folder) as original, ff.load(folder, quant="int4-g64", dtype="bf16") as other:
        ids = original.tokenizer.encode(fixed_text())[:96]
        p, q = (log_softmax(llm.logits(ids)) for llm in (original, other))
    kl = (np.exp(p) * (p - q)).sum(1)
    assert len(kl) == 96
    assert kl.mean() > 1e-4
    found = json.loads(result.stdout)
    assert found["kl_mean_nats"] == pytest.approx(float(kl.mean()), rel=1e-6)
    assert found["kl_p99_nats"] == pytest.approx(float(np.quantile(kl.astype(np.float64), 0.99)), rel=1e-6)
    assert found["top1_agreement"] == float((p.argmax(1) == q.argmax(1)).mean())
    assert found == {
        **found, "model": str(folder), "out": str(tmp_path / "out"), "dtype": "bf16", "quant": "int4-g64",
        "head_quant": "int8-g128", "text": TEXT, "n_tokens": 96,
        "bytes_before": sum(w.nbytes for w in random_weights(0).values()),
        "bytes_after": (tmp_path / "out" / PACKED).stat().st_size,
    }  # fmt: skip
    assert set(found) == {
        "model", "out", "dtype", "quant", "head_quant", "bytes_before", "bytes_after", "text", "n_tokens",
        "kl_mean_nats", "kl_p99_nats", "top1_agreement",
    }  # fmt: skip
    header = header_of(tmp_path / "out" / PACKED)
    assert header["original"] == str(folder)
    assert header["error"] == {k: v for k, v in found.items() if k in header["error"]}
    assert len(header["error"]) == 5


def test_packing_alone_costs_nothing(folder: Path, tmp_path: Path) -> None:
    result = call("quantize", folder, tmp_path / "out", "--quant", "none")
    assert result.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["weights"] == "layers f32, head f32, the rest f32"
    assert lines["KL"] == "0 nats in the mean, 0 at the 99th percentile"
    assert lines["top-1"].startswith("100.00%")
    assert f"{TEXT}, 96 tokens" in lines["text"]
    assert set(lines) == {"model", "weights", "size", "KL", "top-1", "text"}


def test_the_fixed_text_is_whole() -> None:
    assert 400 <= len(fixed_text().split()) <= 600
    assert fixed_text().endswith("two people agree that it is.\n")
    assert "```python" in fixed_text()


def run_here(*args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashformer.cli", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=100)


def test_every_command_takes_the_folder(tmp_path: Path) -> None:
    """As a person does it, with the demo model."""
    out, greedy = tmp_path / "small", ("-n", "12", "--temp", "0", "--json")
    made = run_here("quantize", "demo", out, "--quant", "int4", "--threads", "2")
    assert (made.returncode, made.stderr) == (0, "")
    assert "layers int4-g32, head int8-g128, the rest bf16" in made.stdout
    assert not list(out.glob("*.safetensors"))
    quantized = ("demo", "--quant", "int4")
    commands = [
        *(("run", *model, "def ", *greedy) for model in ((out,), quantized)),
        *(("chat", *model, "--json", "-n", "8") for model in ((out,), quantized)),
        ("bench", out, "--rows", "1", "-p", "0", "-n", "4", "-r", "1", "--json"),
        ("plan", out, "--json", "--check"),
        ("trace", out, "-o", tmp_path / "trace.json"),
        ("doctor", "--model", out),
        ("quantize", "demo", out, "--quant", "int4"),
    ]
    with ThreadPoolExecutor(2) as pool:
        every = list(pool.map(lambda command: run_here(*command, stdin="x = 1\n"), commands))
    assert [done.returncode for done in every] == [0] * (len(commands) - 1) + [2]
    *runs_and_chats, bench, plan, _, doctor, _ = (done.stdout for done in every)
    same = [json.loads(text) for text in runs_and_chats]
    assert same[0]["token_ids"] == same[1]["token_ids"]
    assert same[2]["text"] == same[3]["text"]
    found = json.loads(bench)
    assert (found["quant"], found["rows"]) == ("int4-g32", 1)
    found = json.loads(plan)
    assert (found["quant"], found["head_quant"], found["dtype"]) == ("int4-g32", "int8-g128", "bf16")
    assert "made from demo" in doctor
