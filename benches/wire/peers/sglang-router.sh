# sglang-router from PyPI, round robin unless the script beside it says otherwise;
# the rest as it is by default: log at info, metrics, retries, checks.
# It is one thread because it may only use one CPU.
cd "$(dirname "$0")/../../../target/wire" || exit
bin=venv/sglang-router/bin
engines="http://127.0.0.1:7711 http://127.0.0.1:7712 http://127.0.0.1:7713 http://127.0.0.1:7714"
case $1 in
version) $bin/pip list --disable-pip-version-check 2>/dev/null | sed -n 's/^sglang-router  *\(.*\)/sglang-router \1/p' | grep . ;;
start)
    # One listener, with TLS or without; over TLS it offers HTTP/2.
    [ -n "$WIRE_TLS" ] && tls="--port 7701 --tls-cert-path certificate.pem --tls-key-path key.pem"
    # shellcheck disable=SC2086
    exec $bin/sglang-router launch --worker-urls $engines --policy ${POLICY:-round_robin} --host 127.0.0.1 \
        --prometheus-host 127.0.0.1 --prometheus-port 7703 ${tls:---port 7700}
    ;;
tls) echo 7701 ;;
esac
