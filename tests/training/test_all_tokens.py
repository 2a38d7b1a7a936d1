"""Where every token is kept, a run is plain training: the same gradients, the same logged losses.

With token_ratio 1 the model goes its own way. A little less keeps all tokens of these rows too, for budgets are rounded up, but through the
method; and in a stream the method is there in any case.
"""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_memtune.evaluation import load_metric
from tests.support.all_tokens import assert_equal_runs, pad_pairs, shifting_loss
from tests.support.runs import arguments, pad_right, text_rows, train, worst_step
from tests.support.tiny_models import tiny_model
from tests.support.tolerances import NOTICED, RELATIVE

EXACT = RELATIVE[torch.float64]
ROWS = text_rows(24)  # some have a label at their first token, which transformers counts for GPT-2, although nothing predicts it
WAYS = {
    "own way": {"token_ratio": 1.0},
    "kept": {"token_ratio": 0.999},
    "sampled": {"token_ratio": 0.999, "token_selection": "sample"},
    "stream": {"token_ratio": 0.999, "token_gradient": "stream", "sequence_chunk_size": 5, "select_from": "labels"},
    "skip": {"token_ratio": 0.999, "token_gradient": "skip", "sequence_chunk_size": 5, "skip_threshold": 0.0},
}
LESS = {"some": {"token_ratio": 0.7}}
NOT_CAUSAL = ["own way", "kept", "sampled"]
OF_ROWS = ["own way", "kept"]
PLAIN = {}  # runs by transformers' Trainer, by what they are of: one for all ways
CUTS = {"whole": {}, "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}}


def both(tmp_path, name, head, rows, way, settings=None, num_labels=3, **kwargs):
    """The same run by our Trainer and by transformers'."""
    settings, model = {"max_steps": 2, **(settings or {})}, partial(tiny_model, name, head, num_labels=num_labels)
    ours = train(model(), arguments(tmp_path, **settings, **(WAYS | LESS)[way]), rows, **kwargs)
    if (case := repr((name, head, rows, settings, sorted(kwargs)))) not in PLAIN:
        PLAIN[case] = train(model(), arguments(tmp_path, seeking=False, **settings), rows, cls=Trainer, **kwargs)
    return ours, PLAIN[case]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_causal_lm(tmp_path, name, way, cut):
    assert_equal_runs(*both(tmp_path, name, "causal_lm", ROWS, way, CUTS[cut]))


@pytest.mark.parametrize("way", WAYS)
def test_label_smoothing(tmp_path, way):
    settings = CUTS["accumulated"] | {"label_smoothing_factor": 0.1}
    assert_equal_runs(*both(tmp_path, "gpt2", "causal_lm", ROWS, way, settings))


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_function_of_the_users_own(tmp_path, way):
    runs = both(tmp_path, "gpt2", "causal_lm", ROWS, way, CUTS["accumulated"], compute_loss_func=shifting_loss)
    assert_equal_runs(*runs, allowed=EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("way", WAYS)
def test_sequence_to_sequence(tmp_path, way, smoothing):
    """BART's own loss takes no notice of the count of the accumulated batch."""
    rows = [{"input_ids": a["input_ids"], "target": b["input_ids"]} for a, b in zip(text_rows(24), text_rows(24, seed=4))]
    settings = CUTS["accumulated"] | {"remove_unused_columns": False, "label_smoothing_factor": smoothing}
    assert_equal_runs(*both(tmp_path, "bart", "seq2seq", rows, way, settings, data_collator=pad_pairs))


@pytest.mark.parametrize("way", NOT_CAUSAL)
def test_masked_lm(tmp_path, way):
    rows = [row | {"labels": [-100 if n % 3 else i for n, i in enumerate(row["input_ids"])]} for row in text_rows(24)]
    assert_equal_runs(*both(tmp_path, "bert", "masked_lm", rows, way))


@pytest.mark.parametrize("way", NOT_CAUSAL)
def test_token_classification(tmp_path, way):
    rows = [row | {"labels": [-100 if label < 0 else label % 3 for label in row["labels"]]} for row in text_rows(24)]
    assert_equal_runs(*both(tmp_path, "bert", "token_classification", rows, way))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("way", OF_ROWS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sequence_classification(tmp_path, name, way, cut):
    rows = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(text_rows(24))]
    metric = load_metric("accuracy")

    def accuracy(predicted):
        return metric.compute(predictions=np.argmax(predicted.predictions, -1), references=predicted.label_ids)

    settings = CUTS[cut] | {"eval_strategy": "steps", "eval_steps": 1}
    collator = {"data_collator": lambda batch: pad_right(batch, padding=1)} if name == "bert" else {}
    ours, plain = both(
        tmp_path, name, "sequence_classification", rows, way, settings, compute_metrics=accuracy, eval_dataset=rows, **collator
    )
    assert_equal_runs(ours, plain)
    measured = [[e["eval_accuracy"] for e in r.trainer.state.log_history if "eval_accuracy" in e] for r in (ours, plain)]
    assert measured[0] == measured[1] and len(measured[0]) == 2


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("way", OF_ROWS)
def test_question_answering(tmp_path, way, cut):
    # of one length: the plain softmax over positions includes padding, through which nothing is learned here
    texts = text_rows(24, shortest=9, longest=9)
    rows = [{"input_ids": row["input_ids"], "start_positions": n % 3, "end_positions": 3} for n, row in enumerate(texts)]
    assert_equal_runs(*both(tmp_path, "bert", "question_answering", rows, way, CUTS[cut], num_labels=2))


def test_fewer_tokens_are_noticed(tmp_path):
    """Sibling: the comparison sees when some tokens are left out."""
    ours, plain = both(tmp_path, "gpt2", "causal_lm", ROWS, "some")
    assert worst_step(ours, plain) > NOTICED
    with pytest.raises(AssertionError):
        assert_equal_runs(ours, plain)
