"""Colab's secrets. A test puts into `secrets`, under the secret's name, its value or the error that `get` raises."""

from google.colab import errors

secrets: dict[str, str | type[Exception]] = {}


class NotebookAccessError(Exception):  # not an errors.Error, in the real module neither
    """The person has the secret and refused it to this notebook."""

    def __init__(self, key: str):
        super().__init__(f"Notebook does not have access to secret {key}")


class SecretNotFoundError(errors.Error):
    """There is no secret of that name."""

    def __init__(self, key: str):
        super().__init__(f"Secret {key} does not exist.")


class TimeoutException(errors.Error):  # noqa: N818 (its real name)
    """Nobody answered, or nobody is there: after 10 seconds, in the real module."""

    def __init__(self, key: str):
        super().__init__(
            f"Requesting secret {key} timed out. Secrets can only be fetched when running from the Colab UI."
        )


def get(key: str) -> str:
    """The secret's value; raises one of the three errors above."""
    answer = secrets.get(key, SecretNotFoundError)
    if isinstance(answer, str):
        return answer
    raise answer(key)
