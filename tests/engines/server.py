#!/usr/bin/env python3
"""Runs llama.cpp's own HTTP server, as the `xllamacpp` wheel carries it, in the foreground.

It is the same server code as `llama-server`: 503 while the model loads, continuous batching in 4 slots, prompt cache
per slot, `/health`, `/metrics`, and connections that are closed after every streamed answer. Prints `listening URL`
when the port answers; killing the process kills the engine.

usage: server.py MODEL.gguf PORT NAME      NAME is the model's name in /v1/models
"""

import sys
import threading

import xllamacpp

SLOTS = 4
CONTEXT = 4096  # tokens per slot


def main():
    model, port, name = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = int(port)
    params.model_alias = [name] if isinstance(params.model_alias, list) else {name}
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * CONTEXT
    params.cont_batching = True
    params.endpoint_metrics = True
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print("listening", server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
