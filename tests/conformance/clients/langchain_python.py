"""LangChain in Python: its class for language models on Replicate, which is built on the official client 1."""

# /// client
# title = "LangChain, Python"
# packages = ["langchain-community==0.4.2", "replicate==1.0.7"]
# ///

import os

from flows import ACCESS_TOKEN, API_URL, NARRATION, creates, flow, grew, raised, run, stream_reader, unique

# docs:point
os.environ["REPLICATE_API_TOKEN"] = ACCESS_TOKEN
os.environ["REPLICATE_BASE_URL"] = API_URL.removesuffix("/v1")
# docs:end

# The clients of a process are made of these variables, so they are set before.
import replicate
from langchain_community.llms import Replicate
from langchain_core.callbacks import BaseCallbackHandler
from replicate.exceptions import ReplicateError


class Heard(BaseCallbackHandler):
    def __init__(self):
        self.tokens = []

    def on_llm_new_token(self, token, **_):
        self.tokens.append(token)


def storyteller(**more):
    return Replicate(model="local/storyteller", model_kwargs={"max_tokens": 12}, **more)


def narrator():
    settings = {name: value for name, value in NARRATION.items() if name != "prompt"}
    return Replicate(model="local/narrator", model_kwargs=settings)


@flow
def run_text():
    assert len(storyteller().invoke("a fox").split()) == 12


@flow
def run_by_version():
    version = replicate.models.get("local/storyteller").latest_version.id
    told = Replicate(model=f"local/storyteller:{version}", model_kwargs={"max_tokens": 5}).invoke("a fox")
    assert len(told.split()) == 5


@flow
def run_failed():
    crasher = Replicate(model="local/crasher", prompt_key="message")
    assert "no paint" in str(raised(RuntimeError, crasher.invoke, "no paint"))


@flow
def no_output_yet():
    # It creates without waiting, and looks at a prediction that has no output for some seconds.
    assert len(narrator().invoke("a fox").split()) == 10


@flow
def stream():
    heard = Heard()
    assert len("".join(storyteller().stream("a fox", config={"callbacks": [heard]})).split()) == 12
    assert len("".join(heard.tokens).split()) == 12
    return "polls this stack"


@flow
def stream_token():
    told = stream_reader(lambda: list(storyteller().stream("a fox")))
    assert told is None, told
    return "does not connect to it"


@flow
def idempotency_key():
    # Whatever is given to a call becomes input of the model: there is no way to a header.
    prompt = unique()
    for _ in range(2):
        storyteller().invoke(prompt)
    assert len(creates(prompt)) == 2
    return "no way to send one: each call is a prediction"


@flow
def error_not_found():
    assert raised(ReplicateError, Replicate(model="local/unknown").invoke, "a fox").status == 404


@flow
def error_invalid_input():
    error = raised(ReplicateError, Replicate(model="local/storyteller", model_kwargs={"max_tokens": 0}).invoke, "a fox")
    assert (error.status, "input.max_tokens" in error.detail) == (422, True)


@flow
def live_output():
    assert len(grew(narrator().stream("a fox")).split()) == 10
    heard = Heard()
    assert (
        len(
            grew(
                token for _ in narrator().stream("a fox", config={"callbacks": [heard]}) for token in heard.tokens[-1:]
            ).split()
        )
        == 10
    )


run()
