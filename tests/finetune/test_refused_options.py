"""What a stranger mistypes in ``train``'s options: refused or warned of, in words that name what is allowed."""

import pytest

from ember_mlx import InputError
from ember_mlx.finetune import option_checks, options
from ember_mlx.shared.command_line import flag


def parsed(words, tmp_path, text="{}\n"):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    return options.parse(["--config", str(file), *words.split()])


@pytest.mark.parametrize("number", [-2, -5, -(10**6)])
def test_no_number_of_layers_below_all_is_taken(number, tmp_path):
    for words, text, shown in (
        (f"--num-layers {number}", "{}", "^--num-layers"),
        ("", f"num_layers: {number}", "num_layers"),
    ):
        with pytest.raises(InputError, match=f"{shown} {number}: must be .* 0 for none or -1 for all"):
            parsed(words, tmp_path, text)
    assert [parsed(f"--num-layers {n}", tmp_path).num_layers for n in (-1, 0, 3)] == [-1, 0, 3]


@pytest.mark.parametrize("name", option_checks.AT_LEAST)
def test_the_range_of_a_whole_number_is_told_in_whole_numbers(name):
    least = option_checks.AT_LEAST[name]
    for value, range_in_words in ((least - 1, f"of at least {least}"), (2**63, r"below 2\^63")):
        with pytest.raises(InputError, match=f"{flag(name)} {value}: must be a whole number {range_in_words}$"):
            options.parse([flag(name), str(value)])


@pytest.mark.parametrize("decay", ["5", "1e6", "1.01", "0", "nan"])
def test_a_decay_of_beta2_that_forgets_nothing_is_refused(decay):
    with pytest.raises(InputError, match=f"--table-beta2-decay {float(decay)}: must be above 0 and at most 1"):
        options.parse(["--table-beta2-decay", decay])
