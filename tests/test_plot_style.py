import builtins
import subprocess
import sys

import pytest

from ember_mlx.plots.style import THEMES, require_matplotlib, save_light_and_dark, save_picture, thousands, units
from ember_mlx.shared.errors import InputError


def draw(figure, theme):
    axes = figure.subplots()
    for i in range(len(theme.lines)):
        axes.plot([1, 2, 3], [i, i + 1, i], label=str(i))
    draw.lines = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines]


def test_both_themes_are_saved_on_their_backgrounds_at_readme_size(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    paths = save_light_and_dark(tmp_path / "loss.png", draw, height=3)
    assert [path.name for path in paths] == ["loss-light.png", "loss-dark.png"]
    for path, theme in zip(paths, THEMES.values(), strict=True):
        pixels = imread(path)
        assert pixels.shape[:2] == (480, 1280)
        assert pixels[0, 0, :3] == pytest.approx(to_rgb(theme.background), abs=1e-2)


def test_lines_drawn_one_after_the_other_differ_in_every_way(tmp_path):
    pytest.importorskip("matplotlib")
    save_picture(tmp_path / "lines.png", draw)
    for of_one_kind in zip(*draw.lines, strict=True):
        # matplotlib calls dashes of one's own "--"; they are three of seven
        assert len(set(of_one_kind)) in (7, 4)
    assert len(set(draw.lines)) == 7


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_text_and_lines_stand_out_from_the_background(theme):
    """WCAG 2.1: contrast of 4.5 for text; here 2 for a line, which is thick and has a marker."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb

    def luminance(colour):
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour):
        light, dark = sorted([luminance(colour), luminance(theme.background)], reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert contrast(theme.text) > 4.5
    assert all(contrast(colour) > 2 for colour in theme.lines)


def test_units():
    pytest.importorskip("matplotlib")
    assert units("B")(3.1e9) == "3.1 GB"
    assert units("s")(0.02) == "20 ms"
    assert thousands()(12345) == "12,345"


def test_nothing_global_changes_and_pyplot_stays_out(tmp_path):
    pytest.importorskip("matplotlib")
    code = f"""
import sys, matplotlib
before = matplotlib.rcParams.copy()  # looking at the key "backend" would import pyplot
from ember_mlx.plots.style import save_picture
save_picture({str(tmp_path / "one.png")!r}, lambda figure, theme: figure.subplots().plot([1, 2]))
assert all(matplotlib.rcParams.copy()[key] == before[key] for key in before if key != "backend")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_hint_is_one_line(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install matplotlib"):
        require_matplotlib()


@pytest.mark.parametrize("name", ["picture.jpg", "missing/picture.png", "."])
def test_bad_path(name, tmp_path):
    with pytest.raises(InputError, match="picture"):
        save_picture(tmp_path / name, draw)
    assert not list(tmp_path.iterdir())
