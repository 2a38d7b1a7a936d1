"""A tiny model with its tokenizer, and a few rows of data, in folders as a user has them. All made here, nothing fetched."""

from pathlib import Path

import pytest

from tests.support.folders import WORDS, bert, llama, write_rows


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "tiny-chat-llama", chat=True)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    return bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def instructions(tmp_path_factory) -> Path:
    """24 rows of instruction, input, output."""
    colours = ["red", "green", "blue"]
    rows = [
        {"instruction": f"name {count} colours", "input": "the sun" if n % 2 else "", "output": " ".join(colours[n % 3 :] * 2)}
        for n, count in enumerate(["one", "two", "three"] * 8)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "instructions.jsonl", rows)


@pytest.fixture(scope="session")
def long_instructions(tmp_path_factory) -> Path:
    """60 rows whose answer is most of the row, so that a tenth of the tokens always has some of it."""
    rows = [{"instruction": "name colours", "input": "", "output": " ".join(WORDS[n % 5 : n % 5 + 12] * 3)} for n in range(60)]
    return write_rows(tmp_path_factory.mktemp("data") / "long.jsonl", rows)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    """40 rows of text, label 0 or 1."""
    rows = [{"text": f"a {'good' if n % 2 else 'bad'} film about the {WORDS[n % 20]}", "label": n % 2} for n in range(40)]
    return write_rows(tmp_path_factory.mktemp("data") / "reviews.jsonl", rows)


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch, request):
    """Runs write where they are started, and `datasets` keeps its files: neither may touch the checkout or the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
