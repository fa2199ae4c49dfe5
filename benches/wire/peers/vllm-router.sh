# vllm-router from PyPI, round robin unless the script beside it says otherwise;
# the rest as it is by default: log at info, metrics, retries, checks.
# It is one thread because it may only use one CPU. It offers no TLS to clients.
cd "$(dirname "$0")/../../../target/wire" || exit
bin=venv/vllm-router/bin
engines="http://127.0.0.1:7711 http://127.0.0.1:7712 http://127.0.0.1:7713 http://127.0.0.1:7714"
case $1 in
version) $bin/pip list --disable-pip-version-check 2>/dev/null | sed -n 's/^vllm-router  *\(.*\)/vllm-router \1/p' | grep . ;;
start)
    # shellcheck disable=SC2086
    exec $bin/vllm-router --worker-urls $engines --policy ${POLICY:-round_robin} --host 127.0.0.1 \
        --prometheus-host 127.0.0.1 --prometheus-port 7703 --port 7700
    ;;
tls) exit 1 ;;
esac
