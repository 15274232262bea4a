"""A YAML file of options, whatever is in it: options that JSON can hold, or one line."""

import datetime
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_mlx import InputError
from ember_mlx.finetune import options, safe_reading
from ember_mlx.finetune.yaml_reading import MOST_VALUES, read_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=3)
)
KEYS = (
    st.text(max_size=5)
    | st.integers()
    | st.booleans()
    | st.none()
    | st.dates()
    | st.sampled_from([*options.defaults()])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
BOMB_OF_NAMES = "a0: &a0 {l: 1}\n" + "".join(f"a{i}: &a{i} {{l: *a{i - 1}, r: *a{i - 1}}}\n" for i in range(1, 60))


def outcome(read):
    """The message of an InputError or "", and what was read or None."""
    try:
        return "", read()
    except InputError as error:
        return str(error), None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "options.yaml"


@settings(max_examples=100, deadline=None)
@given(config=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_values_become_options_that_json_holds_or_one_line(path, config):
    path.write_text(yaml.safe_dump(config))
    message, read = outcome(lambda: options.parse(["--config", str(path)]))
    assert message.count("\n") == 0
    assert read is None or len(json.dumps(vars(read))) < safe_reading.JSON_LIMIT


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab:[]{}&*!?-| \n'\"#%@1e.\\"), max_size=40) | st.binary(max_size=20))
def test_any_text_is_read_or_refused_in_one_line(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message, read = outcome(lambda: read_yaml(path, "--config"))
    assert isinstance(read, dict) or message.startswith("--config")
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2\n", "the name 1 must be text"),
        ("lora_parameters: {1: 2}\n", "lora_parameters: the name 1 must be text"),
        ("iters: 1\nseed: 2\niters: 3\n", "iters is given twice, in lines 1 and 3; keep one"),
        ("lora_parameters: {rank: 1, rank: 2}\n", "rank is given twice, in line 1; keep one"),
        ("a:\n- b: {c: 1}\n- {c: 1,\n   c: 1}\n", "c is given twice, in lines 3 and 4"),
        ("day: 2026-01-01\n", "day: 2026-01-01 is read as a date; write text in quotes"),
        ("day: 2026-13-45\n", "is not YAML: month must be in"),
        ("a: &a [*a]\n", "levels; leave aliases out"),
        ("a: &a {b: *a}\n", "levels; leave aliases out"),
        (BOMB, f"holds more than {MOST_VALUES:,} values, aliases written out"),
        (BOMB_OF_NAMES, f"holds more than {MOST_VALUES:,} values, aliases written out"),
        ("[" * 1_000, "is not YAML"),
        ('a: "\\ud800"\n', "half of a surrogate pair"),
        ('"\\udfff": 1\n', "half of a surrogate pair"),
        ("a: !!set {x, y}\n", "is read as a set"),
        ("a: !!binary aGk=\n", "is read as a bytes"),
        ("a: !!python/object:os.system {}\n", "is not YAML"),
        (f"a: {'9' * 5000}\n", "is not YAML"),
        ("# " + "x" * 10**6, "has more than 1,000,000 bytes"),
    ],
)
def test_what_json_cannot_hold_is_named(path, text, message):
    path.write_text(text)
    with pytest.raises(InputError) as error:
        options.parse(["--config", str(path)])
    assert message in str(error.value)
    assert str(error.value).startswith(f"--config {path}")


def test_what_mlx_lm_takes_is_taken(path):
    path.write_text(
        "lr_schedule: {name: cosine_decay, warmup: 100, arguments: [1e-5, 1000, 1e-7]}\nnote: '2026-01-01'\n"
    )
    args = options.parse(["--config", str(path)])
    assert args.lr_schedule["arguments"] == [1e-5, 1000, 1e-7]
    path.write_text("a: &a {x: 1}\nb: &b {y: 1}\nc: {<<: *a, <<: *b, x: 2}\n")  # what is merged in may be replaced
    assert read_yaml(path, "")["c"] == {"x": 2, "y": 1}
    assert args.note == str(datetime.date(2026, 1, 1))
