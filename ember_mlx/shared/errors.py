"""The one exception that stands for bad input."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["InputError", "did_you_mean", "did_you_mean_path", "reason_of"]


class InputError(ValueError):
    """Something the caller gave cannot be used: the message says what, what is allowed, and what to do.

    The command line prints it as one line and exits with code 2. What was given may hold a line's end: it is
    written out as backslash and n.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'X'?)" for the word of ``known`` that is spelt most like this one, or "" if none is.

    One that shortens a name of several words to their initials, as lr does, is taken for that name.
    """
    # Without the dashes, which all flags share.
    names = {name.lstrip("-").lower(): name for name in known}
    word = word.lstrip("-").lower()
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if len(word) > 1:
        near += [name for name in names if "".join(part[:1] for part in name.replace("_", "-").split("-")) == word]
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


def did_you_mean_path(path: str | Path, fits: Callable[[Path], bool] = Path.is_file) -> str:
    """The same for a path that does not exist, of those that fit and differ in the name that is missing; or ""."""
    path = Path(path)
    missing = next((each for each in (path, *path.parents) if each.parent.is_dir()), path)
    rest = path.relative_to(missing)
    try:
        beside = [] if missing.exists() else missing.parent.iterdir()
        names = {each.name.lower(): each / rest for each in beside if fits(each / rest)}
    except OSError:
        return ""
    near = difflib.get_close_matches(missing.name.lower(), names, n=1, cutoff=0.6)
    return f" (did you mean {str(names[near[0]])!r}?)" if near else ""


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line; the name of its kind, if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
