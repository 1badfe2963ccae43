"""Variables of a cluster's job, sealed with the cluster's token, so that only who has the token can read them.

Ray keeps a job's variables in its tables, shows them in its dashboard, writes them into its logs, and starts workers
with them in their arguments, where every user of the machine sees them. So a job is given its secret variables in one
sealed variable. Every process of the job opens it when it imports Ecotone: each has the token, without which Ray's
processes do not talk to each other.

The seal is encrypt-then-MAC with the keyed BLAKE2b and a key stream of SHAKE256. Both keys are derived from the token,
which has 256 random bits, and from a nonce that is used once.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from ecotone.populations.errors import InputError
from ecotone.populations.secrets import stripped

VARIABLE = "ECOTONE_SEALED"
"""The sealed variable of a job."""

_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|PWD|CREDENTIAL|CONNECTION_STRING|AUTH|SIGNATURE|SAS|COOKIE", re.IGNORECASE)
_NONCE, _TAG = 16, 32  # bytes


def token() -> str | None:
    """The token of this user's clusters, where Ray looks for it; None where there is none, or tokens are off."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if named := os.environ.get("RAY_AUTH_TOKEN"):
        return named.strip() or None
    try:
        file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
        return Path(file).read_text().strip() or None
    except (OSError, RuntimeError, ValueError):
        return None


def sealed(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables, with those that may be secret in one sealed variable. Without a token they stay as they are."""
    key = token()
    secret = {name: value for name, value in variables.items() if _SECRET.search(name) or stripped(value) != value}
    if key is None or not secret:
        return dict(variables)
    rest = {name: value for name, value in variables.items() if name not in secret}
    return {**rest, VARIABLE: _seal(json.dumps(secret).encode(), key)}


def unseal() -> None:
    """Set the variables that this process was given sealed; variables that are set already stay."""
    text, key = os.environ.get(VARIABLE), token()
    opened = None if text is None or key is None else _open(text, key)
    if opened is None:
        return  # ``check`` says so
    del os.environ[VARIABLE]
    for name, value in json.loads(opened).items():
        os.environ.setdefault(name, value)


def check() -> None:
    """Refuse to go on with variables that could not be opened.

    Raises:
        InputError: The token here is not the one that they were sealed with.
    """
    if VARIABLE in os.environ:
        raise InputError(
            f"${VARIABLE}: the variables of this job were sealed with another token than this machine's.",
            "Submit it with the cluster's token, or set the variables on the cluster.",
        )


def _seal(data: bytes, key: str) -> str:
    nonce = secrets.token_bytes(_NONCE)
    hidden = _mixed(data, nonce, key)
    return base64.b64encode(nonce + _tag(nonce + hidden, key) + hidden).decode()


def _open(text: str, key: str) -> bytes | None:
    """The data; None where the key is another, or the text was changed."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    nonce, tag, hidden = data[:_NONCE], data[_NONCE : _NONCE + _TAG], data[_NONCE + _TAG :]
    return _mixed(hidden, nonce, key) if hmac.compare_digest(tag, _tag(nonce + hidden, key)) else None


def _mixed(data: bytes, nonce: bytes, key: str) -> bytes:
    """``data`` XOR the key stream, which is its own inverse."""
    stream = hashlib.shake_256(_key(key, b"stream") + nonce).digest(len(data))
    return bytes(a ^ b for a, b in zip(data, stream, strict=True))


def _tag(data: bytes, key: str) -> bytes:
    return hashlib.blake2b(data, key=_key(key, b"tag"), digest_size=_TAG).digest()


def _key(token: str, purpose: bytes) -> bytes:
    return hashlib.blake2b(token.encode(), digest_size=32, person=b"ecotone." + purpose).digest()
