"""A tokenizer with ids that the model has no embeddings for."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import byte_tokenizer, model_folder
from tokenizers import AddedToken

from flashformer import LoadError, RequestError, load
from flashformer.model import load_model


def test_a18_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    model_folder(tmp_path)
    assert load_model(tmp_path).tokenizer is not None
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|one more|>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(LoadError, match=r"ids up to 258.*vocab_size = 258"):
        load_model(tmp_path)


def test_a18_special_tokens_without_an_embedding(tmp_path: Path) -> None:
    """As in Gemma 3 1B, whose image token lies behind its embeddings: a warning, and no request may have it."""
    model_folder(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(UserWarning, match=r"ids up to 258.*vocab_size = 258.*<image_soft_token>"):
        llm = load(tmp_path, device="reference")
    with llm:
        assert llm.generate("plain", max_tokens=1).token_ids
        with pytest.raises(RequestError, match=r"258"):
            llm.generate("an <image_soft_token>", max_tokens=1)
        tokenizer.add_tokens([AddedToken("<|one more|>")])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(LoadError, match=r"ids up to 259.*vocab_size = 258"):
            load_model(tmp_path)
