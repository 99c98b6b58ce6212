"""What this week's GPU quota has left, in one line, whether or not Kaggle can be asked."""

import io
from contextlib import redirect_stdout
from threading import Thread

from kernel.inputs import InputError, shorten
from local.publishing.credentials import find_credentials

PATIENCE = 15.0  # seconds after which a list is printed without the quota


def describe_quota() -> str:
    """The line. Without credentials, or if Kaggle does not answer in time, it says why the quota is unknown."""
    answers: list[str] = []

    def ask() -> None:
        try:
            credentials = find_credentials()
            # Kaggle's client takes a second to import, and signs in then.
            from local.publishing.client import Kaggle

            quota = Kaggle(credentials.source, attempts=1).gpu_quota()
            answers.append(str(quota) if quota else "unknown: Kaggle does not say")
        except InputError as error:
            answers.append(f"unknown: {error}")
        except Exception as error:  # of the client: a list of submissions must not end with it
            answers.append(f"unknown: {type(error).__name__}: {shorten(error)}")

    # In a thread, because a connection may be neither refused nor answered for minutes.
    thread = Thread(target=ask, daemon=True)
    with redirect_stdout(io.StringIO()):  # the client prints advice of its own
        thread.start()
        thread.join(PATIENCE)
    return f"GPU quota: {answers[0] if answers else f'unknown: Kaggle did not answer within {PATIENCE:.0f} s'}"
