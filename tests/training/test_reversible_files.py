"""Reversible adapters in files: what is written, resumed and loaded, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_memtune import (
    ConfigError,
    MemEfficientTrainer,
    MemTuneError,
    ReversibleConfig,
    load_reversible,
    make_reversible,
    save_reversible,
)
from hf_memtune.training.reversible import files as reversible_files
from hf_memtune.training.reversible.files import SETTINGS, WEIGHTS
from tests.support.reversible_models import model_of
from tests.support.reversible_runs import CENTRED, ROWS, adapted, deep, quiet, reversible  # noqa: F401  a fixture for all
from tests.support.runs import arguments, pad_right, train, trainer_for
from tests.support.tiny_models import tiny_model

PROMPT = torch.tensor([[7, 11, 13, 17], [8, 12, 14, 18]])
SLOW = {"optim": "adamw_torch", "learning_rate": 0.05, "adapter_dropout": 0.2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained model, and the folder it was saved in."""
    folder = tmp_path_factory.mktemp("saved")
    run = train(deep(), reversible(folder, **SLOW), ROWS)
    run.trainer.save_model()
    return run.trainer.model, folder


def logits(model):
    return model.eval()(**pad_right(ROWS[:3])).logits


def other_base():
    model = deep()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.1
    return model


# -- what is written ---------------------------------------------------------------------------------------------------


def test_adapters_alone_are_written(saved):
    model, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert names == {WEIGHTS, SETTINGS, "training_args.bin"}
    assert load_file(folder / WEIGHTS).keys() == {name for name in model.state_dict() if "reversible_adapters" in name}
    described = json.loads((folder / SETTINGS).read_text())
    assert described["settings"]["reversible"] == "centred" and described["settings"]["reversible_scale"] == 1 / 16
    assert described["settings"]["reversible_fraction_bits"] == 12 and described["base"]["class"] == "LlamaForCausalLM"
    assert described["versions"].keys() == {"hf_memtune", "transformers", "torch"}


def test_the_base_is_read_again_when_it_has_changed(tmp_path):
    """And not when it has not: a checkpoint should cost what it holds."""

    def saved_marks():
        save_reversible(handle, tmp_path)
        return json.loads((tmp_path / SETTINGS).read_text())["base"]["parameters"]

    model = deep()
    handle = make_reversible(model, ReversibleConfig(reversible="centred"))
    first, reads = saved_marks(), reversible_files._KNOWN[handle]
    assert saved_marks() == first and reversible_files._KNOWN[handle] is reads
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    changed = saved_marks()
    assert [name for name in first if changed[name] != first[name]] == ["model.norm.weight"]


def test_a_head_is_written_with_them(tmp_path):
    model = classifier()
    rows = [{"input_ids": row["input_ids"], "labels": number % 2} for number, row in enumerate(ROWS)]
    trainer = train(model, reversible(tmp_path), rows, data_collator=pad_classes).trainer
    trainer.save_model()
    assert "classifier.weight" in load_file(tmp_path / WEIGHTS)
    again = classifier(seed=5)  # whose head is another one: it is not of the base
    with torch.no_grad():
        own = dict(classifier().named_parameters())
        for name, p in again.named_parameters():
            if "classifier" not in name and "pooler" not in name:
                p.copy_(own[name])
    load_reversible(again, tmp_path)
    batch = pad_classes(rows[:3])
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def classifier(**overrides):
    return tiny_model("bert", "sequence_classification", dtype=torch.float32, **overrides)


def pad_classes(rows):
    labels = torch.tensor([row["labels"] for row in rows])
    return pad_right([{"input_ids": row["input_ids"]} for row in rows]) | {"labels": labels}


# -- loading -----------------------------------------------------------------------------------------------------------


def test_what_is_loaded_computes_the_same(saved):
    model, folder = saved
    base = deep()
    plain = logits(base)
    handle = load_reversible(base, folder)
    assert torch.equal(logits(base), logits(model)) and not torch.equal(logits(base), plain)
    handle.restore()
    assert torch.equal(logits(base), plain)


@pytest.mark.parametrize("numerics", ["exact", "float"])
@pytest.mark.filterwarnings("ignore:reversible_numerics=float")
def test_generation_with_a_cache_gives_the_same_tokens(tmp_path, numerics):
    train(deep(), reversible(tmp_path, reversible_numerics=numerics), ROWS).trainer.save_model()
    model = deep().eval()
    plain = model.generate(PROMPT, max_new_tokens=20, do_sample=False)
    load_reversible(model, tmp_path)
    cached, whole = (model.generate(PROMPT, max_new_tokens=20, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole) and cached.shape == (2, 24)
    assert not torch.equal(cached, plain)


def test_a_model_loaded_in_another_dtype_is_the_same_base(tmp_path):
    """As large models are: trained in float32, used in bfloat16, and the other way round."""
    train(deep(dtype=torch.bfloat16), reversible(tmp_path), ROWS).trainer.save_model()
    load_reversible(deep(dtype=torch.bfloat16).float(), tmp_path)
    with pytest.raises(MemTuneError, match="another model"):
        load_reversible(other_base().bfloat16(), tmp_path)


def test_training_goes_on(saved, tmp_path):
    model, folder = saved
    base = deep()
    handle = load_reversible(base, folder)
    run = train(base, arguments(tmp_path, token_seeking=False), ROWS, reversible=handle)
    assert run.gradients[0].keys() == handle.trained.keys()
    assert not torch.equal(logits(base), logits(model))
    run.trainer.save_model()
    again = deep()
    load_reversible(again, tmp_path)
    assert torch.equal(logits(again), logits(base))


def test_a_handle_belongs_to_the_model_and_has_the_settings(saved, tmp_path):
    base = deep()
    handle = load_reversible(base, saved[1])
    with pytest.raises(ConfigError, match="another model"):
        trainer_for(deep(), arguments(tmp_path, token_seeking=False), ROWS, reversible=handle)
    with pytest.raises(ConfigError, match="Leave the argument out"):
        trainer_for(base, reversible(tmp_path), ROWS, reversible=handle)


def test_lora_is_saved_by_peft_and_the_coupling_beside_it(tmp_path):
    settings = {"adapter_rank": 0, "adapter_init_std": None}
    trainer = train(adapted(), reversible(tmp_path, **settings), ROWS).trainer
    trainer.save_model()
    assert {"adapter_model.safetensors", SETTINGS} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(MemTuneError, match="PeftModel.from_pretrained"):  # as the base model, coupled, it would be something else
        load_reversible(deep(), tmp_path)
    again = PeftModel.from_pretrained(deep(), tmp_path)
    uncoupled = logits(again)
    load_reversible(again, tmp_path)
    assert torch.equal(logits(again), logits(trainer.model)) and not torch.equal(logits(again), uncoupled)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_random_head_that_lora_trains_a_copy_of_is_no_part_of_the_base(tmp_path, rank):
    """PEFT keeps a new head as it was drawn beside the one that is trained: the next run draws another."""
    classes = [{"input_ids": row["input_ids"], "labels": number % 2} for number, row in enumerate(ROWS)]
    adapters = {"adapter_rank": rank} | ({} if rank else {"adapter_init_std": None})
    model = get_peft_model(drawn(1), LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False))
    trainer = train(model, reversible(tmp_path, **adapters), classes, data_collator=pad_classes).trainer
    trainer.save_model()
    again = PeftModel.from_pretrained(drawn(2), tmp_path)
    load_reversible(again, tmp_path)
    found, expected = (each.eval()(**pad_classes(classes[:3])).logits for each in (again, trainer.model))
    assert torch.equal(found, expected)
    as_older_ones(tmp_path)
    load_reversible(PeftModel.from_pretrained(drawn(2), tmp_path), tmp_path)
    with pytest.raises(MemTuneError, match="another model"):
        load_reversible(PeftModel.from_pretrained(drawn(1, change=0.1), tmp_path), tmp_path)


def as_older_ones(folder):
    """A folder of a version that took that head for trained."""
    weights, settings = folder / "reversible_adapters.safetensors", folder / "reversible_config.json"
    save_file(load_file(weights) | {"classifier.original_module.weight": torch.zeros(2, 3)}, weights)
    settings.write_text(json.dumps({name: value for name, value in json.loads(settings.read_text()).items() if name != "digest"}))


def drawn(seed, change=0.0):
    """A classifier of one body, whose head is drawn by the seed."""
    model = classifier()
    torch.manual_seed(seed)
    with torch.no_grad():
        model.classifier.weight.normal_()
        model.bert.encoder.layer[0].output.dense.weight[0, 0] += change
    return model


# -- refusals of loading -----------------------------------------------------------------------------------------------


def copied(folder, into):
    for name in (WEIGHTS, SETTINGS):
        (into / name).write_bytes((folder / name).read_bytes())
    return into


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-40])


def without_a_key(path):
    state = load_file(path)
    state.pop(next(iter(state)))
    save_file(state, path)


def of_other_shape(path):
    save_file({name: torch.cat([value, value]) for name, value in load_file(path).items()}, path)


def before_digests(damage):
    """The folder of a version that kept no digest, by which all damage is known."""

    def damaged(path):
        damage(path)
        settings = path.parent / SETTINGS
        settings.write_text(json.dumps({name: value for name, value in json.loads(settings.read_text()).items() if name != "digest"}))

    return damaged


BROKEN = {
    "cut off": (WEIGHTS, cut_off, "broken or cut off"),
    "cut off settings": (SETTINGS, cut_off, "broken or cut off"),
    "no weights": (WEIGHTS, lambda path: path.unlink(), "is missing"),
    "no settings": (SETTINGS, lambda path: path.unlink(), "no reversible layers were saved"),
    "another save": (WEIGHTS, without_a_key, "not the file that was saved with"),
    "no key": (WEIGHTS, before_digests(without_a_key), "1 of .* trained tensors do not match"),
    "other shapes": (WEIGHTS, before_digests(of_other_shape), "trained tensors do not match"),
    "other format": (SETTINGS, lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 2')), "expected 1"),
    "other settings": (SETTINGS, lambda path: path.write_text(path.read_text().replace('"centred"', '"leaning"')), "cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused_and_the_model_left(saved, tmp_path, how):
    folder = copied(saved[1], tmp_path)
    load_reversible(deep(), folder)  # it is fine before
    name, damage, message = BROKEN[how]
    damage(folder / name)
    model = deep()
    before = logits(model)
    with pytest.raises(MemTuneError, match=message):
        load_reversible(model, folder)
    assert model.state_dict().keys() == deep().state_dict().keys() and torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", [other_base, lambda: deep(seed=5), lambda: model_of("gpt2"), lambda: deep(intermediate_size=64)])
def test_another_base_model_is_refused(saved, make):
    model = make()
    names = model.state_dict().keys()
    with pytest.raises(MemTuneError, match="this is another model"):
        load_reversible(model, saved[1])
    assert model.state_dict().keys() == names


def test_a_trainer_saves_a_plain_model_when_its_layers_are_out(tmp_path):
    trainer = train(deep(), arguments(tmp_path, **CENTRED), ROWS, cls=MemEfficientTrainer).trainer
    trainer.restore_model()
    trainer.save_model()
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "config.json"}
    assert not (tmp_path / WEIGHTS).exists()
