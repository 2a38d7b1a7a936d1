"""The longest row and the largest batch that fit: the search on made-up bytes, and on estimates."""

from functools import cache, partial

import pytest
from transformers import LlamaConfig

from hf_memtune import MemEfficientTrainingArguments, estimate
from hf_memtune.forecast.ladder import Rung
from hf_memtune.forecast.longest import FINE, Found, largest, longest_row
from hf_memtune.forecast.plan import make_plan
from hf_memtune.memory.cards import ALLOCATOR_SHARE, CARDS, CONTEXT_BYTES, Room
from hf_memtune.units import GIB

LINES = {
    "one line": lambda n: 1000 + 7 * n,
    "the larger of two": lambda n: max(5000 + n, 1000 + 9 * n),
    "the largest of three": lambda n: max(9000, 5000 + 3 * n, 40 * n - 20000),
    "a square": lambda n: 100 + n * n,
    "no growth": lambda n: 10,
    "pieces that are full at first": lambda n: 300 * min(n, 5) + 7 * n,
    "full at first, and larger later": lambda n: max(300 * min(n, 5) + 7 * n, 40 * n - 3000),
}


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("budget", [9, 1200, 9050, 30_000])
def test_it_is_the_largest_that_fits(name, budget, unit):
    at_most = 1003
    fitting = [size for size in range(unit, at_most + 1, unit) if LINES[name](size) <= budget]
    found = largest(LINES[name], budget, unit, at_most)
    assert found.size == max(fitting, default=0)
    if found.size:
        assert found.bytes == LINES[name](found.size) <= budget
    if found.size + unit <= at_most:
        assert LINES[name](found.size + unit) >= found.bytes_beyond > budget
    else:
        assert found.bytes_beyond is None


def test_on_a_line_only_the_answer_itself_is_traced_at_its_length():
    found = largest(lambda n: 1000 + 7 * n, 10**4, 1, 10**9)
    assert found.sizes == (8, 12, 1285) and found.size == 1285 and found.bytes_beyond == 1000 + 7 * 1286
    assert len(largest(lambda n: max(5 * 10**5 + n, 9 * n), 10**6, 1, 10**9).sizes) <= 8


def test_a_line_through_rows_shorter_than_a_piece_is_not_trusted():
    """They grow faster than longer ones do: that line would end the search too early."""
    found = largest(LINES["pieces that are full at first"], 2000, 1, 1000)
    assert found.size == 71 and LINES["pieces that are full at first"](8) / 8 * 71 > 2000


@pytest.mark.parametrize("chunk, positions", [(None, 1000), (None, 40), (16, 1000), (300, 1000), (512, 1024), (2048, 1000), (2048, 2048)])
@pytest.mark.parametrize("budget", [1007, 1500, 4000, 7900, 7999, 10**6])
def test_the_longest_row_with_whatever_chunk(chunk, positions, budget):
    """In whole chunks, in parts where no whole one fits, and up to the last position; never is less said to fit than does."""
    steps = range(min(chunk or FINE, positions), positions + 1, min(chunk or FINE, positions))
    fitting = [size for size in [*steps, positions] if LINES["one line"](size) <= budget]
    parts = [size for size in range(FINE, steps[0], FINE) if LINES["one line"](size) <= budget]
    found = longest_row(LINES["one line"], budget, chunk, positions)
    assert found.size == max(fitting or parts, default=0)
    assert (found.bytes_beyond is None) == (found.size == positions)
    if found.size:
        assert found.bytes == LINES["one line"](found.size) <= budget
    if found.bytes_beyond is not None:
        assert found.bytes_beyond > budget


def test_whole_chunks_alone_would_miss_both():
    """Sibling: of a chunk longer than the model has positions there is no multiple, and of none it cannot be said what it needs."""
    assert largest(LINES["one line"], 8000, 2048, 1000) == Found(0, None, None, ())
    assert largest(LINES["one line"], 8000, 300, 1000).size == 900 and longest_row(LINES["one line"], 8000, 300, 1000).size == 1000


CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=200,
    max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture
def arguments(tmp_path):
    return partial(MemEfficientTrainingArguments, str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=1)


@pytest.mark.parametrize(
    "settings, unit, sizes",
    [({}, 32, (2, 7)), ({"sequence_chunk_size": 16, "activation_checkpointing": True}, 16, (2,))],
    ids=["plain", "stream"],
)
def test_the_longest_row_of_a_model(arguments, settings, unit, sizes):
    """Estimated, and one step beyond it, which does not fit."""
    args = arguments(**settings)

    @cache
    def peak(tokens):
        return estimate(CONFIG, args, sequence_length=tokens).peak_bytes

    for size in sizes:
        budget = peak(size * unit) + 1
        found = largest(peak, budget, unit, (size + 3) * unit)
        assert found.size == size * unit and found.bytes <= budget < found.bytes_beyond <= peak((size + 1) * unit)


@pytest.mark.parametrize("order, layers_on_the_device", [("chunks", 0), ("layers", 1)])
def test_what_is_offloaded_is_no_memory_of_the_device(arguments, order, layers_on_the_device):
    """Keys and values of all layers; or the inputs of the layers, and of one layer at a time they are there."""
    args = arguments(sequence_chunk_size=16, activation_checkpointing=True, stream_order=order)
    kept = estimate(CONFIG, args, sequence_length=48)
    vars(args)["kv_offload"] = True  # on a CPU it is refused: host and device are one there
    moved, whole = (estimate(CONFIG, args, sequence_length=48, every_layer=every) for every in (False, True))
    assert moved.peak_bytes == whole.peak_bytes < kept.peak_bytes
    of_a_layer = 2 * 2 * CONFIG.num_key_value_heads * CONFIG.head_dim * 48 * 4  # and what is owed to them
    assert kept.by_category["stored_kv"] > of_a_layer >= 0 and moved.by_category["stored_kv"] <= layers_on_the_device * of_a_layer
    assert min(moved.by_category.values()) >= 0


def test_a_card_has_less_room_than_memory():
    room = Room.of_card("RTX4090")
    assert CARDS["rtx4090"] == 24 and room.tensor_bytes == int((24 * GIB - CONTEXT_BYTES) / (1 + ALLOCATOR_SHARE))
    assert "24 GiB less an allowance of 2.09 GiB" in room.source
    with pytest.raises(KeyError):
        Room.of_card("abacus")


# -- plans


def test_what_cannot_fit_is_not_traced(arguments):
    rungs = [Rung("as given", "exact", {}), Rung("smaller", "exact", {"small": True})]
    traced = []

    def predict(changes):
        traced.append(changes)
        return estimate(CONFIG, arguments(), sequence_length=32)

    floor = lambda changes: 10 if changes else 10**12  # noqa: E731
    plan = make_plan(rungs, predict, 10**11, floor=floor)
    assert traced == [{"small": True}] and plan.chosen.rung.name == "smaller"
    assert plan.steps[0].at_least == 10**12 and not plan.steps[0].fits


def test_where_evaluation_sets_the_peak_its_batch_is_made_smaller(arguments):
    @cache
    def evaluating(rows):
        return estimate(CONFIG, arguments(per_device_eval_batch_size=rows, eval_strategy="steps", eval_steps=1), sequence_length=64)

    def predict(changes):
        return evaluating(changes.get("per_device_eval_batch_size", 16))

    budget = predict({"per_device_eval_batch_size": 1}).peak_bytes
    assert predict({}).peak_phase == "evaluation" and predict({}).peak_bytes > budget
    heard = []
    plan = make_plan([Rung("as given", "exact", {}), Rung("next", "exact", {})], predict, budget, tell=heard.append)
    assert all(0 < step.rung.changes["per_device_eval_batch_size"] < 16 and step.fits for step in plan.steps)
    assert plan.steps[0].estimate.peak_phase != "evaluation" and heard == list(plan.steps)
