"""Secrets: texts lose them, files that may hold them are the user's alone, and a run knows them again."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Ecotone

from ecotone.experiments import keeping, logs, storage
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.storage import Store
from ecotone.experiments.tracking.mlflow import store
from ecotone.experiments.tracking.mlflow.server import serving
from ecotone.fitness.ray.token import own_token
from ecotone.populations import arguments, credentials, facts, folders, secrets
from ecotone.populations.errors import EcotoneError, InputError, told
from ecotone.populations.journal import Journal
from ecotone.populations.trial import Failure

PLAIN = {
    "name": "toy",
    "models": {"experts": ["a.safetensors", "b.safetensors"]},
    "objectives": {"search": [{"name": "f", "type": "call", "call": "m:f", "arguments": {}}]},
    "budget": {"evaluations": 4},
}


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ECOTONE_CONFIG", str(tmp_path / "config"))
    secrets.forget()
    yield
    secrets.forget()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host/x", "http://host/x"),
        ("http://me@host:80", "http://host:80"),
        ("http://me:p@ss@host:80/x?token=a#part", "http://host:80/x#part"),
        ("http://me:p%40w%2F@host/é?a", "http://host/é"),
        ("http://me:p/w#x?y@host/path", "http://host/path"),
        ("http://me:pw@[2001:db8::1]:8265/p?sig=abc", "http://[2001:db8::1]:8265/p"),
        ("see (http://me:pw@a/p?sig=b), or 'ftp://u@h/p?x=1'.", "see (http://a/p), or 'ftp://h/p'."),
        ('["http://a:b@c","http://d:e@f?g=h"]', '["http://c","http://f"]'),
        ("http://a:b@c,http://d:e@f", "http://c,http://f"),
        ("https://h/a?next=https://u:p@x/y then", "https://h/a then"),
        ("postgresql+psycopg2://u:p/w@host/db?sslmode=require&password=x", "postgresql+psycopg2://host/db?sslmode=require"),
        ("postgresql://u:12/w@host/db", "postgresql://host/db"),
        ("sqlite+pysqlcipher://:pw@/f.db", "sqlite+pysqlcipher:///f.db"),
        ("sqlite:////tmp/x.db?timeout=5&password=abc", "sqlite:////tmp/x.db?timeout=5"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dhunter2", "mssql+pyodbc:///"),
        ("postgresql:///db?user=u&password=hunter2", "postgresql:///db"),
        ("mysql+pymysql:///db?passwd=hunter2", "mysql+pymysql:///db"),
        ("https://host/x#access_token=abc", "https://host/x"),
        ("s3://bucket/a#1", "s3://bucket/a#1"),
        ("abfss://box@acc.dfs.core.windows.net/x?sv=1&sig=abc", "abfss://box@acc.dfs.core.windows.net/x"),
        ("s3://KEY:sec/ret@bucket/run", "s3://bucket/run"),
        ("simplecache::s3://k:s@b/x", "simplecache::s3://b/x"),
        ("ray://u:p@h:10001", "ray://h:10001"),
        ("http:/me:pw@host", "http:/host"),
        ("url: /api/x?X-Amz-Signature=ab%3D&y=1 (Caused", "url: /api/x?X-Amz-Signature=***&y=1 (Caused"),
        ("connection with host=x password=hunter2 failed", "connection with host=x password=*** failed"),
        ("AccountName=a;AccountKey=b64==;x", "AccountName=a;AccountKey=***;x"),
        ("{'Authorization': 'Basic bWU6cHc='}", "{'Authorization': 'Basic ***'}"),
        ("Bearer abcdefabcdefabcdef", "Bearer ***"),
    ],
)  # fmt: skip
def test_texts_lose_their_secrets(text: str, shown: str) -> None:
    assert secrets.stripped(text) == shown
    assert secrets.stripped(shown) == shown
    assert secrets.stripped(f"before {text} after") == f"before {shown} after"


@pytest.mark.parametrize(
    "text",
    [
        *("http://HOST:PORT", "http://host/path@v1/x", "http://[::1]:8265", "file:///home/me@x/a?b=c", "s3://b/k=v/x"),
        *(
            "org/name@main",
            "/runs/a:b@c",
            "C:\\a\\b@c:d",
            "memory://x/run",
            "me@example.org",
            "m.py:f",
            "token=7 key=3",
        ),
        "http://127.0.0.1:5000/#/experiments/1?viewStateShareKey=k",
        "sqlite:////tmp/x.db?timeout=5",
    ],
)
def test_what_has_no_secret_stays(text: str) -> None:
    assert secrets.stripped(text) == secrets.take(text) == secrets.plain(text) == text
    assert secrets.remembered() == {}


HOSTS = st.one_of(
    st.from_regex(r"[a-z][a-z0-9.-]{0,12}[a-z]", fullmatch=True),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
)
PLACES = st.builds(
    lambda scheme, host, port, path: f"{scheme}://{host}{port}{path}",
    st.sampled_from(["http", "https", "s3", "ftp", "webhdfs", "postgresql", "mysql+pymysql", "ray", "sftp", "x-y.z+q"]),
    HOSTS,
    st.one_of(st.just(""), st.integers(1, 65535).map(lambda port: f":{port}")),
    st.from_regex(r"(/[A-Za-z0-9._~%-]{1,8}){0,3}", fullmatch=True),
)
QUOTED = st.text("abcXYZ019%@&=+$!*'(),;~._-é", min_size=1, max_size=12).filter(lambda text: not text.endswith("@"))
PASSWORDS = QUOTED.filter(lambda text: not text.isdecimal())


@settings(deadline=None, max_examples=40)
@given(PLACES, QUOTED, PASSWORDS, st.from_regex(r"[a-z]{1,9}=[A-Za-z0-9%+/=-]{1,20}", fullmatch=True))
def test_any_user_password_and_query_go(url: str, user: str, password: str, query: str) -> None:
    scheme, _, rest = url.partition("://")
    kept = query.partition("=")[0] in secrets._HARMLESS
    whole = f"{scheme}://{user}:{password}@{rest}" + ("" if kept else f"?{query}")
    for strip in (secrets.stripped, secrets.place):
        assert strip(whole) == url
        assert strip(url) == url
        assert strip(f"{scheme}://{user}:{password}@{user}@{rest}") == url


@settings(deadline=None, max_examples=40)
@given(st.text())
def test_stripping_again_changes_nothing(text: str) -> None:
    for strip in (secrets.stripped, secrets.place, secrets.plain):
        once = strip(text)
        assert strip(once) == once


@settings(deadline=None, max_examples=40)
@given(st.lists(st.from_regex(r"[\w .@-]{1,9}", fullmatch=True), min_size=1), st.sampled_from(["/", "\\"]))
def test_paths_stay(parts: list[str], sign: str) -> None:
    for path in (f"{sign}{sign.join(parts)}", f"C:{sign}{sign.join(parts)}", sign.join(parts)):
        assert secrets.stripped(path) == secrets.place(path) == secrets.plain(path) == path


def test_arguments_of_functions_keep_what_says_which_data_are_meant() -> None:
    names = [
        "X-Amz-Signature",
        "X-Amz-Credential",
        "AWSAccessKeyId",
        "sig",
        "api_key",
        "apitoken",
        "subscription-key",
        "password",
        "key",
    ]
    query = "&".join(f"{name}=s{number}" for number, name in enumerate(names))
    value = {"url": f"https://me:pw@host/d?rows=a&{query}", "rest": [1, "https://host/d?rows=b&design=c"]}
    assert secrets.take_all(value) == {"url": "https://host/d?rows=a", "rest": value["rest"]}
    assert secrets.restored(secrets.plain(value)) == value


def test_values_for_display() -> None:
    value = {"api_key": "k", "signature": "s", "n": 1, "in": [{"HF_TOKEN": "t"}, ("http://u:p@h",)], "token": 7}
    shown = {"api_key": "***", "signature": "s", "n": 1, "in": [{"HF_TOKEN": "***"}, ("http://h",)], "token": 7}
    assert secrets.without(value) == shown


def test_known_secrets_are_hidden_wherever_they_stand() -> None:
    shown = secrets.take("http://planted-user-12:hunter%402x@host/x?code=abcdefgh1")
    assert shown == "http://host/x"
    text = "planted-user-12, hunter@2x, hunter%402x; abcdefgh1 cGxhbnRlZC11c2VyLTEyOmh1bnRlckAyeA== hunter%402xy"
    assert secrets.stripped(text) == "***, ***, ***; *** *** hunter%402xy"
    secrets.take("http://ecotone:ecotone@host")
    assert secrets.stripped("`ecotone resume`") == "`ecotone resume`"


def test_errors_failures_and_logs_are_stripped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = "http://me:pw123@host/x?sig=abc"
    error = InputError(f"{url}: bad.", f"Mend {url}.")
    assert (error.message, error.remedy) == ("http://host/x: bad.", "Mend http://host/x.")
    assert str(error) == "http://host/x: bad. Mend http://host/x."
    assert told(ValueError(url)) == "ValueError: http://host/x"
    failure = Failure("exception", url, f"Traceback\n{url}\n")
    assert (failure.message, failure.details) == ("http://host/x", "Traceback\nhttp://host/x\n")
    log = logging.getLogger("ecotone")
    with logs.recorded(tmp_path):
        try:
            raise OSError(url)
        except OSError:
            log.exception("failed: %s", url, extra={"event": "e", "url": url, "more": {"password": "pw123"}})
    text = (tmp_path / logs.LOG).read_text() + capsys.readouterr().err
    assert "http://host/x" in text
    assert not any(secret in text for secret in ("pw123", "abc", "me:"))


def test_chains_of_exceptions_are_cleaned() -> None:
    class ClientError(ConnectionError):
        def __str__(self) -> str:
            return f"cannot reach {self.args[0]}"

    @secrets.cleaning()
    def run() -> None:
        try:
            try:
                raise FileNotFoundError(2, "missing", "http://a:pw123@host")
            except OSError as error:
                raise ClientError("http://b:pw123@host") from error
        except OSError as error:
            raise EcotoneError("It failed.") from error

    with pytest.raises(EcotoneError) as caught:
        run()
    text = "".join(traceback.format_exception(caught.value))
    assert "pw123" not in text
    assert "ClientError: cannot reach http://host" in text
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert isinstance(caught.value.__cause__.__cause__, FileNotFoundError)
    with pytest.raises(KeyError) as other, secrets.cleaning():
        raise KeyError("http://b:pw123@host")
    assert "pw123" not in "".join(traceback.format_exception(other.value))


# -- files ---------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o777])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
def test_files_of_a_run_are_its_owners_alone(tmp_path: Path) -> None:
    run = folders.private_folder(tmp_path / "run")
    with Journal.create(run / "journal.sqlite", [facts.NAME.note("n")]) as journal:
        assert {mode(file) for file in run.iterdir()} == {0o600}
        assert len(list(run.iterdir())) == 4  # with -wal, -shm and the lock
        journal.snapshot(run / "snapshot")
    folders.write_private(run / "recipe.yaml", b"x")
    with logs.recorded(run):
        logging.getLogger("ecotone").info("a line", extra={"event": "e"})
    assert sorted(file.name for file in run.iterdir() if mode(file) != 0o600) == []
    assert (run / "log.jsonl").exists()
    assert mode(run) == 0o700


def test_files_that_others_could_read_are_closed_off(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(0o644)
    with folders.opened(file, "a") as handle:
        assert mode(file) == 0o600
        handle.write(" and new")
    assert file.read_text() == "old and new"
    (tmp_path / "link").symlink_to(file)
    file.chmod(0o640)
    folders.tighten([tmp_path / "link", tmp_path / "missing"])
    assert mode(file) == 0o640
    folders.tighten([file])
    assert mode(file) == 0o600


def test_runs_of_older_versions_are_closed_off_when_they_go_on(tmp_path: Path) -> None:
    Journal.create(tmp_path / "journal.sqlite").close()
    for name in ("recipe.yaml", "tracking.json", "tracking.log", "log.jsonl", "tracking-mlflow.lock", "notes.txt"):
        (tmp_path / name).write_text("")
    for file in tmp_path.iterdir():
        file.chmod(0o644)
    with storage.opened(tmp_path, new=False), Journal.open(tmp_path / "journal.sqlite", write=True):
        open_to_others = [file.name for file in tmp_path.iterdir() if mode(file) != 0o600]
    assert open_to_others == ["notes.txt"]  # which is the user's


@pytest.mark.usefixtures("_umask")
def test_rays_token_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    own_token()
    assert not (tmp_path / ".ray").exists()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    own_token()
    token = tmp_path / ".ray" / "auth_token"
    assert mode(token) == 0o600
    assert len(before := token.read_text()) == 64
    token.chmod(0o644)
    own_token()
    assert (mode(token), token.read_text()) == (0o600, before)
    assert [file.name for file in token.parent.iterdir()] == ["auth_token"]


# -- the user's credentials ----------------------------------------------------------------------------------


def test_credentials_are_kept_for_the_next_process(tmp_path: Path) -> None:
    said: list[str] = []
    url = secrets.take("http://me:pw123@host/x")
    assert keeping.kept(said.append, {"tracking": {"uri": url}, "n": 1}, ["http://other"]) == ("http://host/x",)
    file = tmp_path / "config" / "credentials.json"
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    assert str(file) in said[0]
    assert "pw123" not in said[0]
    secrets.forget()
    assert secrets.whole(url) == url
    assert credentials.whole(url) == "http://me:pw123@host/x"
    assert list(keeping.missing([url], {})) == []
    file.chmod(0o644)
    secrets.forget()
    assert credentials.whole(url) == "http://me:pw123@host/x"
    assert mode(file) == 0o600
    secrets.take("http://me:newer1@host/x")  # what the user gives now counts
    credentials.load()
    assert credentials.whole(url) == "http://me:newer1@host/x"
    keeping.kept(said.append, url)
    assert "newer1" in file.read_text()


def test_credentials_that_are_gone_say_which_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    tracking = {"mlflow": {"uri": "http://host"}}
    (told_,) = keeping.missing(["http://host"], tracking)
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in told_
    (told_,) = keeping.missing(["https://data/x"], tracking)
    assert "$ECOTONE_CREDENTIALS" in told_
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    assert list(keeping.missing(["http://host"], tracking)) == []
    monkeypatch.setenv("ECOTONE_CREDENTIALS", json.dumps({"https://data/x": "https://u:p@data/x"}))
    assert list(keeping.missing(["https://data/x"], tracking)) == []


def test_credentials_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ECOTONE_CONFIG", str(tmp_path / "file" / "config"))
    said: list[str] = []
    keeping.kept(said.append, secrets.take("http://me:pw123@host/x"))
    assert "MLFLOW_TRACKING_USERNAME" in said[0]
    assert "pw123" not in said[0]


def recipe(**changes: object) -> Recipe:
    return Recipe.from_record({**PLAIN, **changes})


def test_a_recipe_is_recorded_without_credentials_and_signed_without_them() -> None:
    def data(url: str) -> Recipe:
        return recipe(objectives={"search": [{"name": "f", "type": "call", "call": "m:f", "arguments": {"url": url}}]})

    found = recipe(
        tracking={"uri": "http://me:pw123@host/x?token=abc"}, runtime={"pool": "ray", "address": "ray://u:pw123@h:1"}
    )
    assert found.tracking.uri == "http://host/x"
    assert found.runtime.address == "ray://h:1"
    assert found.signature == recipe().signature
    for text in (found.text(), json.dumps(found.record()), json.dumps(found.tracking.recorded())):
        assert not any(secret in text for secret in ("pw123", "me", "abc") if f"/{secret}" in text or secret != "me")
    one, two, other = (data(f"https://u:{pw}@h/d?rows={rows}&sig={pw}") for pw, rows in ((1, 1), (2, 1), (1, 2)))
    assert one.objectives.search[0].arguments["url"] == "https://u:1@h/d?rows=1&sig=1"  # type: ignore[union-attr]
    assert one.record()["objectives"]["search"][0]["arguments"]["url"] == "https://h/d?rows=1"
    assert one.signature == two.signature != other.signature
    again = Recipe.read_back(two.record(), "")
    assert again.objectives.search[0].arguments["url"] == "https://u:2@h/d?rows=1&sig=2"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "tracking",
    [
        {"uri": ["http://me:pw123@host"]},
        {"uri": {"password": "pw123"}},
        {"uri": "htp://me:pw123@host"},
        {"wandb": "0123456789abcdefpw123"},
        {"wandb": {"mode": "0123456789abcdefpw123"}},
        {"mlflow": "http://me:pw123@host"},
        "http://me:pw123@host",
        {"experiment": "http://me:pw123@host" * 100},
    ],
)
def test_values_that_do_not_fit_are_not_printed_with_secrets(tracking: object) -> None:
    with pytest.raises(InputError) as refused:
        recipe(tracking=tracking)
    assert "tracking" in refused.value.message
    assert "pw123" not in str(refused.value)


def test_the_users_own_arguments_are_hidden_from_others(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ecotone.populations.arguments import hide; "
        "print(hide(), Path('/proc/self/cmdline').read_bytes().split(b'\\0')[3:], sys.argv[1:])"
    )
    given_ = ["--out", "s3://KEY:pw123@b/x?sig=abc", "--set=tracking.uri=http://me:p w@h", "last"]
    said = subprocess.run([sys.executable, "-c", code, *given_], capture_output=True, text=True, check=True).stdout
    seen, _, own = said.partition("] [")
    assert "pw123" not in seen
    assert "p w" not in seen
    assert "'last'" in seen.replace("b'", "'")
    assert "pw123" in own
    assert arguments._hidden(b"a b") == b"a b"


def test_a_database_is_served_without_its_password_in_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, object] = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.update(command=command, **options))
    uri = secrets.take("postgresql://me:pw123@host/db")
    (tmp_path / "run").mkdir()
    serving(uri, tmp_path / "run", 5000)
    assert "pw123" not in str(started["command"])
    assert started["env"]["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:pw123@host/db"  # type: ignore[index]


def test_clients_get_the_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    client = types.SimpleNamespace(MlflowClient=lambda tracking_uri: asked.append(tracking_uri))
    monkeypatch.setitem(sys.modules, "mlflow", client)  # type: ignore[arg-type]
    store.client_of(secrets.take("http://me:pw123@host"))
    assert asked == ["http://me:pw123@host"]


def test_a_store_says_where_it_looks_for_credentials(ecotone: Ecotone) -> None:
    pytest.importorskip("requests")
    for url, words in (
        ("webhdfs://127.0.0.1:1/run", "FSSPEC_WEBHDFS_USERNAME"),
        ("webhdfs://me:pw123@127.0.0.1:1/run", "Check the URL, the credentials"),
    ):
        with pytest.raises(EcotoneError) as refused:
            Store(url).names()
        assert words in refused.value.remedy
        assert "pw123" not in "".join(traceback.format_exception(refused.value))
    answer = ecotone("status", "webhdfs://me:pw123@127.0.0.1:1/run?sig=abc123")
    assert answer.code == 1
    assert not any(secret in answer.err for secret in ("pw123", "me:", "abc123"))
