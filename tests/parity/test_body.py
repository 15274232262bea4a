"""The optimizers of the body against their oracles; and the suite fails what is wrong."""

import numpy as np
import pytest

from ember_mlx.parity import body, body_oracles, implementations, suite

IN_NUMPY = [entry for entry in body.OPTIMIZERS if entry.class_name in ("AdamMini", "SinkGD")]
HERE = [one for one in implementations.implementations() if not one.missing and one.make_weights]


@pytest.mark.parametrize("implementation", HERE, ids=lambda one: one.name)
def test_what_runs_here_is_the_same_optimizer(implementation):
    steps = 2 if implementation.name == "triton interpreted" else body.STEPS  # each takes the interpreter long
    comparisons = list(body.run([implementation], ["one rare row", "real head"], steps=steps))
    assert not [one for one in comparisons if not one.passed]
    assert {one.dtype for one in comparisons} == set(implementation.dtypes)
    assert {one.quantity for one in comparisons} == {"step", "w", "w of the run", "codes"}
    expected = {f"{implementation.name} {entry.name}" for entry in body.OPTIMIZERS}
    assert {one.implementation for one in comparisons} == expected


class InNumPy:
    """An oracle in the place of an implementation, its numbers rounded as one's are."""

    def __init__(self, class_name, shape, dtype, learning_rate, weight_decay, **options):
        self.oracle = {"AdamMini": body_oracles.AdamMiniOracle, "SinkGD": body_oracles.SinkGDOracle}[class_name](
            shape, **self.changed(options)
        )
        self.dtype, self.settings = dtype, (learning_rate, weight_decay if len(shape) > 1 else 0)

    def changed(self, options):
        return options

    def steps(self, weights, gradients):
        made = []
        for gradient, _ in gradients:
            made.append((*self.step(weights, gradient), self.state()))
            weights = made[-1][1]
        steps, after, states = zip(*made, strict=True)
        return np.stack(steps), np.stack(after), {name: [state[name] for state in states] for name in states[0]}

    def step(self, weights, gradient):
        learning_rate, weight_decay = self.settings
        if self.oracle.quantized and self.oracle.step_number:
            self.oracle.load(self.state())
        change = self.oracle.change(gradient, learning_rate)
        new = (1 - learning_rate * weight_decay) * weights.astype(np.float64) - change
        return tuple(suite.cast(x.astype(np.float32), self.dtype).astype(np.float64) for x in (change, new))

    def state(self):
        if not self.oracle.quantized:
            return {}
        m = self.oracle.momentum
        groups = np.pad(np.abs(m).ravel(), (0, -m.size % 32)).reshape(-1, 32)
        return {"m": self.rounded(self.oracle.codes()["m"]).astype(np.int8), "m_scales": groups.max(axis=1)}

    def rounded(self, codes):
        return np.floor(codes)


class AnotherEps(InNumPy):
    def changed(self, options):
        return options | {"eps": 1e-4}


class CodesCutOff(InNumPy):
    def rounded(self, codes):
        return np.trunc(codes - 0.5)


class WholeTensors(InNumPy):
    def __init__(self, class_name, shape, *settings, **options):
        super().__init__(class_name, shape, *settings, **options)
        self.oracle.block_shape = shape


def failed(tables, entries=IN_NUMPY, streams=("random", "real embedding")):
    made = implementations.Implementation("NumPy", None, None, make_weights=tables)
    return [one for one in body.run([made], streams, optimizers=entries) if not one.passed]


def test_the_oracles_pass_themselves():
    assert not failed(InNumPy)


def test_another_eps_fails_where_gradients_are_small():
    assert {one.implementation for one in failed(AnotherEps)} >= {"NumPy AdamMini", "NumPy SinkGD"}


def test_codes_that_are_cut_off_and_not_rounded_fail():
    wrong = failed(CodesCutOff, body.OPTIMIZERS[1:2])
    assert {one.quantity for one in wrong} == {"codes"}


def test_one_block_for_a_whole_matrix_fails_in_every_dtype():
    assert {one.dtype for one in failed(WholeTensors, body.OPTIMIZERS[:1])} == set(suite.DTYPES)
