"""``--memory-limit`` on machines of several kinds: what MLX is told, what is put back, and how a run ends."""

import os
import re
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest

from ember_mlx import InputError, cli
from ember_mlx.finetune import checkpoints, memory_limit
from ember_mlx.finetune.memory_limit import limit_of, limited_memory, machine_limit, remedy
from ember_mlx.finetune.options import Options, defaults
from ember_mlx.finetune.run import run
from ember_mlx.finetune.streamed import Streamed
from ember_mlx.planner import machine
from ember_mlx.shared.units import A_SIZE

MAC, CUDA, CPU = {"max_recommended_working_set_size": 12_000_000_000}, {"total_memory": 80_000_000_000}, {}


@pytest.fixture
def limits(monkeypatch):
    """A fake machine: what MLX's three limits are, of which each setter returns the one before."""
    held = {"memory": 18_000_000_000, "cache": 18_000_000_000, "wired": 0}

    def setter(name):
        def set_limit(value):
            held[name], before = value, held[name]
            return before

        return set_limit

    for name in held:
        monkeypatch.setattr(mx, f"set_{name}_limit", setter(name))
    return held


def limited_to(limit):
    return Options(**(defaults() | {"memory_limit": "none" if limit is None else limit}))


def on(monkeypatch, info, device=mx.DeviceType.cpu):
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=device))


def test_the_default_is_the_machines(monkeypatch):
    on(monkeypatch, MAC)
    assert machine_limit() == limit_of(None) == 12_000_000_000
    on(monkeypatch, CUDA, mx.DeviceType.gpu)
    assert machine_limit() == 72_000_000_000
    on(monkeypatch, CUDA)  # where a GPU is there and not used
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}.__getitem__)
    assert machine_limit() == 3_686_400_000
    assert limit_of("none") is None
    assert limit_of(5) == 5
    assert machine.memory(None, "cpu")[0] == 3_686_400_000  # `plan` and `train` ask the same


@pytest.mark.parametrize(
    ("info", "limit", "within"),
    [
        (MAC, 8_000_000_000, {"memory": 8_000_000_000, "cache": 8_000_000_000, "wired": 8_000_000_000}),
        (MAC, 16_000_000_000, {"memory": 16_000_000_000, "cache": 16_000_000_000, "wired": 12_000_000_000}),
        (MAC, 20_000_000_000, {"memory": 20_000_000_000, "cache": 18_000_000_000, "wired": 12_000_000_000}),
        (MAC, None, {"memory": 18_000_000_000, "cache": 18_000_000_000, "wired": 12_000_000_000}),
        (CPU, 8_000_000_000, {"memory": 8_000_000_000, "cache": 8_000_000_000, "wired": 0}),
        (CPU, None, {"memory": 18_000_000_000, "cache": 18_000_000_000, "wired": 0}),
    ],
)
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, MemoryError])
def test_mlx_has_the_limits_within_and_its_own_afterwards(monkeypatch, limits, info, limit, within, error):
    on(monkeypatch, info)
    before = dict(limits)
    try:
        with limited_memory(limited_to(limit)):
            assert limits == within
            if error:
                raise error
    except (KeyboardInterrupt, InputError):
        assert error
    assert limits == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[malloc] Unable to allocate 99 bytes."),
        RuntimeError("[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum"),
        RuntimeError(
            "Command buffer execution failed: Insufficient Memory (kIOGPUCommandBufferCallbackErrorOutOfMemory)"
        ),
        RuntimeError("cudaMallocManaged failed: out of memory."),
    ],
)
def test_an_allocation_that_fails_ends_a_command_with_a_line(monkeypatch, parse, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("ember_mlx.commands.train.main", lambda _: run(parse(), make_step=lambda *_: fail))
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "train"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    last = capsys.readouterr().err
    assert re.fullmatch(r"ember-mlx train: error: out of memory \(.+\); use a smaller --batch-size .*\n", last)


def test_another_error_of_mlx_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), limited_memory(limited_to(None)):
        raise RuntimeError("shapes do not match")


class Grows:
    """A watcher that makes the peak 2 GB from the third step on."""

    def __init__(self, monkeypatch):
        self.peak = 0
        monkeypatch.setattr(mx, "get_peak_memory", lambda: self.peak)

    def before_training(self, *_):
        pass

    before_step = after_validation = before_training

    def after_step(self, step, result):
        self.peak = 2 * 10**9 if step >= 3 else 0


def test_a_run_that_grows_too_large_is_saved_and_resumes_without_a_limit(monkeypatch, parse, tmp_path):
    with pytest.raises(InputError, match=r"^--memory-limit 1\.00 GB: a step took 2\.00 GB; .*; --memory-limit none"):
        run(parse("--iters", 4, "--memory-limit", "1GB"), watchers=[Grows(monkeypatch)])
    [saved] = checkpoints.in_folder(tmp_path / "adapters")
    assert checkpoints.read(saved).position.step == 3
    run(parse("--iters", 4, "--memory-limit", "none", "--resume"), watchers=[Grows(monkeypatch)])
    assert checkpoints.find(tmp_path / "adapters", True).position.step == 4


def test_a_run_that_never_fitted_leaves_nothing_in_the_way_of_the_next(monkeypatch, parse, tmp_path):
    monkeypatch.setattr(memory_limit, "machine_limit", lambda: 1000)
    with pytest.raises(InputError, match=r"^--memory-limit 1\.00 kB \(the default on this machine\): a step took"):
        run(parse())
    assert not checkpoints.in_folder(tmp_path / "adapters")
    run(parse("--memory-limit", "none"))


@pytest.mark.parametrize("cuda", [False, True])
def test_the_cache_is_cleared_after_each_step_but_where_cuda_has_room(monkeypatch, parse, cuda):
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu) if cuda else mx.Device(mx.cpu))
    monkeypatch.setattr(memory_limit, "machine_limit", lambda: 1000)
    assert parse().clear_cache_threshold == (500 if cuda else 0)
    assert parse("--clear-cache-threshold", "0").clear_cache_threshold == 0


@pytest.mark.parametrize("text", ["0", "lots", "nan", "-3GB", "12XB", "30", "2e9", "", "GB", "1.2.3GB", "0.5MB"])
@pytest.mark.parametrize("flag", ["--memory-limit", "--clear-cache-threshold", "--memory"])
def test_no_size_is_refused_by_name_and_in_the_same_words(parse, tmp_path, flag, text):
    if (flag, text) == ("--clear-cache-threshold", "0"):
        assert parse(flag, text).clear_cache_threshold == 0
        return
    for words in ([flag, text], [f"{flag}={text}"]):
        with pytest.raises(InputError, match=rf"{flag}:? {text}: must be {A_SIZE}"):
            machine.memory(text, "cpu") if flag == "--memory" else parse(*words)
    if flag != "--memory":
        name = flag[2:].replace("-", "_")
        (tmp_path / "c.yaml").write_text(f"{name}: '{text}'\n")
        with pytest.raises(InputError, match=rf"{name}: '{text}' must be {A_SIZE}"):
            parse("--config", tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 2**34),
        ("512mib", 2**29),
        ("1.5 GB", 15 * 10**8),
        ("2G", 2 * 10**9),
        ("3M", 3 * 10**6),
        (".5GB", 5 * 10**8),
        ("2000000000", 2 * 10**9),
        ("9" * 30 + "GB", 2**63 - 1),
    ],
)
def test_a_size_is_the_same_everywhere(parse, text, size):
    args = parse("--memory-limit", text, "--clear-cache-threshold", text)
    assert args.memory_limit == args.clear_cache_threshold == machine.memory(text, "cpu")[0] == size


def test_a_yaml_file_takes_none_too(parse, tmp_path):
    for text, value in (("none", "none"), ("12GB", 12 * 10**9), ("null", None)):
        (tmp_path / "c.yaml").write_text(f"memory_limit: {text}\n")
        assert parse("--config", tmp_path / "c.yaml").memory_limit == value


def test_plan_knows_the_limit(parse):
    assert machine.limited(parse("--memory-limit", "1GB"), 10**10, "this machine has") == (10**9, "--memory-limit is")
    for limit in ("none", "20GB"):
        assert machine.limited(parse("--memory-limit", limit), 10**10, "this machine has")[0] == 10**10


@pytest.mark.parametrize(
    ("limit", "size", "words"),
    [
        ("1GB", 10**9, "--memory-limit, below what --memory 10GB gives, is"),
        ("20GB", 10**10, "as --memory-limit is no lower, --memory is"),
        ("none", 10**10, "--memory is"),
    ],
)
def test_plan_says_which_of_memory_and_its_limit_counts(parse, limit, size, words):
    asked = machine.memory("10GB", "cpu")
    assert machine.limited(parse("--memory-limit", limit), *asked, "10GB") == (size, words)


SHORTER, ALL = "a smaller --batch-size or --max-seq-length", "--grad-checkpoint, --chunked-loss, --stream"


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        ([], f"{SHORTER}, {ALL}, or fewer --num-layers"),
        (["--grad-checkpoint"], f"{SHORTER}, --chunked-loss, --stream, or fewer --num-layers"),
        (["--chunked-loss", "--num-layers", 0], f"{SHORTER}, --grad-checkpoint, or --stream"),
        (["--grad-checkpoint", "--stream"], f"{SHORTER}, --keep-inputs, or fewer --num-layers"),
        (["--stream", "--keep-inputs", 3, "--num-layers", 0, "--batch-size", 1], "a smaller --max-seq-length"),
        (["--fine-tune-type", "full"], f"{SHORTER}, --keep-inputs, or fewer --num-layers"),
        (["--fine-tune-type", "full", "--no-stream"], f"{SHORTER}, {ALL}, or fewer --num-layers"),
        (["--fine-tune-type", "full", "--train-tables", "none"], f"{SHORTER}, {ALL}, or fewer --num-layers"),
        (["--shard-tables"], f"{SHORTER}, --grad-checkpoint, --chunked-loss, or fewer --num-layers"),
    ],
)
def test_what_is_on_is_not_what_helps(parse, words, ways):
    assert remedy(parse("--batch-size", 2, *words)) == f"use {ways}"


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_streams_is_told_of_nothing_that_streaming_includes(monkeypatch, parse, fails):
    def fail(*_):
        raise MemoryError

    flags = ("--fine-tune-type", "full", "--stream", "--iters", 4, "--memory-limit", "1GB")
    if fails:
        monkeypatch.setattr(Streamed, "__call__", fail)
    with pytest.raises(InputError, match="; use a smaller .*--max-seq-length, --keep-inputs, or fewer --num-layers"):
        run(parse(*flags), watchers=[] if fails else [Grows(monkeypatch)])
