"""The readers of adapter and checkpoint folders under hypothesis: what they read is right, or ends in InputError."""

import json
import os
import shutil
import struct
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.llama import Model, ModelArgs
from tiny_models import llama_config

from ember_mlx import InputError
from ember_mlx.finetune import adapters, checkpoints, history, options, resume, safe_reading
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.build_optimizer import build_optimizer
from ember_mlx.finetune.choices import choose
from ember_mlx.finetune.run import run
from ember_mlx.finetune.trainable import make_trainable, shapes_of

# A deadline is for what hangs: two cores are shared with other tests.
FUZZ = settings(
    max_examples=60,
    deadline=5000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = st.sampled_from(["a", "b", "../a", "/etc/passwd", "", "a.b", "\0", "model.embed_tokens.weight", "__metadata__"])
NUMBERS = st.integers(-2, 20) | st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)])
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=5) | st.just("../../secret")
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | NAMES, inner, max_size=3)
)
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "f32", ""]) | LEAVES,
        "shape": st.lists(NUMBERS, max_size=4) | LEAVES,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)
SECRET = "a text outside the folder"


class OnlyWithin:
    """Fails when a file beside a folder is opened, or any file is written; Python tells of each opening."""

    folder = None

    def __init__(self):
        self.forbidden = []
        sys.addaudithook(self._hear)  # stays until the end of the process

    def _hear(self, event, arguments):
        if self.folder is None or event != "open" or not isinstance(arguments[0], str | os.PathLike):
            return
        path = Path(os.path.abspath(arguments[0]))
        beside = path.is_relative_to(self.folder.parent) and not path.is_relative_to(self.folder)
        if beside or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.forbidden.append(path)

    @contextmanager
    def __call__(self, folder):
        before = self._files(folder)
        self.folder, self.forbidden = folder, []
        try:
            yield
        finally:
            self.folder = None
        assert self.forbidden == []
        assert self._files(folder) == before

    def _files(self, folder):
        files = (path for path in folder.parent.rglob("*") if path.is_file() and not path.is_symlink())
        return {path: path.read_bytes() for path in files}


only_within = OnlyWithin()


@contextmanager
def a_copy_of(folder):
    """In a place of its own, beside a file that must not be read."""
    with tempfile.TemporaryDirectory() as place:
        copy = shutil.copytree(folder, Path(place) / folder.name, symlinks=True)
        (Path(place) / "secret").write_text(SECRET)
        yield copy


@pytest.fixture(scope="module")
def trained_words(folders, tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    (place / "config.yaml").write_text("lr_schedule: {name: cosine_decay, arguments: [1e-3, 9]}")
    words = ["--model", folders["untied"], "--data", folders["data"], "--adapter-path", place / "adapters"]
    words += ["--iters", 2, "--save-every", 1, "--batch-size", 2, "--val-batches", 1, "--num-layers", 1]
    return [str(word) for word in [*words, "--config", place / "config.yaml"]]


@pytest.fixture(scope="module")
def trained(trained_words):
    """The adapter folder of a run, with two checkpoints."""
    args = options.parse(trained_words)
    run(args)
    return Path(args.adapter_path)


def says(error, words):
    assert words in str(error)


def all_read(checkpoint):
    mx.eval(checkpoint.weights, checkpoint.optimizer)
    return checkpoint


def safetensors(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@FUZZ
@given(
    header=st.dictionaries(NAMES, TENSORS | JSON, max_size=3) | JSON | st.binary(max_size=40),
    data=st.binary(max_size=40),
    length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 60),
)
def test_any_safetensors_file_is_read_or_refused(header, data, length, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors(header, data, length))
    try:
        mx.eval(safe_reading.read_arrays(path, "here"))
    except InputError as error:
        says(error, "here: weights.safetensors cannot be read (")


@FUZZ
@given(content=JSON.map(json.dumps).map(str.encode) | st.binary(max_size=60))
def test_any_json_file_is_read_or_refused(content, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    try:
        assert isinstance(safe_reading.read_json(path, "here"), dict)
    except InputError as error:
        says(error, "here: file.json ")


@st.composite
def damaged(draw, data):
    """The bytes of a file with a few of them changed, cut off, or put in."""
    data, at = bytearray(data), draw(st.integers(0, max(len(data) - 1, 0)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "replace"]))
    if kind == "flip":
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del data[at:]
    else:
        bytes_in = draw(st.binary(min_size=1, max_size=20))
        data[at : at + len(bytes_in) * (kind == "replace")] = bytes_in
    return bytes(data)


FILES = [checkpoints.INDEX, checkpoints.WEIGHTS, checkpoints.OPTIMIZER]


@FUZZ
@given(data=st.data(), file=st.sampled_from(FILES))
def test_a_damaged_checkpoint_is_refused_or_the_same(data, file, trained):
    newest = checkpoints.in_folder(trained)[-1]
    good = all_read(checkpoints.read(newest))
    changed = data.draw(damaged((newest / file).read_bytes()))
    with a_copy_of(newest) as copy:
        (copy / file).write_bytes(changed)
        with only_within(copy):
            try:
                read = all_read(checkpoints.read(copy))
            except InputError as error:
                says(error, str(copy))
                return
    assert (read.position, read.options, read.made_of) == (good.position, good.options, good.made_of)
    for kind in ("weights", "optimizer"):
        arrays, others = getattr(read, kind), getattr(good, kind)
        assert arrays.keys() == others.keys()
        assert all(mx.array_equal(array, others[name]) for name, array in arrays.items())


def paths_in(tree, path=()):
    """The paths to all that a JSON value holds, itself first."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


@pytest.fixture(scope="module")
def to_resume(trained_words):
    """Options, model and optimizer as a resumed run has them before it reads its checkpoint."""
    args = options.parse([*trained_words, "--resume", "--iters", "3"])
    model = load_base(args.model)[0]
    choices = choose(args, shapes_of(model))
    make_trainable(model, args, choices)
    return args | choices.as_options(), model, build_optimizer(model, args, choices)


@FUZZ
@given(data=st.data(), value=NUMBERS | JSON, with_changes=st.booleans())
def test_a_checkpoint_made_to_do_harm_with_right_checksums_is_refused_or_gone_on_from(
    data, value, with_changes, trained, to_resume
):
    newest = checkpoints.in_folder(trained)[-1]
    content = json.loads((newest / checkpoints.INDEX).read_text())["content"]
    made_of = dict(content["made_of"])
    path = data.draw(st.sampled_from(list(paths_in(content))[1:]) | st.just(("options", "iters")))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    args, model, optimizer = to_resume
    args |= {"resume_with_changes": with_changes}
    with a_copy_of(newest) as copy:
        index = {"sha256": checkpoints._checksum(content), "content": content}
        (copy / checkpoints.INDEX).write_text(json.dumps(index))
        with only_within(copy):
            try:
                checkpoint = checkpoints.read(copy)
                resume.refuse_changes(args, checkpoint, made_of, model, optimizer)
                position = resume.restore(args, checkpoint, made_of, model, optimizer, 6)
                history.LossHistory(args, [], optimizer, position.record)
            except InputError as error:
                says(error, str(copy))


@FUZZ
@given(
    file=st.sampled_from(FILES),
    lies=st.sampled_from(["../secret", "/etc/passwd", "/dev/zero", "..", ".", "loop", "pipe", "folder", "gone"]),
)
def test_what_is_no_file_of_the_checkpoints_own_is_refused(file, lies, trained):
    newest = checkpoints.in_folder(trained)[-1]
    with a_copy_of(newest) as copy:
        path = copy / file
        path.unlink()
        if lies == "pipe":
            os.mkfifo(path)
        elif lies == "folder":
            path.mkdir()
        elif lies != "gone":
            path.symlink_to(file if lies == "loop" else lies)
        with only_within(copy), pytest.raises(InputError) as caught:
            checkpoints.read(copy)
    assert SECRET not in str(caught.value)


@FUZZ
@given(data=st.data(), value=JSON)
def test_an_adapter_folder_is_loaded_or_refused(data, value, trained):
    file = data.draw(st.sampled_from([adapters.CONFIG, adapters.CONFIG, adapters.ADAPTERS, adapters.TABLES]))
    content = (trained / file).read_bytes()
    if file == adapters.CONFIG:
        config = json.loads(content)
        key = st.sampled_from(["fine_tune_type", "token_tables", "num_layers", "lora_parameters"]) | st.sampled_from(
            [*config]
        )
        config[data.draw(key)] = value
        changed = json.dumps(config).encode()
    else:
        changed = data.draw(damaged(content))
    with a_copy_of(trained) as copy:
        (copy / file).write_bytes(changed)
        model = Model(ModelArgs.from_dict(llama_config(tied=False)))
        with only_within(copy):
            try:
                adapters.apply_adapter(model, copy, {})
                mx.eval(model.parameters())
            except InputError as error:
                says(error, str(copy))
