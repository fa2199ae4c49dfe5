# Bare Pingora: round robin and nothing else (benches/wire/pingora.rs), in the bench's own binary, so that it is built as
# Plimsoll is. One thread, Pingora's defaults, no log, no metrics, no checks: what the framework itself costs.
cd "$(dirname "$0")/../../../target/wire" || exit
case $1 in
version) sed -n '/^name = "pingora-proxy"/{n;s/version = "\(.*\)"/pingora \1, bare/p}' ../../Cargo.lock ;;
start) exec $WIRE_BELOW "$WIRE_BENCH" --bare-pingora ;;
tls) echo 7701 ;;
esac
