# nginx of Debian: one worker process, round robin. The configuration beside this says what was chosen and why.
cd "$(dirname "$0")/../../../target/wire" || exit
case $1 in
version) nginx -v 2>&1 | sed 's|.*nginx/|nginx |' ;;
start) exec nginx -p . -e stderr -c ../../benches/wire/peers/nginx.conf ;;
tls) echo 7701 ;;
esac
