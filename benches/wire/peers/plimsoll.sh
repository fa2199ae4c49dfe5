# Plimsoll: one thread, the default policy. The configuration beside this says what is on.
cd "$(dirname "$0")/../../../target/wire" || exit
case $1 in
version) "${PLIMSOLL_BIN:-../release/plimsoll}" --version ;;
start) exec $WIRE_BELOW "$PLIMSOLL_BIN" run --config "../../benches/wire/peers/plimsoll${WIRE_BELOW:+-quiet}.yaml" ;;
tls) echo 7701 ;;
esac
