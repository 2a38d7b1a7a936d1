"""`hf-memtune merge --model LORA_FOLDER --output_dir NEW_FOLDER`: LoRA adapters added to the weights, as a plain model.

The arithmetic is peft's `merge_and_unload`. Weights keep the dtype of the base model; tokenizer and generation config go along.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hf_memtune.cli.checks import ADAPTERS, REVERSIBLE_CONFIG, why_unwritable
from hf_memtune.cli.essentials import PAGES
from hf_memtune.errors import ConfigError, first_line
from hf_memtune.files import is_partial, whole_folder
from hf_memtune.settings.protocol import setting

HEADS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}


@dataclass
class Merging:
    """What is merged, and where it goes."""

    _argument_group_name = "merging"

    model_name_or_path: str | None = setting(None, "Required. Folder of LoRA adapters, as train or peft writes them.", aliases=["--model"])
    output_dir: str | None = setting(None, "Required. Folder in which the plain model is written; must be new or empty.")
    base_model: str | None = setting(None, "The model that the adapters were trained on. Default: what the adapters' folder names.")

    def problems(self) -> list[str]:
        return [*self._problems_of_adapters(), *self._problems_of_output()]

    def _problems_of_adapters(self) -> list[str]:
        if self.model_name_or_path is None:
            return ["model_name_or_path: got nothing, expected a folder of LoRA adapters (--model FOLDER)."]
        folder = Path(self.model_name_or_path)
        if not folder.is_dir():
            return [f"model_name_or_path: {str(folder)!r} is not a folder."]
        if (folder / REVERSIBLE_CONFIG).is_file():
            return [
                f"model_name_or_path: {str(folder)!r} holds adapters of reversible layers. They cannot be merged: they act between the two "
                "halves of a layer, which the plain model does not have. Use them with --reversible_adapters, or load_reversible."
            ]
        if not (folder / ADAPTERS).is_file():
            return [f"model_name_or_path: {str(folder)!r} holds no LoRA adapters (it has no {ADAPTERS})."]
        return []

    def _problems_of_output(self) -> list[str]:
        if self.output_dir is None:
            return ["output_dir: got nothing, expected a new folder (--output_dir FOLDER)."]
        folder = Path(self.output_dir)
        if folder.exists() and (not folder.is_dir() or not all(map(is_partial, folder.iterdir()))):
            return [f"output_dir: {str(folder)!r} exists and is not an empty folder. Name a new one."]
        why = why_unwritable(folder)
        return [] if why is None else [f"output_dir: got {str(folder)!r}, and {why}. Name another one."]


def run(arguments: list[str]) -> None:
    """Write the plain model and say where. Raises ConfigError with all problems of the settings, before anything is loaded."""
    merging = parse(arguments)
    model = merged(merging)
    write(model, merging)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters in {str(model.dtype).removeprefix('torch.')}, saved in {merging.output_dir}")


def parse(arguments: list[str]) -> Merging:
    """Settings from flags. Raises ConfigError with every problem."""
    from hf_memtune.cli.settings import Parser, build, values_of

    page = PAGES["merge"]
    parser = Parser([Merging], usage=f"hf-memtune merge {page.usage}", description=page.about)
    namespace = parser.read(arguments, with_recipe=False)
    problems = parser.problems
    merging = build(Merging, values_of(Merging, namespace), problems)
    if problems:
        raise ConfigError(problems)
    return merging


def merged(merging: Merging):
    """The base model with the adapters in its weights; every parameter in the dtype that the base model has."""
    from peft import PeftModel

    base = load_base(merging)
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters(remove_duplicate=False)}
    try:
        wrapped = PeftModel.from_pretrained(base, merging.model_name_or_path)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: sizes that do not match
        wrong = f"the adapters of {merging.model_name_or_path!r} do not fit the model {base.name_or_path!r}: {first_line(error)}"
        raise ConfigError([f"model_name_or_path: {wrong}. Name the model they were trained on (--base_model M)."]) from error
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        kind = wrapped.peft_config["default"].peft_type.value
        raise ConfigError([f"model_name_or_path: adapters of the kind {kind} change no weights, so they cannot be merged."])
    _untie(wrapped)
    model = wrapped.merge_and_unload(safe_merge=True)
    for name, parameter in model.named_parameters():  # peft trains a head in float32, whatever the model is in
        parameter.data = parameter.data.to(dtypes.get(name, base.dtype))
    _say_what_is_untied(model)
    return model


def _untie(wrapped) -> None:
    """A weight of its own for every adapted layer that shares its weight, as lm_head does: the others would get what is merged into it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    users = Counter(id(p) for module in wrapped.modules() for p in module._parameters.values() if p is not None)
    for layer in [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is not None and users[id(weight)] > 1:
            users[id(weight)] -= 1
            base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)


def _say_what_is_untied(model) -> None:
    """In the config, which would else have embedding and head become one again when they are loaded."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def load_base(merging: Merging):
    """The model the adapters were trained on, with the head they were trained with, in the dtype in which it is stored."""
    import transformers

    config = json.loads(Path(merging.model_name_or_path, ADAPTERS).read_text(encoding="utf-8"))
    name, task = merging.base_model or config.get("base_model_name_or_path"), config.get("task_type") or "CAUSAL_LM"
    if not name:
        raise ConfigError([f"base_model: {ADAPTERS} names no model. Name the one that the adapters were trained on (--base_model M)."])
    if task not in HEADS:
        raise ConfigError([f"model_name_or_path: adapters of task {task}, expected {' or '.join(HEADS)}. Merge them with peft."])
    options = _classes(merging.model_name_or_path, name) if task == "SEQ_CLS" else {}
    try:
        return getattr(transformers, HEADS[task]).from_pretrained(name, dtype="auto", **options)
    except (OSError, ValueError, ImportError) as error:
        wrong = f"the model {name!r}, which the adapters were trained on, cannot be loaded: {first_line(error)}"
        raise ConfigError([f"base_model: {wrong}. If it has moved, say where it is (--base_model FOLDER)."]) from error


def _classes(folder: str, base: str) -> dict:
    """Options to load the base model with the classes that were trained."""
    from hf_memtune.cli.arguments import ModelSource
    from hf_memtune.cli.data.classes import known_classes
    from hf_memtune.cli.model import names_of

    known = known_classes(ModelSource(model_name_or_path=folder), base)
    if known is None:
        raise ConfigError([f"model_name_or_path: {folder!r} holds no trained head of a classifier."])
    return names_of(known)


def write(model, merging: Merging) -> None:
    """Weights, config and generation config, and the tokenizer of the run; that of the base model where the run has none.

    The folder is there when all of it is written; where it was there before, its config.json comes last.
    """
    from hf_memtune.cli.data.classes import CLASSIFIER

    tokenizer = _tokenizer(merging.model_name_or_path, model.name_or_path)
    padding = None if tokenizer is None else tokenizer.pad_token_id
    if padding is not None and type(model).__name__.endswith(CLASSIFIER):  # its head looks for the last token that is not this one
        model.config.get_text_config().pad_token_id = padding
    with whole_folder(merging.output_dir, last="config.json") as folder:
        model.save_pretrained(folder)
        if tokenizer is None:
            print(f"no tokenizer beside the adapters or the model: {merging.output_dir} has none")
        else:
            tokenizer.save_pretrained(folder)


def _tokenizer(*sources: str):
    """Of the first source that has one; None where none has."""
    from transformers import AutoTokenizer

    for source in sources:
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, ImportError):
            continue
    return None
