"""Which tokens are taken, and how much memory that is."""

import numpy as np
import pytest

from ember_mlx.geometry import sampling


def test_classes_are_shares_of_the_text():
    counts = np.array([0, 50, 25, 15, 5, 4, 1, 0])
    classes = [sampling.CLASSES[kind] for kind in sampling.frequency_classes(counts)]
    assert classes == ["never", "frequent", "middle", "middle", "rare", "rare", "rare", "never"]


def test_tokens_are_counted_as_far_as_they_are_trained_on():
    rows = [([1, 1, 2, 3, 3], 0), ([4], 0)]
    assert sampling.count_tokens(rows, 6, max_seq_length=4).tolist() == [0, 2, 1, 1, 1, 0]


@pytest.mark.parametrize(("with_never", "number"), [(True, 8), (False, 9)])
def test_every_class_has_its_part_of_the_sample_and_small_classes_leave_theirs(with_never, number):
    classes = np.repeat(np.arange(4, dtype=np.uint8), [1, 20, 20, 20])
    chosen = sampling.choose_tokens(classes, np.ones(61), number, with_never, np.random.default_rng(0))
    assert len(set(chosen)) == number
    assert np.bincount(classes[chosen], minlength=4).tolist() == ([1, 2, 2, 3] if with_never else [1, 4, 4, 0])


@pytest.mark.parametrize("shape", [(2048, 128), (4096, 128), (49152, 576), (151936, 1024)])
def test_samples_fill_but_never_pass_a_twentieth_of_the_table(shape):
    table, shared = 4 * shape[0] * shape[1], 5 * shape[0]
    sizes = sampling.sizes(shape, table, shared)
    taken = 24 * sizes.rows * shape[1] + 32 * sizes.block_entries + 6 * sizes.hidden_rows * shape[1] + shared
    assert taken <= sampling.MEMORY_SHARE * table
    assert sizes.rows == 256 or taken > 0.8 * sampling.MEMORY_SHARE * table


def test_hidden_rows_are_spread_over_the_matrices():
    shapes = {f"layer {i}": (10, 4) for i in range(40)}
    chosen = sampling.choose_hidden(shapes, 12, np.random.default_rng(0))
    parts = np.array_split(np.arange(40), sampling.HIDDEN_MATRICES)
    assert all(int(path.split()[1]) in part for path, part in zip(chosen, parts, strict=True))
    assert [len(rows) for rows in chosen.values()] == [2] * sampling.HIDDEN_MATRICES
    assert sampling.choose_hidden({}, 12, np.random.default_rng(0)) == {}
