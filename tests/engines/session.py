#!/usr/bin/env python3
"""Walks through what an application does with the official OpenAI client, and checks every answer.

The client is the judge: it parses the answers, raises its own error classes and closes streams as applications do.
Where the text itself matters, the engine is given a grammar that leaves it one answer.

usage: session.py BASE_URL [--direct]
    BASE_URL   such as http://127.0.0.1:8080/v1, serving the models `tiny` and `slow`
    --direct   BASE_URL is an engine serving `tiny`: skips what only the balancer does; for finding out whose fault
Prints one line per check and a last line of JSON, `{"checks": N, "failed": [...]}`; exit code 1 when one failed.
"""

import argparse
import json
import sys
import time
import traceback

import openai

UNICODE = "Bon voyage à 東京 🚢 — naïve Ωμέγα"
BACKEND = "x-plimsoll-backend"
CHECKS = []


def check(function):
    """Registers a check; `direct=False` marks those that only hold behind the balancer."""
    CHECKS.append((function, True))
    return function


def balancer_check(function):
    """Registers a check of something an engine alone does not do."""
    CHECKS.append((function, False))
    return function


def ask(text, **more):
    """Arguments of a short chat whose length does not depend on what the model says."""
    extra = {"ignore_eos": True} | more.pop("extra_body", {})
    arguments = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    return arguments | more | {"extra_body": extra}


def only(text):
    """The engine's option that makes `text` the one possible answer."""
    return {"ignore_eos": False, "grammar": f'root ::= "{text}"'}


def equal(got, wanted, what):
    assert got == wanted, f"{what}: {got!r} instead of {wanted!r}"


def raises(kind, call):
    """The error of the given class that `call` raises."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


@check
def the_models_are_listed(client, direct):
    names = {model.id for model in client.models.list()}
    equal(names, {"tiny"} if direct else {"tiny", "slow"}, "models")


@check
def a_chat_is_answered(client, direct):
    answer = client.chat.completions.create(**ask("what is a batch"))
    assert answer.choices[0].message.content, "empty answer"
    equal(answer.choices[0].finish_reason, "length", "finish_reason")
    equal(answer.usage.completion_tokens, 8, "completion_tokens")


@check
def a_streamed_chat_ends_with_its_usage(client, direct):
    stream = client.chat.completions.create(
        **ask("what is a stream", max_tokens=24), stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    with_text = [e for e in events if e.choices and e.choices[0].delta.content]
    assert len(with_text) > 12, f"only {len(with_text)} events with text for 24 tokens"
    equal([e.usage.completion_tokens for e in events if e.usage], [24], "usage")
    equal(events[-1].choices, [], "choices of the last event")


@check
def a_completion_is_answered(client, direct):
    answer = client.completions.create(
        model="tiny", prompt="the token batch", max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text, "empty answer"
    equal(answer.usage.completion_tokens, 8, "completion_tokens")


@check
def a_streamed_completion_is_answered(client, direct):
    stream = client.completions.create(
        model="tiny",
        prompt="the token batch",
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    usage = [event.usage.completion_tokens for event in stream if event.usage]
    equal(usage[-1:], [8], "usage")


@check
def the_responses_api_is_answered(client, direct):
    answer = client.responses.create(model="tiny", input="what is a token", max_output_tokens=8)
    equal(answer.status, "completed", "status")
    assert answer.output_text, "empty answer"


@check
def the_responses_api_streams(client, direct):
    stream = client.responses.create(model="tiny", input="what is a token", max_output_tokens=8, stream=True)
    kinds = [event.type for event in stream]
    equal((kinds[0], kinds[-1]), ("response.created", "response.completed"), "first and last event")


@check
def several_choices_are_answered(client, direct):
    answer = client.chat.completions.create(**ask("choose", n=2, max_tokens=4))
    equal(len(answer.choices), 2, "choices")


@check
def unicode_survives_both_ways(client, direct):
    answer = client.chat.completions.create(**ask(UNICODE, max_tokens=100, extra_body=only(UNICODE)))
    equal(answer.choices[0].message.content, UNICODE, "answer")


@check
def unicode_survives_a_stream(client, direct):
    stream = client.chat.completions.create(**ask(UNICODE, max_tokens=100, extra_body=only(UNICODE)), stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in stream if event.choices)
    equal(text, UNICODE, "answer")


@check
def bad_requests_keep_the_answer_of_the_engine(client, direct):
    chat = client.chat.completions.create
    bare = {"model": "tiny"}
    without = raises(openai.BadRequestError, lambda: client.post("/chat/completions", body=bare, cast_to=object))
    assert "'messages' is required" in without.message, without.message
    wrong = raises(openai.BadRequestError, lambda: chat(**ask("x", max_tokens="ten")))
    assert "must be number" in wrong.message, wrong.message
    for stream in (False, True):
        long = raises(openai.BadRequestError, lambda: chat(**ask("token batch queue " * 6000), stream=stream))
        equal(long.body["type"], "exceed_context_size_error", "type")


@check
def an_unknown_path_keeps_the_answer_of_the_engine(client, direct):
    error = raises(openai.NotFoundError, lambda: client.post("/nothing", body={"model": "tiny"}, cast_to=object))
    equal(error.body["type"], "not_found_error", "type")


@check
def what_the_engine_cannot_do_keeps_its_answer(client, direct):
    error = raises(openai.InternalServerError, lambda: client.embeddings.create(model="tiny", input="x"))
    equal((error.status_code, error.body["type"]), (501, "not_supported_error"), "status and type")


@balancer_check
def an_unknown_model_is_not_found(client, direct):
    error = raises(openai.NotFoundError, lambda: client.chat.completions.create(**ask("x", model="nobody")))
    equal(error.code, "model_not_found", "code")


@balancer_check
def the_model_chooses_the_upstream(client, direct):
    tiny = client.chat.completions.with_raw_response.create(**ask("x"))
    slow = client.chat.completions.with_raw_response.create(**ask("x", model="slow"))
    equal((tiny.parse().model, slow.parse().model), ("tiny", "slow"), "models")
    assert tiny.headers[BACKEND] != slow.headers[BACKEND], "one backend answered for both models"


@balancer_check
def every_answer_names_its_backend_and_request(client, direct):
    raw = client.chat.completions.with_raw_response
    assert raw.create(**ask("x")).headers["x-request-id"], "no request id was made"
    named = raw.create(**ask("x"), extra_headers={"x-request-id": "session-7"})
    equal(named.headers["x-request-id"], "session-7", "x-request-id")
    with client.chat.completions.with_streaming_response.create(**ask("x"), stream=True) as streamed:
        assert streamed.headers[BACKEND], "a stream does not name its backend"
    error = raises(openai.BadRequestError, lambda: client.chat.completions.create(**ask("x", max_tokens="ten")))
    assert error.response.headers[BACKEND], "an engine's error does not name its backend"


@balancer_check
def a_shared_prefix_goes_where_it_is_cached(client, direct):
    backends = {}
    for turn in range(5):
        for number in range(3):
            prefix = f"tenant {number}: " + f"rule {number} of the request queue explains the cache; " * 60
            raw = client.chat.completions.with_raw_response.create(**ask(f"{prefix} question {turn}", max_tokens=2))
            usage = raw.parse().usage
            cached, prompt = usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens
            assert prompt > 600, f"a prompt of only {prompt} tokens"
            first = backends.setdefault(number, raw.headers[BACKEND])
            equal(raw.headers[BACKEND], first, f"backend of tenant {number} in turn {turn}")
            assert turn == 0 or cached > 0.9 * prompt, f"{cached} of {prompt} tokens cached in turn {turn}"


@check
def an_early_close_of_a_stream_leaves_a_working_client(client, direct):
    model = "tiny" if direct else "slow"
    start = time.monotonic()
    for _ in range(6):
        with client.chat.completions.create(**ask("tell me all", model=model, max_tokens=3000), stream=True) as stream:
            for _, event in zip(range(3), stream):
                equal(event.model, model, "model")
    # The engine has 4 slots, and 3,000 tokens of `slow` take 20 s or more: all this is quick only if slots were freed.
    client.chat.completions.create(**ask("and now", model=model, max_tokens=2))
    assert time.monotonic() - start < 15, "the engine is still busy with the streams that were closed"


@check
def a_client_that_gives_up_waiting_leaves_a_working_client(client, direct):
    model = "tiny" if direct else "slow"
    hasty = client.with_options(timeout=0.3)
    raises(openai.APITimeoutError, lambda: hasty.chat.completions.create(**ask("x", model=model, max_tokens=3000)))
    client.chat.completions.create(**ask("and now", model=model, max_tokens=2))


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("base_url")
    arguments.add_argument("--direct", action="store_true")
    given = arguments.parse_args()
    client = openai.OpenAI(base_url=given.base_url, api_key="unused", max_retries=0, timeout=30)
    failed, count = [], 0
    for function, holds_directly in CHECKS:
        if given.direct and not holds_directly:
            continue
        count += 1
        start = time.monotonic()
        try:
            function(client, given.direct)
            outcome = "ok"
        except Exception:  # noqa: BLE001  whatever it is, the other checks still run
            failed.append(function.__name__)
            outcome = "FAILED\n" + traceback.format_exc()
        print(f"{function.__name__}: {time.monotonic() - start:.2f} s {outcome}", flush=True)
    print(json.dumps({"checks": count, "failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
