"""Models, tokenizers, rows and processes that the tests of commands and scripts share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support import patience

ROOT = Path(__file__).resolve().parents[2]


WORDS = "add name list the a of three colours red green blue numbers one two good bad film sun sea write about short poem is are".split()


CHAT = (
    "{% for m in messages %}<bos> {{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant {% endif %}"
)


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = ["<pad>", "<unk>", "<bos>", "<eos>", "user", "assistant", "###", "Instruction", "Response", ":", *WORDS]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = CHAT if chat else None
    return fast


def llama(folder: Path, chat: bool = False, vocabulary: int = 64) -> Path:
    """Widths of 64: bitsandbytes quantizes in blocks of 64 along a row, and its kernels on CPUs with AVX-512 need whole ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def in_new_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run Python with the checkout importable, on one thread, with all files of `datasets` in `cwd`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "hf_home")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=patience.PROGRAM, check=False)
