"""Real text with planted codes and questions about them, one byte a token.

A batch is a function of (seed, index) alone, so a run that resumes needs no reader state: it asks
for the batch of its step.
"""

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int32, Int64, UInt8

from sparseattn_jax.train.config import DataConfig, InvalidRunError, find_asset

type Text = UInt8[np.ndarray, " _"]

NEEDLE = " the code is {code}."
QUESTION = "\nwhat code? {code}."

CODE_LENGTH = 6
# Each place of a code has symbols of its own. The first of them asks, the others are the answer.
_SYMBOLS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", np.uint8).reshape(CODE_LENGTH, -1)
MAX_NEEDLES = _SYMBOLS.shape[1]

_PREFETCHED_BATCHES = 8


def load_text(config: DataConfig) -> tuple[Text, Text]:
    """The text to train on, and the text held out for evaluation.

    It is read in lower case and without digits, so that capitals and digits occur in codes alone.
    """
    text = np.frombuffer(find_asset(config.text).read_bytes().lower(), np.uint8)
    text = text[(text < ord("0")) | (text > ord("9"))]
    cut = round(text.size * (1 - config.held_out))
    needed = text_length(config)
    for part, size in (("training", cut), ("evaluation", text.size - cut)):
        if size < needed:
            raise InvalidRunError(
                f"data.text={config.text!r} leaves {size} bytes for {part}, and a record takes "
                f"{needed}; give a longer text or another data.held_out"
            )
    return text[:cut], text[cut:]


def text_length(config: DataConfig) -> int:
    """Bytes of real text in a record: what needles and questions leave."""
    if config.num_needles > MAX_NEEDLES:
        raise InvalidRunError(
            f"data.num_needles={config.num_needles} must not exceed {MAX_NEEDLES}: so many codes "
            "can differ in their first symbol"
        )
    planted = config.num_needles * _length(NEEDLE) + config.num_questions * _length(QUESTION)
    # One more byte than the model reads: the last target.
    left = config.sequence_length + 1 - planted
    if left < config.min_depth + config.min_distance + 1:
        raise InvalidRunError(
            f"data.sequence_length={config.sequence_length} leaves {left} bytes of text beside "
            f"{config.num_needles} needles and {config.num_questions} questions; data.min_depth + "
            f"data.min_distance need more than {config.min_depth + config.min_distance}"
        )
    return left


def first_question(config: DataConfig) -> int:
    """Where the questions start; the same in every record."""
    return config.sequence_length + 1 - config.num_questions * _length(QUESTION)


def answer_positions(config: DataConfig) -> Int64[np.ndarray, "questions symbols"]:
    """Where the model predicts the symbols of each answer; the same in every record."""
    offsets = _length(QUESTION) * np.arange(config.num_questions)[:, None]
    questions = first_question(config) + offsets
    # The byte at position p + 1 is predicted at p, and the first symbol is given.
    return questions + QUESTION.index("{code}") + np.arange(CODE_LENGTH - 1)[None, :]


def make_batch(
    text: Text, config: DataConfig, *, seed: int, index: int
) -> Int32[np.ndarray, "batch record"]:
    """Records whose last bytes ask for codes that were planted at random depths."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index))))
    batch, count = config.batch_size, config.num_needles
    codes = _random_codes(random, batch, count)
    asked = np.argsort(random.random((batch, count)), axis=1)[:, : config.num_questions, None]
    questions = _write(QUESTION, np.take_along_axis(codes, asked, axis=1))

    size = text_length(config)
    starts = random.integers(0, text.size - size + 1, (batch, 1))
    haystack = text[starts + np.arange(size)[None]]
    depths = random.integers(config.min_depth, size - config.min_distance, (batch, count))
    depths = _at_spaces(haystack, np.sort(depths, axis=1), config.min_depth)
    planted = _plant(haystack, depths, _write(NEEDLE, codes))
    return np.concatenate([planted, questions.reshape(batch, -1)], axis=1).astype(np.int32)


def training_batches(
    text: Text, config: DataConfig, *, seed: int, start: int, stop: int
) -> Iterator[Int32[np.ndarray, "batch record"]]:
    """The batches of steps start, start + 1, ..., made ahead of time in another thread."""
    dataset = grain.MapDataset.range(start, stop).map(
        lambda index: make_batch(text, config, seed=seed, index=int(index))
    )
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
    return iter(dataset.to_iter_dataset(options))


def _random_codes(
    random: np.random.Generator, batch: int, count: int
) -> UInt8[np.ndarray, "batch count code"]:
    """Codes such as CIN3, no two of a record with the same symbol at a place."""
    order = np.argsort(random.random((batch, MAX_NEEDLES, CODE_LENGTH)), axis=1)[:, :count]
    return _SYMBOLS[np.arange(CODE_LENGTH)[None, None], order]


def _length(template: str) -> int:
    return len(template.format(code="c" * CODE_LENGTH))


def _write(
    template: str, codes: UInt8[np.ndarray, "batch count code"]
) -> UInt8[np.ndarray, "batch count length"]:
    """The template filled in for every code."""
    pattern = np.frombuffer(template.format(code="\0" * CODE_LENGTH).encode(), np.uint8)
    out = np.broadcast_to(pattern, (*codes.shape[:2], pattern.size)).copy()
    out[:, :, pattern == 0] = codes
    return out


def _at_spaces(
    haystack: UInt8[np.ndarray, "batch size"], depths: Int64[np.ndarray, "batch count"], lowest: int
) -> Int64[np.ndarray, "batch count"]:
    """Each depth moved back to the nearest space, unless that is before `lowest`."""
    positions = np.where(haystack == ord(" "), np.arange(haystack.shape[1])[None], -1)
    last_space = np.maximum.accumulate(positions, axis=1)
    return np.maximum(np.take_along_axis(last_space, depths, axis=1), lowest)


def _plant(
    haystack: UInt8[np.ndarray, "batch size"],
    depths: Int64[np.ndarray, "batch count"],
    needles: UInt8[np.ndarray, "batch count length"],
) -> UInt8[np.ndarray, "batch total"]:
    """Inserts each needle before the byte of the haystack at its depth; depths ascend."""
    batch, size = haystack.shape
    count, length = needles.shape[1:]
    before = np.sum(depths[:, :, None] <= np.arange(size)[None, None], axis=1)
    out = np.empty((batch, size + count * length), np.uint8)
    rows = np.arange(batch)[:, None]
    out[rows, np.arange(size)[None] + length * before] = haystack
    starts = depths + length * np.arange(count)[None]
    out[rows[:, :, None], starts[:, :, None] + np.arange(length)[None, None]] = needles
    return out
