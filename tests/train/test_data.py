"""Records: real text, codes out of a streaming head's sight, questions that the text answers."""

import dataclasses
import re

import numpy as np
import pytest

from sparseattn_jax.train import config as configs
from sparseattn_jax.train import data

CONFIG = configs.DataConfig(
    text="state_of_the_union_1790_1835.txt",
    held_out=0.1,
    sequence_length=512,
    batch_size=4,
    num_needles=6,
    num_questions=4,
    min_depth=32,
    min_distance=96,
    answer_weight=10.0,
)
SENTENCE = re.compile(r" the code is ([A-Z])([A-Z0-9]{5})\.")
QUESTION = re.compile(r"\nwhat code\? ([A-Z])([A-Z0-9]{5})\.")


@pytest.fixture(scope="module")
def texts() -> tuple[data.Text, data.Text]:
    return data.load_text(CONFIG)


def records(texts, *, seed: int = 0, index: int = 0, **changes) -> list[str]:
    config = dataclasses.replace(CONFIG, **changes)
    batch = data.make_batch(texts[0], config, seed=seed, index=index)
    assert batch.shape == (config.batch_size, config.sequence_length + 1)
    assert batch.dtype == np.int32
    return [bytes(row.astype(np.uint8)).decode() for row in batch]


def test_every_question_is_answered_by_the_text_once(texts) -> None:
    for record in records(texts, batch_size=64):
        planted = SENTENCE.findall(record)
        asked = QUESTION.findall(record)
        assert len(planted) == len(dict(planted)) == CONFIG.num_needles
        assert len(asked) == len({first for first, _ in asked}) == CONFIG.num_questions
        for first, rest in asked:
            assert dict(planted)[first] == rest


def test_what_is_not_planted_is_a_stretch_of_the_training_text(texts) -> None:
    for record in records(texts):
        haystack = QUESTION.sub("", SENTENCE.sub("", record))
        assert len(haystack) == data.text_length(CONFIG)
        assert haystack.encode() in texts[0].tobytes()


def test_codes_lie_behind_the_sinks_and_before_the_window(texts) -> None:
    depths = []
    for index in range(20):
        for record in records(texts, index=index):
            starts = [match.start() for match in SENTENCE.finditer(record)]
            last_end = max(match.end() for match in SENTENCE.finditer(record))
            first_question = record.index("\nwhat code?")
            assert first_question == data.first_question(CONFIG)
            assert min(starts) >= CONFIG.min_depth
            assert first_question - last_end >= CONFIG.min_distance
            depths += starts
    room = data.first_question(CONFIG) - CONFIG.min_distance - CONFIG.min_depth
    assert min(depths) < CONFIG.min_depth + 0.1 * room
    assert max(depths) > CONFIG.min_depth + 0.7 * room


def test_answer_positions_predict_the_codes(texts) -> None:
    batch = data.make_batch(texts[0], CONFIG, seed=0, index=0)
    targets = batch[:, 1:].astype(np.uint8)
    for row, record in zip(targets, records(texts), strict=True):
        codes = [bytes(row[positions]).decode() for positions in data.answer_positions(CONFIG)]
        assert codes == [rest for _, rest in QUESTION.findall(record)]


def test_a_batch_is_a_function_of_seed_and_index(texts) -> None:
    assert records(texts, seed=1, index=2) == records(texts, seed=1, index=2)
    assert records(texts, seed=1, index=2) != records(texts, seed=1, index=3)
    assert records(texts, seed=1, index=2) != records(texts, seed=2, index=2)


def test_codes_differ_within_a_record_at_every_place(texts) -> None:
    for record in records(texts, batch_size=32):
        codes = ["".join(code) for code in SENTENCE.findall(record)]
        assert all(len(set(symbols)) == len(codes) for symbols in zip(*codes, strict=True))


def test_capitals_and_digits_occur_in_codes_alone(texts) -> None:
    for text in texts:
        assert not re.search(rb"[A-Z0-9]", text.tobytes())


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (7, 12), (4, 4)])
def test_the_pipeline_yields_the_batches_of_its_steps(texts, start: int, stop: int) -> None:
    batches = list(data.training_batches(texts[0], CONFIG, seed=5, start=start, stop=stop))
    assert len(batches) == stop - start
    for index, batch in zip(range(start, stop), batches, strict=True):
        assert (batch == data.make_batch(texts[0], CONFIG, seed=5, index=index)).all()


def test_training_and_evaluation_share_no_text(texts) -> None:
    whole = re.sub(rb"[0-9]", b"", configs.find_asset(CONFIG.text).read_bytes().lower())
    training, held_out = texts
    assert training.tobytes() + held_out.tobytes() == whole
    np.testing.assert_allclose(held_out.size / len(whole), CONFIG.held_out, atol=1e-5)


def test_a_record_without_room_for_text_is_refused() -> None:
    crowded = dataclasses.replace(CONFIG, sequence_length=200)
    with pytest.raises(
        configs.InvalidRunError, match=r"data\.sequence_length=200 leaves 5 bytes of text"
    ):
        data.text_length(crowded)


def test_more_codes_than_first_symbols_are_refused() -> None:
    with pytest.raises(configs.InvalidRunError, match=r"data\.num_needles=7 must not exceed 6"):
        data.text_length(dataclasses.replace(CONFIG, num_needles=7))


def test_a_text_that_is_too_short_is_refused(tmp_path) -> None:
    (tmp_path / "short.txt").write_text("word " * 100)
    config = dataclasses.replace(CONFIG, text=str(tmp_path / "short.txt"))
    with pytest.raises(
        configs.InvalidRunError, match="leaves 50 bytes for evaluation, and a record takes 317"
    ):
        data.load_text(config)


def test_a_text_that_is_missing_is_refused() -> None:
    with pytest.raises(configs.InvalidRunError, match=r"nowhere\.txt: no such file"):
        data.load_text(dataclasses.replace(CONFIG, text="nowhere.txt"))
