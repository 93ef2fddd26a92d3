"""What the Hub or the line to it answered, as one sentence that says what to do; and which of it is worth another try.

No message holds a token: none is ever asked for one, and URLs, which may be signed, are left out.
Twin: tests/convert/publish/test_push_faults.py.
"""

import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from deltanet_errors import DeltanetError, UserError

T = TypeVar("T")
TRIES = 3
WAIT = 2.0
LONGEST_WAIT = 120.0
RERUN = "; run the same command again, what has arrived is not sent twice"


def patiently(call: Callable[[], T], repository: str, *, can_repeat: bool = True) -> T:
    """`call`, repeated where that may help; raises what `explained` makes of the last error.

    A call that must not be made twice has can_repeat False.
    """
    try:
        return repeated(call) if can_repeat else call()
    except DeltanetError:
        raise
    except Exception as error:
        raise explained(error, repository) from error


def repeated(call: Callable[[], T]) -> T:
    """`call`, up to TRIES times while the Hub is busy, failing or out of reach; raises the last error as it is."""
    for attempt in range(TRIES - 1):
        try:
            return call()
        except Exception as error:
            delay = _delay(error, attempt)
            if delay is None or delay > LONGEST_WAIT:
                raise
            print(f"{reason(error)}; tries again in {delay:.0f} s", file=sys.stderr, flush=True)
            time.sleep(delay)
    return call()


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed another time."""
    return _delay(error, 0) is not None


def explained(error: Exception, repository: str) -> DeltanetError:
    """The error for the user: UserError where they can mend it, else a plain failure to be tried again."""
    from huggingface_hub import errors

    error = _root(error)
    status = _status(error)
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(f"{repository}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it")
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{repository}: gated, and this token has no access; ask for it on the repository's page")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repository}: the Hub has no such revision (404)")
    if status == 401:
        return UserError(f"{repository}: the Hub does not accept the token (401); {login}")
    if status == 402:
        return UserError(f"{repository}: the account's storage or plan does not allow it (402)")
    if status == 403:
        return UserError(f"{repository}: the token may not do this (403); it needs the permission to write there")
    if status == 404 or isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{repository}: the Hub has no such repository, or it is hidden from this token (404)")
    if status in (409, 412):
        return DeltanetError(
            f"{repository}: it was changed by someone else at the same time ({status}); look at it, then {RERUN[2:]}"
        )
    if isinstance(error, ValueError) and isinstance(error.__cause__, errors.BadRequestError):
        return UserError(f"{repository}: the Hub refuses it (400): {' '.join(str(error).split())[:300]}")
    if status in (400, 413, 422):
        return UserError(f"{repository}: the Hub refuses it ({status}): {_server_words(error)}")
    if may_pass(error):
        return DeltanetError(f"{repository}: {reason(error)}{RERUN}")
    return DeltanetError(f"{repository}: {type(error).__name__}: {_shown(error)}")


def reason(error: Exception) -> str:
    """Why another try may help, in a few words."""
    error = _root(error)
    status = _status(error)
    if status == 429:
        wait = _retry_after(error)
        return "the Hub asks for fewer requests (429)" + (f", and to wait {wait:.0f} s" if wait else "")
    if status is not None:
        return f"the Hub failed ({status})"
    if _is(error, "TimeoutException"):
        return "the Hub did not answer in time"
    return f"the connection to the Hub broke ({type(error).__name__}: {_shown(error)})"


def _delay(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before another try; None where it would not help."""
    error = _root(error)
    status = _status(error)
    if status == 429 or status == 503:
        return _retry_after(error) or WAIT * 2**attempt
    is_broken = status is None and (_is(error, "TransportError") or isinstance(error, ConnectionError))
    if status in (408, 500, 502, 504) or is_broken or _is(error, "JSONDecodeError"):
        return WAIT * 2**attempt
    return None


def _shown(error: Exception) -> str:
    """The first line of an error's own text; of a URL the part that may be a signature is left out."""
    text = str(error).strip().splitlines()
    return re.sub(r"\?\S+", "", text[0])[:200] if text else "no message"


def _root(error: Exception) -> Exception:
    """The Hub's library wraps an upload's own error in a RuntimeError."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: Exception) -> float | None:
    value = error.response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _is(error: Exception, name: str) -> bool:
    """Whether the error is of that class of the HTTP library, whichever of its two generations the Hub's uses."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _server_words(error: Exception) -> str:
    words = getattr(error, "server_message", None) or str(error).strip().splitlines()[0]
    return " ".join(str(words).split())[:300]
