"""LiteLLM: chat completions on Replicate. Its host is fixed in the code, whatever `api_base` says."""

# /// client
# title = "LiteLLM"
# packages = ["litellm==1.110.2"]
# ///

import asyncio
import contextlib
import os

from flows import ACCESS_TOKEN, API_URL, NARRATION, creates, flow, grew, raised, record, run, stream_reader, unique

# It fetches a list of prices otherwise, and a tokenizer.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}
os.environ["REPLICATE_API_KEY"] = ACCESS_TOKEN

import litellm
from litellm.exceptions import AuthenticationError, UnprocessableEntityError

litellm.disable_hf_tokenizer_download = True
# docs:point
from litellm.llms.replicate.chat.handler import replicate_config

replicate_config.get_complete_url = lambda *, model, **_: f"{API_URL}/models/{model}/predictions"
# docs:end


def told(model="local/storyteller", prompt="a fox", **more):
    messages = [{"role": "user", "content": prompt}]
    return litellm.completion(model=f"replicate/{model}", messages=messages, **more)


def narrated(**more):
    settings = {name: value for name, value in NARRATION.items() if name != "prompt"}
    return told("local/narrator", **settings, **more)


def text(answer):
    return answer.choices[0].message.content


def pieces(answer):
    return (part.choices[0].delta.content for part in answer if part.choices[0].delta.content)


@flow
def run_text():
    assert len(text(told()).split()) == 24
    assert len(text(asyncio.run(litellm.acompletion(
        model="replicate/local/storyteller", messages=[{"role": "user", "content": "a fox"}]
    ))).split()) == 24  # fmt: skip


@flow
def run_failed():
    error = raised(UnprocessableEntityError, told, "local/crasher")
    assert "ran out of paint" in str(error), error


@flow
def no_output_yet():
    assert len(text(narrated()).split()) == 10


@flow
def stream():
    # It reads the prediction for the first time before the model has said a word.
    try:
        assert len("".join(pieces(narrated(stream=True))).split()) == 10
    except UnprocessableEntityError as error:
        assert "Got=None" in str(error), error  # noqa: PT017 - the page shows which of both it is
        return "fails: refuses an `output` that is null, which the stack shows before the first output"
    return "polls this stack"


@flow
def stream_token():
    def streamed():
        with contextlib.suppress(UnprocessableEntityError):  # see `stream`
            list(told(stream=True))

    told_ = stream_reader(streamed)
    assert told_ is None, told_
    return "does not connect to it"


@flow
def idempotency_key():
    prompt = unique()
    for _ in range(2):
        told(prompt=prompt, extra_headers={"Idempotency-Key": prompt})
    assert len(creates(prompt)) == 2
    again = unique()
    key = again
    try:
        # docs:key
        headers = {"Authorization": f"Bearer {ACCESS_TOKEN}", "Idempotency-Key": key}
        replicate_config.validate_environment = lambda **_: headers
        # docs:end
        for _ in range(2):
            told(prompt=again)
    finally:
        del replicate_config.validate_environment
    assert len(creates(again)) == 1
    return "drops `extra_headers`; works with an override"


@flow
def error_unauthorized():
    before = len(record())
    raised(AuthenticationError, told, api_key="nobody")
    assert len(record()) == before


@flow
def error_invalid_input():
    error = raised(UnprocessableEntityError, told, delay_seconds=-1)
    assert "delay_seconds" in str(error), error


@flow
def live_output():
    assert len(grew(pieces(narrated(stream=True))).split()) == 10


run()
