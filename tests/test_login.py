import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
from hub import Hub

from helpers import login as module
from helpers.login import AccessError, can_ask, check_access, check_token, login

REPO = "someone/gated-model"
TOKEN = "hf_" + "TotallySecretTokenForTests123456"  # in two pieces, so that nobody takes it for a real one


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    with Hub({REPO: folder}) as hub:
        hub.connect(monkeypatch, tmp_path / "cache")
        yield hub


def refused(caplog, capfd, repo_id=REPO) -> str:
    """The one sentence; no output of any kind may hold the token."""
    with pytest.raises(AccessError) as caught:
        check_access(repo_id)
    message, error = str(caught.value), caught.value
    out, err = capfd.readouterr()
    while error is not None:
        assert TOKEN not in str(error) and TOKEN not in repr(error)
        error = error.__cause__ or error.__context__
    assert TOKEN not in caplog.text + out + err
    assert "\n" not in message and message.endswith(".") and message.count(". ") == 0
    return message


def test_open_repository_needs_no_token(hub):
    assert check_access(REPO) is None
    assert not hub.tokens


def test_gated_without_token_says_where_to_get_one(hub, caplog, capfd):
    hub.gate = "gated"
    message = refused(caplog, capfd)
    assert "gated" in message and f"https://huggingface.co/{REPO}" in message
    assert "https://huggingface.co/settings/tokens" in message and "HF_TOKEN" in message


def test_gated_without_license_says_which_page_to_open(hub, monkeypatch, caplog, capfd):
    hub.gate, hub.known = "gated", {TOKEN}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    message = refused(caplog, capfd)
    assert "license is not accepted" in message and f"open https://huggingface.co/{REPO} " in message
    assert hub.tokens == {TOKEN}
    hub.allowed = {TOKEN}
    assert check_access(REPO) is None


def test_token_without_the_right_for_gated_repositories(hub, monkeypatch, caplog, capfd):
    hub.gate = "fine-grained"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    message = refused(caplog, capfd)
    assert "no right" in message and "tick" in message and "settings/tokens" in message


def test_token_that_the_hub_does_not_know(hub, monkeypatch, caplog, capfd):
    hub.gate = "gated"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    message = refused(caplog, capfd)
    assert "does not know this token" in message and "make a new read token" in message


@pytest.mark.parametrize("token", [None, TOKEN])
def test_repository_that_is_not_there(hub, monkeypatch, caplog, capfd, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert "no repository someone/else on the Hub" in refused(caplog, capfd, "someone/else")


def test_a_name_that_cannot_be_a_repository(hub, caplog, capfd):
    assert "owner/name" in refused(caplog, capfd, "a/b/c")


def test_file_that_is_not_there(hub, tmp_path, caplog, capfd):
    (tmp_path / "repo" / "model_index.json").unlink()
    assert "file model_index.json is missing" in refused(caplog, capfd)


def test_offline_with_a_cold_and_a_warm_cache(hub, monkeypatch, caplog, capfd):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in refused(caplog, capfd)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    check_access(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_access(REPO)


def test_no_network(hub, caplog, capfd):
    hub.__exit__()
    assert "check the network" in refused(caplog, capfd)


@pytest.mark.parametrize(
    "token", ["", "  \n", f"{TOKEN} {TOKEN}", f"{TOKEN[:9]}\n{TOKEN[9:]}", TOKEN + "é", TOKEN + "\0"]
)
def test_a_token_that_cannot_be_one(hub, monkeypatch, caplog, token):
    monkeypatch.setattr(os, "environ", {**os.environ, "HF_TOKEN": token})  # the real one refuses a NUL
    with pytest.raises(AccessError) as caught:
        login()
    message = str(caught.value)
    assert "HF_TOKEN in the environment" in message and "settings/tokens" in message and "\n" not in message
    assert TOKEN[:9] not in message + caplog.text
    if token.strip() and "\n" not in token:  # the Hub client takes line breaks out, and counts a blank token as none
        with pytest.raises(AccessError):
            check_token()
        with pytest.raises(AccessError):
            check_access(REPO)
        assert not hub.requests


def test_blank_ends_of_a_token_are_forgiven(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    assert login() == "environment"
    check_access(REPO)
    assert hub.tokens == {TOKEN}


@pytest.fixture
def colab(monkeypatch):
    """google.colab.userdata, the stand-in; a test puts into its `secrets` what `get` is to answer."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "colab")
    for name in ("google", "google.colab", "google.colab.errors", "google.colab.userdata"):
        monkeypatch.setitem(sys.modules, name, None)  # so that the module from before, or none, comes back at the end
        del sys.modules[name]
    return importlib.import_module("google.colab.userdata")


def test_order_environment_secret_saved(hub, tmp_path, monkeypatch, colab, capfd):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    saved = tmp_path / "cache" / "no-token"
    saved.parent.mkdir(exist_ok=True)
    saved.write_text("hf_saved")
    colab.secrets["HF_TOKEN"] = "hf_secret\n"
    os.environ["HF_TOKEN"] = "hf_environment"
    assert login() == "environment"
    del os.environ["HF_TOKEN"]
    assert login() == "Colab secret" and huggingface_hub.get_token() == "hf_secret"
    for refusal in (colab.SecretNotFoundError, colab.NotebookAccessError, colab.TimeoutException):
        os.environ.pop("HF_TOKEN", None)
        colab.secrets["HF_TOKEN"] = refusal
        assert login() == "saved login"
    saved.unlink()
    assert login() == "none"
    colab.secrets.clear()
    assert login() == "none"
    del colab.TimeoutException  # older Colab images lack it
    assert login() == "none"
    assert capfd.readouterr() == ("", "")


def test_a_bad_colab_secret_is_not_shown(hub, monkeypatch, colab):
    colab.secrets["HF_TOKEN"] = f"{TOKEN} x"
    with pytest.raises(AccessError, match="the Colab secret HF_TOKEN") as caught:
        login()
    assert TOKEN not in str(caught.value) and "HF_TOKEN" not in os.environ


def test_asks_only_where_a_person_can_answer(hub, monkeypatch):
    import IPython

    asked = []
    monkeypatch.setattr(module.huggingface_hub, "notebook_login", lambda: asked.append(True))
    monkeypatch.delenv("CI", raising=False)
    shell = types.SimpleNamespace(kernel=types.SimpleNamespace(_allow_stdin=False))  # as nbval runs it
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    assert not can_ask() and login() == "none"
    shell.kernel._allow_stdin = True
    assert can_ask() and login() == "prompt" and asked == [True]
    monkeypatch.setenv("CI", "true")
    assert not can_ask() and login() == "none"
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    monkeypatch.delenv("CI")
    assert not can_ask() and login() == "none" and asked == [True]


def test_a_script_is_never_asked(tmp_path):
    keep = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "CI")}
    code = "from helpers.login import login; print(login())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env={**keep, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.stdout == "none\n", done.stderr


# What is not as it should be: one sentence each, and no token in it.


@pytest.fixture
def saved(hub, tmp_path):
    """Where the saved login lies."""
    path = tmp_path / "cache" / "no-token"
    path.parent.mkdir(exist_ok=True)
    return path


@pytest.mark.parametrize("kind", ["binary", "folder"])
def test_a_saved_login_that_cannot_be_read(hub, saved, caplog, capfd, kind):
    if kind == "folder":
        saved.mkdir()
    else:
        saved.write_bytes(TOKEN.encode() + b"\xff\xfe\x00")
    with pytest.raises(AccessError, match="cannot be read: delete it, then log in again") as caught:
        login()
    assert TOKEN not in repr(caught.value) and caught.value.__cause__ is None
    assert "cannot be read" in refused(caplog, capfd) and not hub.requests


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_without_a_token_asks_for_one(hub, monkeypatch, caplog, capfd, status):
    def refuse(handler):
        handler._refuse(status, "", "no")

    monkeypatch.setattr(hub.server.RequestHandlerClass, "do_GET", refuse)
    monkeypatch.setattr(hub.server.RequestHandlerClass, "do_HEAD", refuse)
    message = refused(caplog, capfd)
    assert f"without a token (error {status})" in message and "settings/tokens" in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "token" in refused(caplog, capfd) and "without a token" not in refused(caplog, capfd)


BODIES = [b"[]", b"null", b"3", b'{"error": 5}', b'{"errors": 7}', b'{"errors": [5]}', b"\xff", b"<html>", b"[" * 5000]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("status", [200, 403, 500])
def test_a_hub_that_answers_something_else(hub, monkeypatch, caplog, capfd, status, body):
    def answer(handler):
        handler._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if handler.command != "HEAD":
            handler.wfile.write(body)

    monkeypatch.setattr(hub.server.RequestHandlerClass, "do_GET", answer)
    monkeypatch.setattr(hub.server.RequestHandlerClass, "do_HEAD", answer)
    refused(caplog, capfd)
    try:
        huggingface_hub.snapshot_download(REPO)
    except module.HUB_ERRORS as error:
        message = module.explain(error, REPO)
        assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("error", [KeyError("sha"), AttributeError("'list' has no 'get'"), TypeError("int")])
def test_an_answer_that_is_not_the_hubs(error):
    assert "is not the Hub's: look at HF_ENDPOINT" in module.explain(error, REPO)


@pytest.mark.parametrize("token", [f"{TOKEN} x", f"{TOKEN}é", TOKEN])
@pytest.mark.parametrize("ask", ["login", "check_token", "check_access"])
def test_a_verbose_traceback_shows_no_token(hub, monkeypatch, token, ask):
    """As `%xmode Verbose` prints it: every function on the way with the variables of its line."""
    from IPython.core.interactiveshell import InteractiveShell

    hub.gate = "gated"
    monkeypatch.setattr(os, "environ", {**os.environ, "HF_TOKEN": token})
    shell = InteractiveShell.instance()
    try:
        {"login": login, "check_token": check_token, "check_access": lambda: check_access(REPO)}[ask]()
    except AccessError as error:
        formatter = shell.InteractiveTB
        formatter.set_mode("Verbose")
        text = "\n".join(formatter.structured_traceback(type(error), error, error.__traceback__.tb_next))
        assert "AccessError" in text and TOKEN[:12] not in text
    else:
        assert token == TOKEN and ask != "check_access"
    finally:
        InteractiveShell.clear_instance()
