"""LlamaIndex: its class for language models on Replicate, which is built on the official client 1."""

# /// client
# title = "LlamaIndex"
# packages = ["llama-index-llms-replicate==0.7.0", "replicate==1.0.7"]
# ///

import os

from flows import ACCESS_TOKEN, API_URL, NARRATION, creates, flow, grew, raised, run, stream_reader, unique

# docs:point
os.environ["REPLICATE_API_TOKEN"] = ACCESS_TOKEN
os.environ["REPLICATE_BASE_URL"] = API_URL.removesuffix("/v1")
# docs:end

from llama_index.core.llms import ChatMessage
from llama_index.llms.replicate import Replicate
from replicate.exceptions import ReplicateError


def storyteller(**more):
    return Replicate(model="local/storyteller", additional_kwargs={"max_tokens": 12, **more})


def narrator():
    settings = {name: value for name, value in NARRATION.items() if name != "prompt"}
    return Replicate(model="local/narrator", additional_kwargs=settings)


@flow
def run_text():
    assert len(storyteller().complete("a fox").text.split()) == 12
    assert len(storyteller().chat([ChatMessage(content="a fox")]).message.content.split()) == 12


@flow
def run_failed():
    # It always streams, and no model of the stand-in both streams and fails.
    error = raised(ReplicateError, Replicate(model="local/crasher", prompt_key="message").complete, "no paint")
    assert "does not support streaming" in str(error), error
    return "not tried: runs only models that stream"


@flow
def no_output_yet():
    assert len(narrator().complete("a fox").text.split()) == 10


@flow
def stream():
    pieces = [piece.delta for piece in storyteller().stream_complete("a fox")]
    assert len("".join(pieces).split()) == 12
    assert len(grew(piece.delta for piece in narrator().stream_complete("a fox")).split()) == 10
    return "from Replicate's own address, not through the stack"


@flow
def stream_token():
    told = stream_reader(lambda: storyteller().complete("a fox"))
    assert told == "wrong", told
    return "sends it the stack's access token"


@flow
def idempotency_key():
    # Whatever is given to a call becomes input of the model: there is no way to a header.
    prompt = unique()
    for _ in range(2):
        storyteller().complete(prompt)
    assert len(creates(f"{prompt}")) == 2
    return "no way to send one: each call is a prediction"


@flow
def error_not_found():
    assert raised(ReplicateError, Replicate(model="local/unknown").complete, "a fox").status == 404


@flow
def error_invalid_input():
    error = raised(ReplicateError, storyteller(max_tokens=0).complete, "a fox")
    assert (error.status, "input.max_tokens" in error.detail) == (422, True)


run()
