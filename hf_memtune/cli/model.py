"""The model and the tokenizer that the settings describe, with adapters around the model where asked for."""

import warnings
from pathlib import Path

from hf_memtune.cli.arguments import ALL_LINEAR, DataSource, ModelArguments, ModelSource
from hf_memtune.cli.checks import problems_of_folder
from hf_memtune.cli.lengths import check_length
from hf_memtune.errors import ConfigError, first_line

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def load_tokenizer(model: ModelSource):
    """The tokenizer beside the model, with a padding token."""
    from transformers import AutoTokenizer

    if wrong := problems_of_folder(model.model_name_or_path, model.reversible_adapters):
        raise ConfigError(wrong)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError([f"model_name_or_path: {_why_no_tokenizer(model.model_name_or_path, error)}"]) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            wrong = f"the tokenizer of {model.model_name_or_path!r} has neither a padding nor an end token"
            raise ConfigError([f"model_name_or_path: {wrong}; save it with one (tokenizer.pad_token = ...)."])
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _why_no_tokenizer(name: str, error: Exception) -> str:
    """What is wrong, in one line: transformers and the hub say it in many, of libraries that play no part."""
    if not Path(name).is_dir():
        return f"{name!r} is no folder here, and the hub gives no model of this name ({first_line(error)})."
    if any(Path(name, file).is_file() for file in TOKENIZERS):
        return f"the tokenizer in {name!r} cannot be read: {first_line(error)}."
    return f"the folder {name!r} holds no tokenizer. Save that of the model into it (tokenizer.save_pretrained); other models have none."


def _why_not(name: str, task: str, error: Exception) -> str:
    """Why a model was not loaded, in one line."""
    if "Unrecognized configuration class" not in str(error):
        return f"{name!r} cannot be loaded for {task}: {first_line(error)}."
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(name).model_type
    return f"{name!r} is a model of the type {kind}, which transformers has no {task} model for. Expected a text model."


def load_model(model: ModelSource, data: DataSource, tokenizer, classes: list | None = None, **options):
    """The model with the head of the task. classes: names of the classes, for sequence classification."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from hf_memtune.architectures.language_model import problem_of_language_model
    from hf_memtune.cli.data.classes import known_classes

    auto = AutoModelForCausalLM
    if data.task == "sequence_classification":
        auto = AutoModelForSequenceClassification
        options |= names_of(classes)
    elif (known := known_classes(model)) is not None:
        wrong = f"{model.model_name_or_path!r} tells {len(known)} classes apart, and the rows are text without any: its language head would be a new one"
        remedy = (
            "Name a language model; or, for rows with classes, their column and the task (--label_column, --task sequence_classification)"
        )
        raise ConfigError([f"model_name_or_path: {wrong}. {remedy}."])
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    try:
        loaded, found = auto.from_pretrained(model.model_name_or_path, dtype=model.dtype, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError([f"model_name_or_path: {_why_not(model.model_name_or_path, data.task, error)}"]) from error
    if auto is AutoModelForCausalLM and (wrong := problem_of_language_model(loaded, found)):
        raise ConfigError(
            [f"model_name_or_path: {model.model_name_or_path!r} {wrong}. Name a model that was trained to predict the next token."]
        )
    check_length(loaded, data.max_length)
    if data.task == "sequence_classification":  # its head looks for the last token that is not this one
        loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return loaded


def load_on_device(model: ModelSource, data: DataSource, tokenizer, classes: list | None = None):
    """The model on the accelerator, or on the CPU where there is none, with the reversible adapters that the settings name. Warns of a slow dtype."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    loaded = load_model(model, data, tokenizer, classes).to(device)
    if slow := slow_dtype(loaded, device):
        warnings.warn(slow, stacklevel=2)
    with_reversible_adapters(loaded, model)
    return loaded


def names_of(classes: list) -> dict:
    """Options of a config that name the classes, in the order of their numbers."""
    names = {number: str(name) for number, name in enumerate(classes)}
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def load_trainable(model: ModelArguments, data: DataSource, tokenizer, classes: list | None = None):
    """The model to train: whole, or frozen (in 4 bits where asked for) with LoRA adapters."""
    loaded = load_model(model, data, tokenizer, classes, **(_four_bits_here(model) if model.load_in_4bit else {}))
    if getattr(loaded, "_hf_peft_config_loaded", False):  # of the hub, where nothing was seen before
        wrong = f"{model.model_name_or_path!r} is LoRA adapters, expected a whole model: they would not be trained further"
        remedy = "Download its folder, and merge it first (hf-memtune merge --model FOLDER --output_dir MERGED)"
        raise ConfigError([f"model_name_or_path: {wrong}. {remedy}."])
    return with_adapters(loaded, model, data) if model.lora_r else loaded


def slow_dtype(loaded, device) -> str | None:
    """What to say of weights in a dtype that this CPU computes in software; None where it has units for it, and on other devices."""
    import torch

    supported = {"bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported, "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported}
    name = str(loaded.dtype).removeprefix("torch.")
    if device.type != "cpu" or name not in supported or supported[name]():
        return None
    return (
        f"dtype: the weights are in {name}, for which this CPU has no units: it may take ten times as long as in float32. Set "
        "--dtype float32 (4 bytes a parameter)."
    )


def with_reversible_adapters(loaded, model: ModelSource):
    """The handle of the reversible layers that the settings name, put into the model; None where they name none."""
    from hf_memtune.training.reversible.files import load_reversible

    return None if model.reversible_adapters is None else load_reversible(loaded, model.reversible_adapters)


def _four_bits_here(model: ModelArguments) -> dict:
    """Options to load NF4 weights onto the device of this process."""
    from accelerate import PartialState

    return {"quantization_config": four_bits(model), "device_map": {"": PartialState().device}}


def four_bits(model: ModelArguments):
    """How weights are quantised: NF4 with double quantisation, as in QLoRA (arXiv 2305.14314)."""
    import torch
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401  transformers would say so only after the data are prepared
    except ImportError as error:
        raise ConfigError(["load_in_4bit: needs bitsandbytes; pip install -e '.[quantization]'."]) from error
    computed = getattr(torch, model.dtype) if model.dtype != "auto" else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=computed)


def with_adapters(loaded, model: ModelArguments, data: DataSource):
    from peft import LoraConfig, TaskType, get_peft_model

    targets = model.lora_target_modules
    names = [name for name, _ in loaded.named_modules()]
    missing = [] if targets == [ALL_LINEAR] else [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        wrong = f"{type(loaded).__name__} has no module named {', '.join(missing)}"
        raise ConfigError(
            [f"lora_target_modules: {wrong}. Expected ends of names such as {names[-1]}, or {ALL_LINEAR} for all linear layers."]
        )
    config = LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        task_type=TaskType.SEQ_CLS if data.task == "sequence_classification" else TaskType.CAUSAL_LM,
    )
    try:
        wrapped = get_peft_model(loaded, config)
    except ValueError as error:
        raise ConfigError([f"lora_target_modules: got {targets}: {error}"]) from error
    base = Path(model.model_name_or_path)
    if base.is_dir():  # a relative path would be looked for in whichever folder the adapters are used from
        wrapped.peft_config["default"].base_model_name_or_path = str(base.resolve())
    return wrapped
