#!/usr/bin/env python3
"""Runs NVIDIA's aiperf, a client with its own HTTP stack, and reads from its result file how many requests failed.

aiperf reuses connections eagerly: straight against llama.cpp, which closes them after every streamed answer without
saying so, it loses 2 to 10 % of its requests. Behind the balancer it must lose none.

usage: aiperf_load.py BASE_URL DIR [--requests 400]      DIR is where setup.sh installed to
Prints a last line of JSON: {"requests", "ok", "failed", "seconds", "errors": [...]}; exit code 1 without a result.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.parse


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("base_url")
    arguments.add_argument("dir", type=pathlib.Path)
    arguments.add_argument("--requests", type=int, default=400)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as out:
        command = [given.dir / "venv/bin/aiperf", "profile", "-m", "tiny"]
        command += ["--url", urllib.parse.urlsplit(given.base_url).netloc, "--endpoint-type", "chat", "--streaming"]
        command += ["--tokenizer", "./tiny", "--isl", "128", "--osl", "16", "--extra-inputs", "ignore_eos:true"]
        command += ["--concurrency", "8", "--request-count", str(given.requests), "--random-seed", "1"]
        command += ["--ui", "none", "--artifact-dir", out]
        # With this variable aiperf refuses a tokenizer that lies in a folder.
        surroundings = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        run = subprocess.run(
            command, cwd=given.dir, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        result = pathlib.Path(out) / "profile_export_aiperf.json"
        if not result.exists():
            sys.exit(f"aiperf ended with {run.returncode} and without a result:\n{run.stdout[-4000:]}")
        found = json.loads(result.read_text())

    def number(name):
        return (found.get(name) or {}).get("avg", 0)

    errors = [f"{e['count']} x {e['error_details']['message']}" for e in found.get("error_summary") or []]
    ok = int(number("request_count"))
    print(
        json.dumps(
            {
                "requests": given.requests,
                "ok": ok,
                "failed": given.requests - ok,
                "seconds": round(number("benchmark_duration"), 1),
                "errors": errors,
            }
        )
    )


if __name__ == "__main__":
    main()
