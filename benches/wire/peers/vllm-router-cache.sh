# vllm-router from PyPI, cache-aware, which is its default; otherwise as beside this.
POLICY=cache_aware exec sh "$(dirname "$0")/vllm-router.sh" "$@"
