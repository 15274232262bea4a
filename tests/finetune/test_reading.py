"""Files that are damaged or made to do harm: one clear error each."""

import json
import os
import struct

import mlx.core as mx
import pytest

from ember_mlx import InputError
from ember_mlx.finetune import safe_reading


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def safetensors(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


BROKEN = {
    "empty": b"",
    "no header": b"\0" * 8,
    "header longer than the file": safetensors({"a": tensor()}, length=10**6),
    "header of 2^63 bytes": safetensors({"a": tensor()}, length=2**63),
    "not JSON": safetensors(b"{" * 100),
    "deeply nested": safetensors(b'{"a":' * 20000 + b"1" + b"}" * 20000),
    "a list": safetensors(b"[]"),
    "truncated data": safetensors({"a": tensor()}, b"\0" * 7),
    "more data": safetensors({"a": tensor()}, b"\0" * 9),
    "overlapping": safetensors({"a": tensor(), "b": tensor(offsets=(4, 12))}, b"\0" * 12),
    "the same bytes twice": safetensors({"a": tensor(), "b": tensor()}),
    "a hole": safetensors({"a": tensor(), "b": tensor(offsets=(12, 20))}, b"\0" * 20),
    "backwards": safetensors({"a": tensor(offsets=(8, 0))}),
    "beyond the end": safetensors({"a": tensor(shape=(4,), offsets=(0, 16))}),
    "shape that is not its size": safetensors({"a": tensor(shape=(3,))}),
    "shape beyond 64 bits": safetensors({"a": tensor(shape=(2**40, 2**40))}),
    "negative shape": safetensors({"a": tensor(shape=(-2,))}),
    "unknown dtype": safetensors({"a": tensor(dtype="F7")}),
    "a dtype that MLX does not have": safetensors({"a": tensor(dtype="F8_E5M2", shape=(8,))}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_safetensors_file_is_an_input_error(tmp_path, kind):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(InputError, match="^here: weights.safetensors cannot be read"):
        mx.eval(safe_reading.read_arrays(path, "here"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not JSON"),
        (b'{"a": "' + b"x" * 10**7 + b'"}', "larger than"),
        (b'["a"]', "holds a list where an object belongs"),
        (b"null", "holds a NoneType"),
    ],
)
def test_broken_json_is_an_input_error(tmp_path, text, message):
    (tmp_path / "file.json").write_bytes(text)
    with pytest.raises(InputError, match=f"^here: file.json.*{message}"):
        safe_reading.read_json(tmp_path / "file.json", "here")


def test_links_out_of_the_folder_and_what_is_no_file_are_not_read(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "secret.json"
    folder.mkdir()
    elsewhere.write_text("{}")
    (folder / "real.json").write_text("{}")
    (folder / "inside.json").symlink_to("real.json")
    assert safe_reading.read_json(folder / "inside.json", "here") == {}
    (folder / "out.json").symlink_to(elsewhere)
    (folder / "circle.json").symlink_to("circle.json")
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.json").mkdir()
    for name, message in {
        "out.json": "is a link to a file elsewhere, which is not followed",
        "circle.json": "file circle.json cannot be read",
        "pipe.json": "not an ordinary file",
        "folder.json": "not an ordinary file",
        "none.json": "file none.json cannot be read",
    }.items():
        with pytest.raises(InputError, match=f"here: .*{message}"):
            safe_reading.read_json(folder / name, "here")


def test_types_of_json_are_checked_to_the_leaves():
    expected = {"n": int, "list": [int], "maybe": (dict, type(None)), "inner": {"x": float}}
    good = {"n": 1, "list": [1, 2], "maybe": None, "inner": {"x": 0.5}}
    safe_reading.check_types(good, expected, "here")
    for change, message in (
        ({"n": True}, "here: n is of type bool, not int"),
        ({"n": "1"}, "here: n is of type str"),
        ({"list": [1, None]}, "here: list is of type NoneType"),
        ({"list": {}}, "here: list is of type dict"),
        ({"maybe": []}, "here: maybe is of type list, not dict or null"),
        ({"inner": {}}, "here: inner must hold x, and nothing else"),
        ({"more": 1}, "here must hold n, list, maybe, inner, and nothing else"),
    ):
        with pytest.raises(InputError, match=message):
            safe_reading.check_types(good | change, expected, "here")


@pytest.mark.parametrize("bad", ["first", "large", "last", None])
@pytest.mark.parametrize("value", [mx.nan, -mx.inf])
def test_the_array_that_is_not_finite_is_named_and_small_ones_are_looked_at_together(monkeypatch, bad, value):
    arrays = {f"small {i}": mx.ones((3, i + 1), [mx.float32, mx.bfloat16, mx.float16][i % 3]) for i in range(30)}
    arrays = {"first": mx.ones(2), "ids": mx.arange(3), "large": mx.zeros((2**8, 2**8)), **arrays, "last": mx.ones(())}
    looks, all_finite = [], safe_reading.all_finite
    monkeypatch.setattr(safe_reading, "all_finite", lambda given: looks.append(len(given)) or all_finite(given))
    if bad is None:
        safe_reading.check_finite(arrays, "here", "do so")
        assert looks == [32, 1]
    else:
        arrays[bad] = mx.full(arrays[bad].shape, value)
        count = arrays[bad].size
        with pytest.raises(InputError, match=rf"here: {bad} has {count} of {count} numbers .* not finite; do so"):
            safe_reading.check_finite(arrays, "here", "do so")
