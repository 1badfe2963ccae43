"""Secrets in texts: what is recorded, printed, logged or sent has the URLs of servers without user info and query.

``stripped`` takes them out of any text: a URL, a sentence with URLs, a traceback. ``without`` does so in nested values.
``take`` strips the URL of a place (a tracker, a run directory, a cluster), and keeps the whole URL in this process;
``whole`` gives it back where a connection is made. ``ecotone.populations.credentials`` keeps whole URLs in a file of
the user's, for the next process.

The parts that are secret, by RFC 3986: the user info of the authority, and the query, apart from settings that are
known to be harmless (``sslmode``). A password may hold ``@``, ``#``, ``?`` and, in URLs of databases, ``/``, as
SQLAlchemy takes them. Paths, and URLs without an authority (``sqlite:///file``, ``file:///path``), are left alone but
for parameters that are named like credentials.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import quote, unquote

HIDDEN = "***"
"""Stands for a secret, where leaving it out would leave a text that means something else."""

# Repetitions are bounded, so that the time is linear in the text, which may be anything.
URL_BEGIN: re.Pattern[str] = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")
_TYPO = re.compile(  # of `://`
    r"\b([A-Za-z][A-Za-z0-9+.-]{0,30}:/?)[^\s/:@\"'<>`\\]{1,200}:[^\s/@\"'<>`\\]{1,200}@(?=[\w\[])"
)
_ENDS = re.compile(r"[\s\"<>`]")  # of a URL in a sentence
_CLOSING = "')]}.,;:!"  # of the sentence, not of the URL
_DATABASES = frozenset({"postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle", "cockroachdb", "mongodb"})
_FILES = frozenset({"file", "local", "sqlite"})  # whose URLs have no server
_CONTAINERS = frozenset({"abfs", "abfss", "wasb", "wasbs"})  # whose URLs have a container where others have a user
_HARMLESS = frozenset(
    {"sslmode", "ssl", "ssl_mode", "ssl_ca", "sslrootcert", "charset", "driver", "timeout", "connect_timeout"}
)
_NAMES = (  # of parameters
    r"(?:[a-z0-9_-]{0,60}(?:token|signature|credentials?|password|passwd|passphrase|secret)"
    r"|[a-z0-9_-]{0,60}(?:api|access|account|app|auth|private|secret|shared|session)[_-]?key(?:[_-]?id)?"
    r"|(?:[a-z0-9]{1,30}[_-]){0,4}(?:sig|key|pwd|auth|authorization|accessid|passfile|odbc_connect|sharedaccesssignature))"
)
_PARAMETER = re.compile(rf"(?i)([?&;#]){_NAMES}=([^\s\"<>`&;#']*)")
_ASSIGNED = re.compile(
    r"(?i)\b((?:[a-z0-9]{1,30}[_-]){0,4}(?:password|passwd|pwd|passphrase|secret|secret_key|accountkey|account_key|api_key|apikey"
    r"|access_token|auth_token|session_token|sharedaccesssignature))(\s?=\s?)(\"[^\"]*\"|'[^']*'|[^\s;,&\"'<>`)]+)"
)
_HEADER = re.compile(r"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?)((?:basic|bearer|token)\s+)?[^\s'\",}]+")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{16,}")
_NAMED = re.compile(rf"(?i){_NAMES}")
_KEY = re.compile(  # of a mapping: a signature may be a recipe's
    r"(?i)[a-z0-9_-]{0,60}(?:token|password|passwd|passphrase|secret|(?:api|access|account|private|secret)[_-]?key)"
    r"|pwd|authorization"
)
_HINTS = ("://", "=", ":/", "uthoriza", "earer", "AUTHORIZA", "BEARER", "@")

_whole: dict[str, str] = {}  # of this process: whole URLs by what is shown of them
_masks: dict[str, None] = {}  # secrets of those URLs, as they may stand in texts
_lock = threading.Lock()


def stripped(text: str) -> str:
    """A text without the user info and the queries of its URLs, and without other passwords.

    Plain URLs and paths stay as they are. Stripping a second time changes nothing.
    """
    if _masks:
        text = _masked(text)
    if not any(hint in text for hint in _HINTS):
        return text
    text = _without_urls(text)
    text = _TYPO.sub(r"\1", text)
    text = _PARAMETER.sub(_hidden_parameter, text)
    text = _ASSIGNED.sub(rf"\1\2{HIDDEN}", text)
    text = _HEADER.sub(rf"\1\2{HIDDEN}", text)
    return _BEARER.sub(rf"\1{HIDDEN}", text)


def without(value: Any) -> Any:
    """A nested value for display, with every text in it stripped and the values of keys like ``password`` hidden."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, one) else without(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(without, value)) if type(value) in (list, tuple, set, frozenset) else value
    return stripped(value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """A nested value for the record of what a search computes: URLs in it lose user info and credentials.

    Other parameters of a query stay, because they may say which data are meant. ``restored`` is the way back.
    """
    return _each_text(value, _without_credentials)


def restored(value: Any) -> Any:
    """A nested value with every text that ``take`` or ``remember`` knows whole made whole again."""
    return _each_text(value, whole)


def take(url: str) -> str:
    """The URL of a place as it may be shown and recorded. If it has secrets, this process keeps the whole URL."""
    shown = place(url)
    if shown != url:
        remember(shown, url)
    return shown


def take_all(value: Any) -> Any:
    """``plain``, and every whole text that it changes is kept in this process."""

    def taken(text: str) -> str:
        shown = _without_credentials(text)
        if shown != text:
            remember(shown, text)
        return shown

    return _each_text(value, taken)


def take_places(value: Any) -> Any:
    """A nested value whose URLs are those of places, with each of them taken."""
    return _each_text(value, take)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A nested value with every text in it changed, but for keys."""
    if isinstance(value, Mapping):
        return {key: _each_text(one, change) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_each_text(one, change) for one in value)
    return change(value) if isinstance(value, str) else value


def place(url: str) -> str:
    """One URL, all of the text, without its secrets; a path stays as it is."""
    bare = url.lstrip()
    if URL_BEGIN.match(bare) is None:
        return _TYPO.sub(r"\1", url)
    return url[: len(url) - len(bare)] + _ended(_without_secrets, bare)


def whole(url: str) -> str:
    """The URL with the credentials that this process has for it; the URL itself where it has none."""
    return _whole.get(url, url)


def remember(shown: str, url: str) -> None:
    """Keep a whole URL in this process, and hide its secrets in every text that is stripped from now on."""
    with _lock:
        _whole[shown] = url
        for secret in _secrets_of(url):
            _masks.update(dict.fromkeys(sorted({secret, unquote(secret), quote(secret, safe="")}, key=len)))


def remembered() -> dict[str, str]:
    """The whole URLs of this process, by what is shown of them."""
    with _lock:
        return dict(_whole)


def forget() -> None:
    """Forget all of them, as at the start of a process."""
    with _lock:
        _whole.clear()
        _masks.clear()


# -- exceptions and streams ----------------------------------------------------------------------------------


def clean(error: BaseException) -> BaseException:
    """An exception whose text, and whose causes, have no secrets: itself, or else one of the same name.

    The stand-in has no traceback. It is an instance of the nearest built-in class of the exception.
    """
    for link in ("__cause__", "__context__"):
        before = getattr(error, link)
        if before is not None and before is not error:
            after = clean(before)
            if after is not before:
                quiet = error.__suppress_context__
                setattr(error, link, after)
                error.__suppress_context__ = quiet
    text = str(error)
    if stripped(text) == text and all(stripped(one) == one for one in error.args if isinstance(one, str)):
        return error
    kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins" and base is not object)
    if issubclass(kind, UnicodeError) or kind.__name__.endswith("ExceptionGroup"):  # which take other arguments
        kind = Exception
    named = type(type(error).__name__, (kind,), {"__module__": type(error).__module__})
    stand_in: BaseException = named(stripped(text))
    stand_in.__cause__, stand_in.__context__ = error.__cause__, error.__context__
    stand_in.__suppress_context__ = error.__suppress_context__
    return stand_in


@contextlib.contextmanager
def cleaning() -> Iterator[None]:
    """Exceptions that leave a block, or a function that this decorates, are ``clean``."""
    try:
        yield
    except BaseException as error:
        shown = clean(error)
        if shown is error:
            raise
        raise shown from shown.__cause__


def traceback_of(error: BaseException) -> str:
    """The traceback of an exception, stripped."""
    return stripped("".join(traceback.format_exception(error)))


class Sieve:
    """A text stream that passes on everything stripped, for streams that other packages write to.

    Args:
        stream: The stream that takes the text.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, stripped."""
        self._stream.write(stripped(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hook() -> None:
    """Have this process print tracebacks that nobody catches without secrets."""

    def print_stripped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(stripped("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    def print_of_thread(told: threading.ExceptHookArgs) -> None:
        if told.exc_value is not None and not issubclass(told.exc_type, SystemExit):
            print_stripped(told.exc_type, told.exc_value, told.exc_traceback)

    sys.excepthook, threading.excepthook = print_stripped, print_of_thread


class LogFilter(logging.Filter):
    """Strips the message and the traceback of log records; fields are left to whoever writes them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Strip them in the record."""
        message = record.getMessage()
        shown = stripped(message)
        if shown != message:
            record.msg, record.args = shown, ()
        if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
            record.exc_text = traceback_of(record.exc_info[1]).rstrip("\n")
        return True


# -- the parts of URLs ---------------------------------------------------------------------------------------


def _without_urls(text: str) -> str:
    """A text whose URLs, each up to a space, a quotation mark or the next URL, have no secrets."""
    parts, end, stop = [], 0, -1
    while (begin := URL_BEGIN.search(text, end)) is not None:
        if stop < begin.end():
            found = _ENDS.search(text, begin.end())
            stop = len(text) if found is None else found.start()
        following, limit = URL_BEGIN.search(text, begin.end(), stop), stop
        if following is not None and "?" not in text[begin.end() : following.start()]:
            limit = following.start()  # what follows a question mark belongs to the query
        rest = text[begin.end() : limit].rstrip(_CLOSING)
        parts += [text[end : begin.start()], _ended(_without_secrets, f"{begin[0]}{rest}")]
        end = begin.end() + len(rest)
    return "".join([*parts, text[end:]])


def _ended(strip: Any, url: str) -> str:
    """``strip`` until it changes nothing: what is left of a URL may again look like one with user info."""
    while (after := strip(url)) != url:
        url = after
    return url


def _split(url: str) -> tuple[str, str, str, str]:
    """Scheme with its mark, user info (with its ``@``, or empty), host with path, and query with fragment."""
    begin = URL_BEGIN.match(url)
    assert begin is not None
    rest, scheme = url[begin.end() :], begin[0][:-3].lower().partition("+")[0]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    at = authority.rfind("@")
    port = "" if authority.endswith("]") else authority.rpartition(":")[2] if ":" in authority else ""
    if at < 0 and ":" in authority and (scheme in _DATABASES or (port and not port.isdecimal())):
        at = rest.find("@") if scheme in _DATABASES else rest.rfind("@")
    user, rest = rest[: at + 1], rest[at + 1 :]
    mark = re.search(r"\?", rest.partition("#")[0])
    place = len(rest) if mark is None else mark.start()
    return begin[0], user, rest[:place], rest[place:]


def _without_secrets(url: str) -> str:
    """A URL without user info and query, apart from parameters that are known to be harmless."""
    scheme, user, rest, query = _split(url)
    container = user[:-1].partition(":")[0] if scheme[:-3].lower() in _CONTAINERS else ""
    user = f"{container}@" if container else ""
    asked, hash_, fragment = query.partition("#")
    parameters = [one for one in asked[1:].split("&") if one]
    if rest.startswith("/") and scheme[:-3].lower() in _FILES:  # of a file's name, or of its opening
        kept = [one for one in parameters if not _has_credentials(one)]
    else:
        kept = [one for one in parameters if one.partition("=")[0].lower() in _HARMLESS]
    return f"{scheme}{user}{_put_together(rest, kept, hash_ + fragment)}"


def _without_credentials(text: str) -> str:
    """A text whose URLs lose user info, and of their queries the parameters that are named like credentials."""
    if "://" not in text:
        return text
    parts, end = [], 0
    for begin in URL_BEGIN.finditer(text):
        if begin.start() < end:
            continue
        stop = _ENDS.search(text, begin.end())
        limit = len(text) if stop is None else stop.start()
        parts += [text[end : begin.start()], _ended(_without_named, text[begin.start() : limit])]
        end = limit
    return "".join([*parts, text[end:]])


def _without_named(url: str) -> str:
    scheme, user, rest, query = _split(url)
    if scheme[:-3].lower() not in _CONTAINERS:
        user = ""
    asked, hash_, fragment = query.partition("#")
    kept = [one for one in asked[1:].split("&") if one and not _has_credentials(one)]
    return f"{scheme}{user}{_put_together(rest, kept, hash_ + fragment)}"


def _has_credentials(parameter: str) -> bool:
    """Whether a parameter is named like credentials, or has such ones within, as a connection string of ODBC has."""
    name, _, value = parameter.partition("=")
    return _NAMED.fullmatch(name) is not None or _ASSIGNED.search(unquote(value)) is not None


def _put_together(rest: str, parameters: Sequence[str], fragment: str) -> str:
    """Host and path, query and fragment (with its mark), which goes if it has credentials; ``rest`` may end in one."""
    path, hash_, more = rest.partition("#")
    query = "?" + "&".join(parameters) if parameters else ""
    marked = (hash_ + more, fragment)
    first, second = ("" if any(map(_has_credentials, re.split("[#&]", one))) else one for one in marked)
    return f"{path}{first}{query}{second}"


def _hidden_parameter(found: re.Match[str]) -> str:
    return found[0][: len(found[0]) - len(found[2])] + HIDDEN


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and bool(value) and _KEY.fullmatch(key) is not None


def _secrets_of(text: str) -> Iterator[str]:
    """The secrets of a whole URL that are long enough to be looked for in other texts."""
    for begin in URL_BEGIN.finditer(text):
        _, user, _, query = _split(text[begin.start() :])
        name, _, password = user[:-1].partition(":")
        if len(password) >= 8 or (len(password) >= 6 and not password.isalpha()):
            yield password
        if len(name) >= 12 and not name.isalpha():  # an access key's, not `postgres`
            yield name
        if password:
            pair = f"{unquote(name)}:{unquote(password)}".encode()
            yield base64.b64encode(pair).decode()  # as it stands in a header
        for one in query.partition("#")[0][1:].split("&"):
            parameter, _, value = one.partition("=")
            if len(value) >= 8 and parameter.lower() not in _HARMLESS:
                yield value


def _masked(text: str) -> str:
    """A text with the secrets of this process hidden, where they stand as words of their own."""
    for secret in sorted(_masks, key=len, reverse=True):
        if secret in text:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", HIDDEN, text)
    return text
