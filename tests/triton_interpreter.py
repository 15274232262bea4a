"""Triton's interpreter, which looks through all of Triton's language before each kernel, looks once."""

import inspect
from functools import cache


def look_once() -> None:
    """A third of what a kernel of the tests takes. Where Triton has changed, or is not installed, nothing is done."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch_attribute, is_builtin = interpreter._patch_attr, tl.core.is_builtin
        interpreter._patch_builtin  # noqa: B018
    except (ImportError, AttributeError):
        return

    @cache
    def builtins_of(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtins(package, builder, scope):
        for name in builtins_of(package):
            if is_builtin(member := getattr(package, name)):  # not replaced by a kernel that calls this one
                patch_attribute(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtins
