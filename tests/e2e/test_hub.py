"""Hub ids against a hub on loopback: what is asked of it, what ends up in the cache, and what is said when it fails.

Every load runs in a process of its own, as the client reads its environment when it is imported.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_hub import FakeHub, Repo, repo
from folders import CONFIG, byte_tokenizer, model_folder, random_weights
from safetensors.numpy import load_file, save, save_file

from flashformer import LoadError
from flashformer.checkpoint import open_checkpoint
from flashformer.checkpoint.resolve import resolve

NAME = "owner/model"
SHARDS = ("weights-1.safetensors", "weights-2.safetensors")  # the index names them, not a pattern
UNWANTED = {
    "pytorch_model.bin": b"\x80pickle",
    "consolidated.safetensors": b"Mistral's own names",
    "model.onnx": b"onnx",
    "onnx/model.onnx": b"onnx",
    "modeling_model.py": b"raise SystemExit",
    "original/model.safetensors": b"another",
    "README.md": b"# model",
}

LOADER = """
import json, sys, warnings
from flashformer.checkpoint import open_checkpoint
from flashformer.errors import LoadError
warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
try:
    found = open_checkpoint(sys.argv[1], **json.loads(sys.argv[2]))
    n_bytes = sum(t.n_bytes for t in found.tensors.values())
    print(json.dumps({"path": str(found.path), "n_bytes": n_bytes, "vocab": found.tokenizer.vocab_size}))
except LoadError as error:
    print(error, file=sys.stderr)
    raise SystemExit(2)
"""


@dataclass(frozen=True)
class Loaded:
    """What a load left behind: `found` where it went well, else what it said."""

    found: dict[str, Any] | None
    said: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = model_folder(tmp_path_factory.mktemp("hub"), generation={"eos_token_id": 1})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    with FakeHub({NAME: repo({**files, **UNWANTED})}).running() as running:
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hf"


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}


def load(hub: FakeHub, home: Path, name: str = NAME, *, env: dict[str, str] | None = None, **options: Any) -> Loaded:
    result = subprocess.run(
        [sys.executable, "-c", LOADER, name, json.dumps(options)],
        env={**environment(hub, home), **(env or {})},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode in (0, 2), result.stderr
    assert "Traceback" not in result.stderr
    return Loaded(json.loads(result.stdout) if result.returncode == 0 else None, result.stderr)


def refused(loaded: Loaded, *words: str) -> None:
    assert loaded.found is None
    for word in words:
        assert word in loaded.said


def weight_bytes(files: dict[str, bytes]) -> int:
    return len(files["model.safetensors"]) - 8 - int.from_bytes(files["model.safetensors"][:8], "little")


def sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    weights = random_weights(0)
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(weights)}
    made = {shard: save({n: w for n, w in weights.items() if weight_map[n] == shard}) for shard in SHARDS}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    kept = {name: content for name, content in files.items() if name != "model.safetensors"}
    return {**kept, **made, "model.safetensors.index.json": index}


def test_a_repository_is_downloaded_once_and_only_what_is_read(
    hub: FakeHub, home: Path, files: dict[str, bytes]
) -> None:
    first = load(hub, home)
    assert first.found is not None
    assert first.found["n_bytes"] == weight_bytes(files)
    assert hub.files() == sorted(files)
    for name, content in files.items():
        assert (Path(first.found["path"]) / name).read_bytes() == content
    hub.requests.clear()
    assert load(hub, home) == first
    assert hub.files() == []


def test_nothing_is_said_where_nothing_is_wrong(hub: FakeHub, home: Path) -> None:
    assert load(hub, home).said == ""


def test_shards_are_those_that_the_index_names(hub: FakeHub, home: Path, files: dict[str, bytes]) -> None:
    hub.repos[NAME] = repo({**sharded(files), **UNWANTED, "extra-00001-of-00002.safetensors": b"not in the index"})
    loaded = load(hub, home)
    assert loaded.found is not None
    assert loaded.found["n_bytes"] == weight_bytes(files)
    assert hub.files() == sorted(sharded(files))


def test_where_both_are_there_the_single_file_is_taken(hub: FakeHub, home: Path, files: dict[str, bytes]) -> None:
    hub.repos[NAME] = repo({**sharded(files), **files})
    assert load(hub, home).found is not None
    assert not {*SHARDS} & {*hub.files()}


def test_a22_gated_says_accept_the_licence_and_log_in(hub: FakeHub, home: Path, files: dict[str, bytes]) -> None:
    hub.repos[NAME] = repo(files, gated=True)
    refused(load(hub, home), "gated", f"https://huggingface.co/{NAME}", "accept its licence", "hf auth login")
    refused(load(hub, home, env={"HF_TOKEN": "hf_wrong"}), "gated")
    assert load(hub, home, env={"HF_TOKEN": hub.token}).found is not None


def test_a22_private_or_not_found(hub: FakeHub, home: Path, files: dict[str, bytes]) -> None:
    refused(load(hub, home, "owner/modle"), "owner/modle", "check the spelling", "private")
    hub.repos[NAME] = repo(files, private=True)
    refused(load(hub, home), NAME, "hf auth login", "HF_TOKEN")
    assert load(hub, home, env={"HF_TOKEN": hub.token}).found is not None


def test_a22_bad_revision_lists_those_in_the_cache(hub: FakeHub, home: Path) -> None:
    loaded = load(hub, home, revision="v9")
    refused(loaded, NAME, "no revision 'v9'", "/tree/main")
    assert "in the cache" not in loaded.said
    assert load(hub, home).found is not None
    refused(load(hub, home, revision="v9"), "no revision 'v9'", f"revisions in the cache: main ({'a' * 12})")


def test_revisions_by_branch_and_by_commit(hub: FakeHub, home: Path, files: dict[str, bytes]) -> None:
    other = {**files, "config.json": json.dumps({**CONFIG, "rope_theta": 20000.0}).encode()}
    hub.repos[NAME] = Repo({"a" * 40: files, "b" * 40: other}, {"main": "a" * 40, "dev/x": "b" * 40})
    for revision, commit in ((None, "a"), ("dev/x", "b"), ("b" * 40, "b"), ("a" * 40, "a")):
        loaded = load(hub, home, revision=revision)
        assert loaded.found is not None
        assert Path(loaded.found["path"]).name == commit * 40
    offline = load(hub, home, revision="v9", offline=True)
    refused(offline, "revision v9: not in the Hugging Face cache", "offline was asked for")
    refused(offline, f"revisions in the cache: dev/x ({'b' * 12}), main ({'a' * 12})")


@pytest.mark.parametrize(("cut", "resumed"), [(1000, None), (11_000_000, 10 * 2**20)])  # the client keeps whole chunks
def test_a22_a_connection_that_is_cut_is_taken_up_again(
    hub: FakeHub, home: Path, files: dict[str, bytes], cut: int, resumed: int | None
) -> None:
    large = save({"x": np.random.default_rng(0).integers(0, 2**32, 3_000_000, np.uint32).view(np.float32)})
    hub.repos[NAME] = repo({**files, "model.safetensors": large})
    hub.cuts["model.safetensors"] = [cut]
    loaded = load(hub, home)
    assert loaded.found is not None
    assert hub.cuts["model.safetensors"] == []
    assert hub.ranges == ([("model.safetensors", resumed)] if resumed else [])
    assert (Path(loaded.found["path"]) / "model.safetensors").read_bytes() == large


def test_a22_an_interrupted_download_is_finished_by_the_next(hub: FakeHub, home: Path, files: dict[str, bytes]) -> None:
    hub.cuts["model.safetensors"] = [1000]
    hub.then["model.safetensors"] = 403
    refused(load(hub, home), NAME, "the download failed", "try again")
    refused(load(hub, home, offline=True), "only partly in the Hugging Face cache", "offline was asked for")
    hub.then.clear()
    loaded = load(hub, home)
    assert loaded.found is not None
    assert (Path(loaded.found["path"]) / "model.safetensors").read_bytes() == files["model.safetensors"]


@pytest.mark.parametrize("how", [{"offline": True}, {"env": {"HF_HUB_OFFLINE": "1"}}], ids=["option", "environment"])
def test_a22_offline(hub: FakeHub, home: Path, how: dict[str, Any]) -> None:
    cause = "offline was asked for" if "offline" in how else "HF_HUB_OFFLINE is set"
    refused(load(hub, home, **how), f"{NAME}: not in the Hugging Face cache", cause)
    assert hub.requests == []
    online = load(hub, home)
    hub.requests.clear()
    assert load(hub, home, **how) == online
    assert hub.requests == []


def test_unreachable_but_cached_uses_the_cache_with_one_warning(hub: FakeHub, home: Path) -> None:
    online = load(hub, home)
    hub.down = 500
    for url in (hub.url, "http://127.0.0.1:9"):  # out of order, and nobody there
        loaded = load(hub, home, env={"HF_ENDPOINT": url})
        assert loaded.found == online.found
        assert loaded.said.startswith(f"warning: {NAME}: the hub cannot be asked")
        assert "cache is used" in loaded.said
        assert loaded.said.count("\n") == 1


def test_unreachable_and_not_cached(hub: FakeHub, home: Path) -> None:
    refused(load(hub, home, env={"HF_ENDPOINT": "http://127.0.0.1:9"}), NAME, "ConnectError", "check the network")
    hub.down = 500
    refused(load(hub, home), NAME, "500", "try again")


def test_access_that_was_lost_leaves_the_copy(hub: FakeHub, home: Path, files: dict[str, bytes]) -> None:
    hub.repos[NAME] = repo(files, private=True)
    online = load(hub, home, env={"HF_TOKEN": hub.token})
    loaded = load(hub, home)
    assert loaded.found == online.found is not None
    assert "cache is used" in loaded.said


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"pytorch_model.bin": b"\x80"}, ("pytorch_model.bin", "python -c", 'from_pretrained("owner/model"')),
        ({"pytorch_model-00001-of-00001.bin": b"", "pytorch_model.bin.index.json": b"{}"}, ("python -c", "./model")),
        ({"consolidated.safetensors": b""}, ("consolidated.safetensors", "Take the repository that holds")),
        ({"model-q4.gguf": b"GGUF"}, ("model-q4.gguf", "Take the repository that holds")),
        ({}, ("neither model.safetensors nor model.safetensors.index.json",)),
    ],
)
def test_weights_that_are_not_safetensors_are_refused_before_any_download(
    hub: FakeHub, home: Path, files: dict[str, bytes], others: dict[str, bytes], words: tuple[str, ...]
) -> None:
    hub.repos[NAME] = repo({name: c for name, c in files.items() if name != "model.safetensors"} | others)
    refused(load(hub, home), NAME, *words)
    assert hub.files() == []


def test_only_tokenizer_model_is_refused_before_any_download(hub: FakeHub, home: Path, files: dict[str, bytes]) -> None:
    kept = {name: content for name, content in files.items() if name != "tokenizer.json"}
    hub.repos[NAME] = repo({**kept, "tokenizer.model": b"\n"})
    refused(load(hub, home), "tokenizer.model but no tokenizer.json", "AutoTokenizer", "python -c", "./model")
    assert hub.files() == []


def test_an_unsupported_model_is_refused_before_its_weights_come(
    hub: FakeHub, home: Path, files: dict[str, bytes]
) -> None:
    code = (
        "import sys; from flashformer.errors import LoadError; from flashformer.model import load_model\n"
        "try: load_model(sys.argv[1])\n"
        "except LoadError as e: print(e)"
    )
    hub.repos[NAME] = repo({**files, "config.json": json.dumps({**CONFIG, "architectures": ["Other"]}).encode()})
    env, words = environment(hub, home), [sys.executable, "-c", code, NAME]
    made = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert "'Other'" in made.stdout
    assert "config.json" in hub.files()
    assert "model.safetensors" not in hub.files()


@pytest.mark.parametrize("command", [("doctor", "--model", NAME), ("plan", NAME)])
def test_looking_at_a_model_downloads_no_weights(hub: FakeHub, home: Path, command: tuple[str, ...]) -> None:
    words = [sys.executable, "-m", "flashformer.cli", *command, "--json"]
    made = subprocess.run(words, env=environment(hub, home), capture_output=True, text=True, check=True)
    assert json.loads(made.stdout)
    assert "config.json" in hub.files()
    assert "model.safetensors" not in hub.files()
    assert load(hub, home).found is not None  # what is cached by now is no obstacle
    assert "model.safetensors" in hub.files()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ctx", "999999"), "ctx"),
        (("--device", "cuda"), "device='cuda'"),
        (("--threads", "0"), "threads"),
        (("--quant", "int2"), "int2"),
    ],
)
def test_what_cannot_run_is_refused_before_a_download(
    hub: FakeHub, home: Path, options: tuple[str, ...], words: str
) -> None:
    command = [sys.executable, "-m", "flashformer.cli", "run", NAME, "a", *options]
    env = {**environment(hub, home), "CUDA_VISIBLE_DEVICES": ""}
    made = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert words in made.stderr
    assert "model.safetensors" not in hub.files()


def test_a_tokenizer_that_cannot_be_used_is_refused_before_a_download(
    hub: FakeHub, home: Path, files: dict[str, bytes]
) -> None:
    hub.repos[NAME] = repo({**files, "tokenizer.json": b"{}"})
    command = [sys.executable, "-m", "flashformer.cli", "run", NAME, "a"]
    made = subprocess.run(command, env=environment(hub, home), capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert "tokenizer.json" in made.stderr
    assert "model.safetensors" not in hub.files()


def test_a21_a_cache_that_cannot_be_written(hub: FakeHub, home: Path, files: dict[str, bytes]) -> None:
    home.write_text("a file where a folder should be")
    refused(load(hub, home), NAME, str(home))


def test_a21_a_full_disk_names_the_cache_and_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    sizes = {"config.json": 1000, "tokenizer.json": 234, "pytorch_model.bin": 10**9, "model.safetensors": 10**9}
    monkeypatch.setattr("flashformer.checkpoint.hub._listing", lambda repo, revision: sizes)
    with pytest.raises(LoadError, match=r"/cache: No space left on device; 1,234 bytes are needed, [\d,]+ are free"):
        resolve(NAME)


@pytest.mark.parametrize("error", ["HFValidationError", "XetDownloadError", "FileMetadataError"])
def test_a22_any_error_of_the_client_becomes_ours(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    from huggingface_hub import errors

    def fail(*args: Any, **kwargs: Any) -> None:
        raise getattr(errors, error)("from the hub")

    sizes = {"model.safetensors": 1, "tokenizer.json": 1}
    monkeypatch.setattr("flashformer.checkpoint.hub._listing", lambda repo, revision: sizes)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(LoadError, match=rf"some/model, revision r: .*{error}: from the hub"):
        resolve("some/model", revision="r")


# ---- the commands that messages give


def run_command(message: str, folder: Path) -> None:
    """Runs the `python -c '...'` of a message in `folder`."""
    begin = message.index("python -c ")
    words = shlex.split(message[begin:].split(" and then give")[0])
    subprocess.run([sys.executable, *words[1:3]], cwd=folder, capture_output=True, check=True)


def test_the_command_that_converts_weights_converts_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = model_folder(tmp_path / "it's a model", weights=False)
    torch.save({n: torch.from_numpy(w) for n, w in random_weights(3).items()}, folder / "pytorch_model.bin")
    with pytest.raises(LoadError) as caught:
        _ = open_checkpoint(folder).tensors
    run_command(str(caught.value), tmp_path)
    found = open_checkpoint(folder)
    for name, weight in random_weights(3).items():
        np.testing.assert_array_equal(found.tensors[name].data, weight)
    assert found.tokenizer.encode("ab") == byte_tokenizer().encode("ab").ids
    assert isinstance(AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast)
    assert load_file(folder / "model.safetensors").keys() == random_weights(3).keys()


def test_the_command_for_a_repository_writes_a_whole_folder(
    hub: FakeHub, home: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Its source is the hub id; here it runs where a folder of that name holds the same."""
    weights = {"pytorch_model.bin": b""}
    hub.repos[NAME] = repo({name: c for name, c in files.items() if name != "model.safetensors"} | weights)
    message = load(hub, home).said
    folder = model_folder(tmp_path / NAME, weights=False)
    save_file(random_weights(4), folder / "model.safetensors", metadata={"format": "pt"})
    run_command(message, tmp_path)
    made = open_checkpoint(tmp_path / "model")
    np.testing.assert_array_equal(made.tensors["model.norm.weight"].data, random_weights(4)["model.norm.weight"])
    assert made.tokenizer.vocab_size == byte_tokenizer().get_vocab_size()
