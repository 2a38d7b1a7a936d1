"""The start on real weights, as far as docs/reversible.md says that it holds; where `make assets` has fetched them."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers as tf

from hf_memtune import ReversibleConfig, make_reversible

ASSETS = Path(os.environ.get("HF_MEMTUNE_ASSETS", Path(__file__).parents[2] / ".assets"))
NEEDED = ("models/smollm2-135m-instruct", "models/all-MiniLM-L6-v2", "data/alpaca/train.jsonl", "data/movie_reviews/rotten_tomatoes.jsonl")
pytestmark = pytest.mark.skipif(not all((ASSETS / name).exists() for name in NEEDED), reason="needs make assets")


def start_of(kind, folder, file, column, numerics="exact", rows=6, **settings):
    """What `verify` finds on the first rows of a file, adapters zero."""
    tokenizer = tf.AutoTokenizer.from_pretrained(ASSETS / "models" / folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [json.loads(line)[column] for line in (ASSETS / "data" / file).read_text().splitlines()[:rows]]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=40))
    batch.pop("token_type_ids", None)
    if kind is tf.AutoModelForCausalLM:
        batch |= {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100), "use_cache": False}
    model = kind.from_pretrained(ASSETS / "models" / folder, dtype=torch.float32)
    config = ReversibleConfig(reversible_numerics=numerics, adapter_init_std=0.0, **settings)
    return make_reversible(model, config).verify(batch)


def test_the_language_model():
    """0.02 of loss from c = 1/32 on; at 1/16 it is a little more."""
    common = (tf.AutoModelForCausalLM, "smollm2-135m-instruct", "alpaca/train.jsonl", "output")
    near, default = (start_of(*common, rows=4, reversible="centred", reversible_scale=scale) for scale in (1 / 32, 1 / 16))
    assert abs(near.loss_change) <= 0.02 and abs(near.loss_change) < abs(default.loss_change) <= 0.06
    assert near.is_exact and default.is_exact and near.headroom_bits > 2


def test_the_encoder():
    """0.10 of the states at c = 1/16, on sentences."""
    common = (tf.AutoModel, "all-MiniLM-L6-v2", "movie_reviews/rotten_tomatoes.jsonl", "text")
    assert start_of(*common, reversible="centred").state_change <= 0.10
    assert start_of(*common, reversible="centred", reversible_scale=1 / 8).state_change > 0.10
    assert start_of(*common, reversible="meft1").state_change > 0.5
