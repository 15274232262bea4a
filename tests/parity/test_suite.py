"""The suite passes what is right, whoever computes it, and fails what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from ember_mlx.parity import implementations, record, recorded, stochastic_rounding, suite
from ember_mlx.parity.gradient_streams import STREAMS
from ember_mlx.parity.implementations import Implementation
from ember_mlx.parity.stepping import Stepped

F32 = np.float32


class InNumPy:
    """Ember in float32 NumPy, for the suite to judge; each fault below changes one line of it."""

    beta2 = 0.999

    def __init__(self, shape, dtype, learning_rate, weight_decay, **options):
        self.shape, self.dtype, self.options = shape, dtype, options
        self.learning_rate, self.weight_decay = F32(learning_rate), F32(weight_decay)
        self.eps = F32(options.get("eps", 1e-8))

    def start(self):
        self.t, self.r, self.c, self.q = 0, np.zeros(self.shape[0], F32), np.zeros(self.shape[1], F32), F32(0)

    def steps(self, weights, gradients):
        made = []
        for gradient, _ in gradients:
            made.append(self.step(weights, gradient))
            weights = made[-1].w.astype(F32)
        return Stepped(*map(np.stack, zip(*made, strict=True)))

    def step(self, weights, gradient):
        schedule = self.options.get("beta2")
        forget = F32(1) - F32(schedule(self.t)) if schedule else F32(1 - self.beta2)
        self.t += 1
        r, c = self.mean_squares(np.square(gradient))
        self.r = self.keep(self.r + forget * (r - self.r))
        self.c = self.keep(self.c + forget * (c - self.c))
        self.q = self.q + forget * (F32(1) - self.q)
        s = np.maximum(self.c.mean(), F32(1e-30))
        q = F32(self.q if schedule else self.bias_correction())
        a = np.maximum(np.sqrt(self.r / (s * q)), self.floor(q))
        update = self.learning_rate * (gradient / self.denominator(self.clipped(a, r, s)[:, None] * np.sqrt(self.c)))
        new = (F32(1) - self.learning_rate * self.weight_decay) * weights - update
        read = (self.r, self.c, -self.rounded(F32(0) - update), self.rounded(new))
        return Stepped(*(array.astype(np.float64) for array in read))

    def state(self):
        return self.t, self.r, self.c, self.q

    def restore(self, state):
        self.t, self.r, self.c, self.q = state

    def floor(self, q):
        return F32(self.options.get("row_floor", 0)) / np.sqrt(q)

    def clipped(self, a, r, s):
        row_clip = self.options.get("row_clip")
        return a if row_clip is None else np.maximum(a, np.sqrt(r / s) / F32(row_clip))

    def rounded(self, values):
        if self.options.get("rounding") != "stochastic":
            return suite.cast(values, self.dtype)
        bits = stochastic_rounding.random_bits(self.options["seed"], 0, self.t, *map(np.arange, self.shape))
        return stochastic_rounding.round_stochastically(values, bits, self.dtype)

    def mean_squares(self, squares):
        return squares.mean(axis=1), squares.mean(axis=0)

    def keep(self, moment):
        return moment

    def bias_correction(self):
        return 1 - self.beta2**self.t

    def denominator(self, root):
        return root + self.eps


class AnotherBeta2(InNumPy):
    beta2 = 0.998


class EpsInsideTheRoot(InNumPy):
    def denominator(self, root):
        return np.sqrt(np.square(root) + F32(1e-8))


class MeansOverTheWrongAxis(InNumPy):
    def mean_squares(self, squares):
        # As a kernel does that takes the strides of a table for those of its transpose.
        swapped = squares.T.reshape(squares.shape)
        return swapped.mean(axis=1), swapped.mean(axis=0)


class StateInBfloat16(InNumPy):
    def keep(self, moment):
        return suite.cast(moment, "bfloat16")


class NoBiasCorrection(InNumPy):
    def bias_correction(self):
        return 1


class SquaresInFloat16(InNumPy):
    def mean_squares(self, squares):
        return super().mean_squares(np.minimum(suite.cast(squares, "float16"), F32(65504)))


class NoScheduleInTheBiasCorrection(InNumPy):
    def clipped(self, a, r, s):
        if "beta2" not in self.options:
            return super().clipped(a, r, s)
        return a * np.sqrt(self.q / F32(self.bias_correction()))


class RowClipOfTheWrongRow(InNumPy):
    def clipped(self, a, r, s):
        return super().clipped(a, np.roll(r, 1), s)


class RowFloorWithoutTheBiasCorrection(InNumPy):
    def floor(self, q):
        return super().floor(F32(1))


class BitsOfTheStepBefore(InNumPy):
    def rounded(self, values):
        self.t -= 1
        rounded = super().rounded(values)
        self.t += 1
        return rounded


class ToNearest(InNumPy):
    def rounded(self, values):
        return suite.cast(values, self.dtype)


class OneIsNoNumber(InNumPy):
    def rounded(self, values):
        rounded = super().rounded(values)
        if "rounding" in self.options:
            rounded[0, 0] = np.nan
        return rounded


class Raising(InNumPy):
    def step(self, *arguments):
        raise RuntimeError("no kernel\nfor this device")


FAULTS = (AnotherBeta2, EpsInsideTheRoot, MeansOverTheWrongAxis, StateInBfloat16, NoBiasCorrection, SquaresInFloat16)


def in_numpy(tables):
    return Implementation(tables.__name__, None, tables)


def judge(tables, streams=None, steps=(1, 10), dtypes=suite.DTYPES, recordings=()):
    return list(suite.run([in_numpy(tables)], suite.select(streams, steps), dtypes, recordings))


def failed(comparisons):
    return [one for one in comparisons if not one.passed]


def recording(tables=InNumPy, name="NumPy", stream="random", shape=suite.SMALL, steps=(1, 10)):
    """What that implementation makes of a stream, recorded."""
    results = {}
    for dtype in suite.DTYPES:
        made, case = tables(shape, dtype, suite.LEARNING_RATE, suite.WEIGHT_DECAY), suite.Case(stream, shape, steps)
        for t, before, stepped, _ in suite.follow(made, case, suite.Expected(case, dtype)):
            parts = stepped._asdict() | {"before": before}
            results[stream, shape, dtype, t] = {part: values[-1].astype(np.float64) for part, values in parts.items()}
    return recorded.Recording(name, {"device": "a test"}, results)


HERE = [one.name for one in implementations.implementations() if not one.missing and "compiled" not in one.name]


@pytest.mark.parametrize("name", HERE)
def test_what_runs_here_is_the_same_optimizer(name):
    (chosen,), _ = implementations.select([name])
    options = ["random, beta2 schedule", "random, row clip", "random, row floor", "random, stochastic rounding"]
    # Triton's interpreter is slow: here its first steps. tests/cuda_ref/optimizers/test_ember.py has all streams.
    streams, steps = (["random"], [1, 3]) if "interpret" in name else (["random", "tiny", "huge"], [1, 10])
    cases = suite.select([*streams, "real head", *options], steps)
    comparisons = list(suite.run([chosen], cases))
    assert not failed(comparisons)
    assert {one.dtype for one in comparisons} == set(chosen.dtypes)
    assert {one.quantity for one in comparisons} == {"r", "c", "step", "w", "w of the run", "rounding"}


def test_a_compiled_step_is_the_same_optimizer():
    chosen = next(one for one in implementations.implementations() if one.name == "torch compiled cpu")
    if chosen.missing:
        pytest.skip(chosen.missing)
    from torch._dynamo.utils import counters

    counters.clear()
    cases = [case for case in suite.select(["random", "tiny"], [1, 10]) if case.shape == suite.SMALL]
    assert not failed(suite.run([chosen], cases, ["float32"]))
    assert counters["stats"]["unique_graphs"] == 1  # compiled at all, and not again for each stream


def test_every_stream_passes_in_1000_steps_and_each_is_looked_at_to_its_end():
    comparisons = judge(InNumPy, steps=None, dtypes=["float32"])
    assert not failed(comparisons)
    last = {(one.stream, one.shape): one.steps for one in comparisons}
    streams = {stream for stream, _ in last}
    assert {stream for stream in streams if "," not in stream} == {*STREAMS, "real embedding", "real head"}
    assert {stream.partition(", ")[2] for stream in streams} == {"", "beta2 schedule", "row clip", "row floor"}
    assert last["random", (24, 8)] == 1000
    assert last["row silent then loud", (24, 8)] == 1010
    assert last["random", (257, 33)] == 10
    assert last["real embedding", (40, 24)] == 64
    assert {one.first_step for one in comparisons if one.quantity == "r"} == {1, 2, 11, 1001}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_in_float32(fault):
    assert failed(judge(fault, dtypes=["float32"]))


@pytest.mark.parametrize(
    ("fault", "stream", "dtypes"),
    [
        (NoScheduleInTheBiasCorrection, "random, beta2 schedule", ["float32"]),
        (RowClipOfTheWrongRow, "random, row clip", ["float32"]),
        (RowFloorWithoutTheBiasCorrection, "random, row floor", ["float32"]),
        (BitsOfTheStepBefore, "random, stochastic rounding", ["bfloat16", "float16"]),
        (ToNearest, "random, stochastic rounding", ["bfloat16", "float16"]),
        (OneIsNoNumber, "random, stochastic rounding", ["bfloat16", "float16"]),
    ],
)
def test_a_fault_in_an_option_fails(fault, stream, dtypes):
    assert not failed(judge(InNumPy, [stream], dtypes=dtypes))
    assert {one.dtype for one in failed(judge(fault, [stream], dtypes=dtypes))} == set(dtypes)


@pytest.mark.parametrize("fault", [AnotherBeta2, MeansOverTheWrongAxis, NoBiasCorrection])
def test_a_gross_fault_shows_in_the_weights_of_16_bits_too(fault):
    comparisons = failed(judge(fault, ["random"], dtypes=["bfloat16", "float16"]))
    assert {("w", "bfloat16"), ("w", "float16")} <= {(one.quantity, one.dtype) for one in comparisons}


def test_a_fault_is_found_where_it_is():
    # The state loses its last bits: r and c are wrong from the first step, and the steps with them.
    comparisons = judge(StateInBfloat16, ["random"], dtypes=["float32"])
    first = [one.quantity for one in failed(comparisons) if one.steps == 1 and one.shape == suite.SMALL]
    assert {"r", "c", "step"} <= set(first)
    r = next(one for one in comparisons if one.quantity == "r")
    assert 2**-9 < r.relative <= 2**-8  # half a unit of bfloat16
    assert 2**14 < r.ulps <= 2**15  # in units of float32
    assert r.allowed_ulps < r.ulps
    assert r.of_allowed == pytest.approx(r.ulps / r.allowed_ulps)


def test_one_that_raises_fails_and_the_others_go_on():
    chosen = [in_numpy(Raising), in_numpy(InNumPy)]
    comparisons = list(suite.run(chosen, suite.select(["random"], [1]), ["float32"]))
    wrong = failed(comparisons)
    assert {one.implementation for one in wrong} == {"Raising"}
    assert wrong[0].error == "RuntimeError: no kernel for this device"
    assert {one.quantity for one in comparisons if one.implementation == "InNumPy"} >= set(Stepped._fields)


def test_what_an_implementation_cannot_do_is_left_out():
    limited = replace(in_numpy(InNumPy), dtypes=("float32", "float16"), mixed=False)
    comparisons = suite.run([limited], suite.select(["random", "tiny"], [1]))
    # In float16 the gradients of "tiny" would all be zero: there they stay float32.
    run = {(one.stream, one.dtype) for one in comparisons}
    assert run == {("random", "float32"), ("random", "float16"), ("tiny", "float32")}


def test_a_nan_fails():
    class ANaN(InNumPy):
        def keep(self, moment):
            return np.where(np.arange(len(moment)) == 3, F32(np.nan), moment)

    wrong = failed(judge(ANaN, ["random"], dtypes=["float32"]))
    assert {"r", "c", "step", "w", "w of the run"} <= {one.quantity for one in wrong}


def test_recorded_results_pass_and_leave_no_trace():
    beside = judge(InNumPy, ["random"], recordings=[recording()])
    against = [one for one in beside if one.against == "recorded NumPy on a test"]
    assert {(one.dtype, one.steps, one.quantity) for one in against} == {
        (dtype, steps, quantity) for dtype in suite.DTYPES for steps in (1, 10) for quantity in Stepped._fields
    }
    assert all(one.ulps == 0 for one in against)  # it is the same code
    assert [one for one in beside if one not in against] == judge(InNumPy, ["random"])


@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("quantity", Stepped._fields)
def test_one_flipped_bit_in_a_recorded_result_fails(dtype, quantity):
    """The lowest but 8 of the fraction in float32, the lowest but 1 in 16 bits: lower ones are within two roundings."""
    changed = recording()
    values = changed.results["random", suite.SMALL, dtype, 10][quantity]
    in_16_bits = dtype != "float32" and quantity in ("step", "w")
    unit = suite.unit_in_the_last_place(values, dtype if in_16_bits else "float32")
    values.flat[5] += (2 if in_16_bits else 2**9) * unit.flat[5]
    wrong = failed(judge(InNumPy, ["random"], recordings=[changed]))
    assert [(one.dtype, one.steps, one.quantity) for one in wrong] == [(dtype, 10, quantity)]


def test_a_recording_of_another_optimizer_fails():
    wrong = failed(judge(InNumPy, ["random"], recordings=[recording(AnotherBeta2, "a fault")]))
    assert {one.against for one in wrong} == {"recorded a fault on a test"}


def test_recordings_come_back_from_the_file_bit_by_bit(tmp_path):
    path = tmp_path / "results.npz"
    written = [recording(), replace(recording(stream="tiny"), implementation="another")]
    recorded.write_results(path, written)
    read = recorded.read_results(path)
    assert [one.about for one in read] == [one.about for one in written]
    assert [one.name for one in read] == ["recorded NumPy on a test", "recorded another on a test"]
    for before, after in zip(written, read, strict=True):
        assert list(after.results) == list(before.results)
        for key in before.results:
            for part in recorded.PARTS:
                np.testing.assert_array_equal(after.results[key][part], before.results[key][part], strict=True)


def test_results_are_recorded_with_machine_versions_and_seed_unless_they_are_wrong(tmp_path, monkeypatch):
    path = tmp_path / "results.npz"
    monkeypatch.setattr(suite, "cases", lambda: (suite.Case("random", suite.SMALL, (1, 10)),))
    tables = {"right": InNumPy, "wrong": AnotherBeta2}
    monkeypatch.setattr(record, "select", lambda names: ([in_numpy(tables[name]) for name in names], []))
    record.main(["results", "--implementation", "right", "--out", str(path)])
    (written,) = recorded.read_results(path)
    assert {"machine", "versions", "date", "seed", "learning_rate", "weight_decay", "device"} <= set(written.about)
    assert not failed(judge(InNumPy, ["random"], recordings=[written]))
    assert {key[-1] for key in written.results} == {1, 10}
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        record.main(["results", "--implementation", "wrong", "--out", str(path)])
    assert path.read_bytes() == before


def test_a_damaged_file_of_results_is_an_error_that_says_so(tmp_path):
    path = tmp_path / "results.npz"
    recorded.write_results(path, [recording()])
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"results.npz: .*record anew with python -m ember_mlx.parity.record"):
        recorded.read_results(path)
    np.savez(path, another=np.zeros(3))
    with pytest.raises(ValueError, match="holds no recorded results"):
        recorded.read_results(path)
    assert recorded.read_results(tmp_path / "none.npz") == []


def test_the_recorded_gradients_are_of_a_training_run():
    embedding, head = (recorded.real_streams()[f"real {name}"] for name in ("embedding", "head"))
    assert embedding.shape == head.shape == (64, 40, 24)
    assert embedding.dtype == head.dtype == np.float32
    steps_with_gradient = (embedding != 0).any(axis=2).sum(axis=0)
    assert steps_with_gradient.min() == 0  # tokens that never occur
    assert steps_with_gradient.max() == 64
    first = np.argmax((embedding != 0).any(axis=2), axis=0)[steps_with_gradient > 0]
    assert first.max() >= 32  # and some that come late
    assert (head != 0).any(axis=2).all()  # every logit of every step has a gradient
