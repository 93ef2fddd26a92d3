"""The errors every command turns into one clean line and an exit code.

All packages share them. They are outside of `deltanet`, whose import takes seconds: registering its classes loads torch
and transformers, and a misspelt key of a recipe is told without either.

Exit codes: 0 done, 1 failure, 2 the user's input is wrong, 75 interrupted with everything saved, 130 Ctrl-C.
"""


class DeltanetError(Exception):
    """A failure whose message is complete without a traceback."""

    exit_code = 1


class UserError(DeltanetError, ValueError):
    """Wrong input: the message names the thing, the value, where it came from and what is allowed."""

    exit_code = 2


class Interrupted(DeltanetError):
    """Stopped from outside with a complete checkpoint on disk."""

    exit_code = 75


def nearest(value: str, allowed: list[str]) -> str:
    """``" (did you mean 'x'?)"`` when a close spelling is allowed, in either case, else an empty string."""
    import difflib

    spelt = {name.lower(): name for name in allowed}
    close = [] if value in allowed else difflib.get_close_matches(value.lower(), spelt, n=1)
    return f" (did you mean {spelt[close[0]]!r}?)" if close else ""


LONGEST_REASON = 300


def one_line(error: BaseException) -> str:
    """What another library's error says, on one line; with its kind where the message alone would say nothing."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if not text or isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError)):
        text = f"{kind}: {text}" if text else kind
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."
