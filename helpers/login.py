"""Hugging Face login for notebooks: find a token without nagging, and say in one sentence what the Hub refused.

Nothing here is needed for Stable Diffusion 1.5 or for the bundled models, which anybody may read. A gated model
(Stable Diffusion 3.5) wants a token. The token itself is never returned, printed or put into an error.
"""

import os
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub import constants, errors

from helpers.loading.machine import HUB

TOKEN_PAGE = "https://huggingface.co/settings/tokens"
UNREADABLE = f"The saved login {{}} cannot be read: delete it, then log in again with a token from {TOKEN_PAGE}."
# What the Hub client raises when an answer is JSON, but not the Hub's.
ODD_ANSWERS = (AttributeError, KeyError, TypeError, RecursionError)
# Everything the Hub client raises. It lets its HTTP library's errors through, and that library differs by version.
HUB_ERRORS = (*errors.HfHubHTTPError.__bases__, OSError, ValueError, *ODD_ANSWERS)


class AccessError(RuntimeError):
    """The Hub did not give us what we asked for; the message is one sentence that says what to do."""


def login() -> str:
    """Find a token and say where it came from: "environment", "Colab secret", "saved login", "prompt" or "none".

    The first that exists wins, in that order; a Colab secret goes into HF_TOKEN of this process, where the Hub client
    looks. "prompt" happens only where a person can answer, so a test run or a CI job never hangs: it gets "none".
    Raises AccessError, without the token, if the token cannot be one (empty, or with spaces or line breaks inside).
    """
    source, problem = _look()
    if problem is not None:
        raise AccessError(problem)
    if source == "none" and can_ask():
        huggingface_hub.notebook_login()
        return "prompt"
    return source


def can_ask() -> bool:
    """True only in a notebook whose front end accepts questions: not in CI, nbval, nbconvert or a plain script."""
    if os.environ.get("CI"):
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    # Every execute request says whether its sender can answer; nbval and nbconvert say no. ipykernel keeps that in a
    # private attribute only; asking it for input to find out would hang where nobody answers.
    return bool(getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False))


def check_token() -> None:
    """Raise AccessError if the token that the Hub client would send cannot be one. No network.

    A token with a space inside makes an illegal HTTP header, and the HTTP client's own error would quote it.
    """
    problem = _hub_token_problem()
    if problem is not None:
        raise AccessError(problem)


def check_access(repo_id: str, filename: str = "model_index.json") -> None:
    """Fetch one small file of a repository, so that a refusal comes before the gigabytes.

    Returns None when `filename` can be read (from the Hub or the cache); raises AccessError, one sentence, otherwise.
    Where the Hub does not answer that is known after `machine.ANSWER_S` seconds; its client would try for a minute.
    """
    check_token()
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(repo_id, filename), str):
            require_hub(repo_id)
        elif not HUB.answers(again=True):
            return
        huggingface_hub.hf_hub_download(repo_id, filename)
    except HUB_ERRORS as error:
        raise AccessError(explain(error, repo_id)) from without_frames(error)


def require_hub(repo_id: str) -> None:
    """Raise AccessError if the Hub does not answer. With HF_HUB_OFFLINE nothing is asked: the client says so itself."""
    if not constants.HF_HUB_OFFLINE and not HUB.answers(again=True):
        raise AccessError(
            f"{repo_id} is not here yet and the Hub does not answer: check the network and run this again."
        )


def without_frames(error: BaseException) -> BaseException:
    """The error without its traceback, and those of all that led to it; to be raised from.

    A notebook's verbose traceback (%xmode Verbose) would show the Hub client's variables, the token among them.
    """
    left, seen = [error], set()
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [one.__cause__, one.__context__]
    return error


def explain(error: BaseException, repo_id: str) -> str:
    """One sentence that says why the Hub client failed on `repo_id` and what to do about it.

    The client often raises a vague error ("check your connection") whose __cause__ holds the truth, so the whole
    chain is looked through, the most telling kind first: GatedRepoError is a RepositoryNotFoundError too.
    """
    page = f"https://huggingface.co/{repo_id}"
    chain = list(_causes(error))

    def find(*kinds: type) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kinds)), None)

    if gated := find(errors.GatedRepoError):
        if _status(gated) == 403:
            return (
                f"{repo_id} is gated and its license is not accepted yet: "
                f"open {page} with the account of your token and accept it."
            )
        return (
            f"{repo_id} is gated and no valid token was sent: accept the license on {page}, "
            f"make a read token on {TOKEN_PAGE} and put it into HF_TOKEN (environment or Colab secret)."
        )
    if find(errors.RepositoryNotFoundError):
        return (
            f"There is no repository {repo_id} on the Hub that this login may see: "
            f"check the name on {page}, and log in if it is private."
        )
    refusal = next((e for e in chain if _status(e)), None)
    status = refusal and _status(refusal)
    if status in (401, 403) and not _sent_token(refusal):
        return (
            f"The Hub, or a proxy on the way, refused {repo_id} without a token (error {status}): "
            f"make a read token on {TOKEN_PAGE} and put it into HF_TOKEN, or try another network."
        )
    if status == 403:
        return (
            f"The token has no right to read {repo_id}: open {TOKEN_PAGE}, edit the token, tick "
            '"Read access to contents of all public gated repos you can access", and run this again.'
        )
    if status == 401:
        return f"The Hub does not know this token: make a new read token on {TOKEN_PAGE} and put it into HF_TOKEN."
    if missing := find(errors.RemoteEntryNotFoundError):
        name = str(missing.response.url).partition("/resolve/")[2].partition("/")[2]
        return f"The file {name} is missing from {repo_id}: look at {page}/tree/main, or choose another model."
    if find(errors.OfflineModeIsEnabled):
        return (
            f"{repo_id} is not in the cache and HF_HUB_OFFLINE is set: "
            "unset it, restart, and run this once with a network."
        )
    if any(isinstance(e, OSError) and e.errno == 28 for e in chain):
        return f"The disk is full while downloading {repo_id}: free some space and run this again."
    if status:
        return (
            f"The Hub answered with error {status} for {repo_id}: "
            "wait a minute and run this again, finished files are kept."
        )
    if find(*ODD_ANSWERS):
        return (
            f"The answer about {repo_id} is not the Hub's: "
            "look at HF_ENDPOINT and at your proxy, then run this again, finished files are kept."
        )
    if find(errors.HFValidationError):
        return "That is not the name of a repository on the Hub: write it as owner/name."
    return (
        f"The connection to the Hub failed or was cut while downloading {repo_id}: "
        "check the network and run this again, finished files are kept."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _sent_token(error: BaseException) -> bool:
    request = getattr(error.response, "request", None)
    return "authorization" in {name.lower() for name in getattr(request, "headers", ())}


# A verbose traceback (%xmode Verbose) shows the variables of the line that raises in every function on the way. So what
# handles a token raises nothing: it returns what is wrong, a sentence without the token, or None.


def _look() -> tuple[str, str | None]:
    """Where the token is (see `login`), and what is wrong with it. A Colab secret is put into HF_TOKEN."""
    if "HF_TOKEN" in os.environ:
        return "environment", _problem(os.environ["HF_TOKEN"], "HF_TOKEN in the environment")
    secret = _colab_secret()
    if secret is not None:
        problem = _problem(secret, "the Colab secret HF_TOKEN")
        if problem is None:
            os.environ["HF_TOKEN"] = secret.strip()
        return "Colab secret", problem
    try:
        saved = huggingface_hub.get_token()
    except HUB_ERRORS:  # a folder, or not text
        return "saved login", UNREADABLE.format(constants.HF_TOKEN_PATH)
    return ("saved login", _problem(saved, "the saved login")) if saved else ("none", None)


def _hub_token_problem() -> str | None:
    """What is wrong with the token that the Hub client would send."""
    try:
        token = huggingface_hub.get_token()
    except HUB_ERRORS:
        return UNREADABLE.format(constants.HF_TOKEN_PATH)
    return _problem(token, "the Hugging Face token (HF_TOKEN, or the saved login)") if token else None


def _colab_secret() -> str | None:
    try:
        from google.colab import userdata
    except ImportError:
        return None
    # A TimeoutException means that nobody clicked "Grant access"; older Colab images lack that class.
    refusals = (userdata.SecretNotFoundError, userdata.NotebookAccessError)
    try:
        return userdata.get("HF_TOKEN")
    except (*refusals, getattr(userdata, "TimeoutException", TimeoutError)):
        return None


def _problem(token: str, where: str) -> str | None:
    """Blank ends are forgiven, as the Hub client does; anything else that cannot go into a header is not."""
    token = token.strip()
    if not token:
        return f"The token in {where} is empty: remove it, or put a token from {TOKEN_PAGE} there."
    if not token.isascii() or not token.isprintable() or any(c.isspace() for c in token):
        return f"The token in {where} holds spaces, line breaks or foreign characters: copy it again from {TOKEN_PAGE}."
    return None
