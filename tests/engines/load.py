#!/usr/bin/env python3
"""Sends a mix of short and long requests through the official OpenAI client and counts exactly what went wrong.

Chats and completions, streamed and not, short prompts, long prompts and prompts that share a prefix, 1 to 32 tokens of
answer; the client's own retries are off. An answer counts as ok only when it is whole: its usage names exactly the
tokens that were asked for. What is not ok is one of two things, because a balancer may re-send only the first:
    failed   nothing of a good answer had reached the client (an error status, a refused or lost connection, a timeout,
             an error as the first event of a stream), or a stream ended as if it were whole and was not
    cut      the answer had begun, and then the client was told that it broke

usage: load.py BASE_URL [--requests 2000] [--concurrency 16] [--seed 1]
Prints `done N` after every 100 requests, and a last line of JSON:
    {"requests", "ok", "failed", "cut", "seconds", "backends": {name: answers}, "errors": [first 20 errors],
     "tokens": {"prompt", "completion", "cached"}}       as the answers that were ok reported them
The exit code is 0 whatever was counted: judging is the caller's part.
"""

import argparse
import asyncio
import collections
import contextvars
import json
import random
import time

import httpx
import openai

WORDS = (
    "the request queue balances every token of a batch before the cache answers each stream of the server and its "
    "prefix with one more question about weight latency and retry naïve 東京 🚢"
).split()
PREFIXES = 8

# Whether the head of a good answer has arrived for the request that the current task is making.
begun = contextvars.ContextVar("begun", default=False)


class Unfinished(Exception):
    """An answer that ended like a whole one without being whole."""


def words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def make_requests(count, seed):
    """The mix: the same for the same seed."""
    rng = random.Random(seed)
    shared = [words(rng, 250) for _ in range(PREFIXES)]
    for number in range(count):
        kind = rng.random()
        if kind < 0.05:
            prompt = words(rng, rng.randint(300, 900))
        elif kind < 0.30:
            prompt = f"{rng.choice(shared)} {number}"
        else:
            prompt = f"{number} " + words(rng, rng.randint(1, 40))
        yield {
            "prompt": prompt,
            "chat": rng.random() < 0.75,
            "stream": rng.random() < 0.5,
            "tokens": rng.randint(1, 32),
        }


async def send(client, request):
    """Makes one request; returns the backend's name and the usage, or raises what the client raised."""
    arguments = {"model": "tiny", "max_tokens": request["tokens"], "extra_body": {"ignore_eos": True}}
    if request["chat"]:
        endpoint = client.chat.completions
        arguments["messages"] = [{"role": "user", "content": request["prompt"]}]
    else:
        endpoint = client.completions
        arguments["prompt"] = request["prompt"]
    if request["stream"]:
        arguments |= {"stream": True, "stream_options": {"include_usage": True}}
    begun.set(False)
    raw = await endpoint.with_raw_response.create(**arguments)
    answer = raw.parse()
    usage = None
    if request["stream"]:
        begun.set(False)  # a head says nothing yet: the balancer may still try elsewhere until the first event
        async for event in answer:
            begun.set(True)
            usage = event.usage or usage
    else:
        usage = answer.usage
    if usage is None or usage.completion_tokens != request["tokens"]:
        raise Unfinished(f"usage {usage} for {request['tokens']} tokens")
    return raw.headers.get("x-plimsoll-backend", ""), usage


async def note_good_head(response):
    if response.status_code < 400:
        begun.set(True)


async def run(given):
    todo = make_requests(given.requests, given.seed)
    counts, backends, tokens, errors = collections.Counter(), collections.Counter(), collections.Counter(), []
    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note_good_head]})
    async with openai.AsyncOpenAI(
        base_url=given.base_url, api_key="unused", max_retries=0, timeout=60, http_client=http
    ) as client:

        async def one_client():
            for request in todo:
                try:
                    backend, usage = await send(client, request)
                    counts["ok"] += 1
                    backends[backend] += 1
                    tokens["prompt"] += usage.prompt_tokens
                    tokens["completion"] += usage.completion_tokens
                    tokens["cached"] += usage.prompt_tokens_details.cached_tokens
                except (openai.OpenAIError, httpx.HTTPError, Unfinished) as error:
                    outcome = "cut" if begun.get() and not isinstance(error, Unfinished) else "failed"
                    counts[outcome] += 1
                    shown = {key: request[key] for key in ("chat", "stream", "tokens")}
                    errors.append({"outcome": outcome, "error": f"{error!r} from {error.__cause__!r}"[:400]} | shown)
                counts["done"] += 1
                if counts["done"] % 100 == 0:
                    print("done", counts["done"], flush=True)

        start = time.monotonic()
        await asyncio.gather(*(one_client() for _ in range(given.concurrency)))
        seconds = time.monotonic() - start
    result = {
        "requests": counts["done"],
        "ok": counts["ok"],
        "failed": counts["failed"],
        "cut": counts["cut"],
        "seconds": round(seconds, 1),
        "backends": backends,
        "tokens": tokens,
        "errors": errors[:20],
    }
    print(json.dumps(result))


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("base_url")
    arguments.add_argument("--requests", type=int, default=2000)
    arguments.add_argument("--concurrency", type=int, default=16)
    arguments.add_argument("--seed", type=int, default=1)
    asyncio.run(run(arguments.parse_args()))


if __name__ == "__main__":
    main()
