# HAProxy of Debian: one thread, round robin. The configuration beside this says what was chosen and why.
cd "$(dirname "$0")/../../../target/wire" || exit
case $1 in
version) haproxy -v | head -n 1 | sed 's/ - .*//' ;;
start) exec haproxy -db -f ../../benches/wire/peers/haproxy.cfg ;;
tls) echo 7701 ;;
esac
