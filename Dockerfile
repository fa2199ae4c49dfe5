# The image: the program, a C library and certificates; no shell, no root.
#
#   docker build -t plimsoll .
#   docker run -p 8080:8080 -v ./plimsoll.yaml:/etc/plimsoll/plimsoll.yaml:ro --stop-timeout 960 plimsoll

FROM rust:1.90-slim-bookworm AS build
# Pingora builds zlib-ng. No versions: those of bookworm are the fixed ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential cmake \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# Line numbers are for whoever debugs; names stay, for the backtraces of the rest of us.
RUN cargo build --locked --release --bin plimsoll \
    && strip --strip-debug target/release/plimsoll

FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="plimsoll" \
      org.opencontainers.image.description="A programmable load balancer for LLM inference servers" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /src/target/release/plimsoll /usr/bin/plimsoll
COPY conf/ /usr/share/plimsoll/
EXPOSE 8080
# Drains: give it `server.drain_timeout` (15m), where Docker gives 10 s.
STOPSIGNAL SIGTERM
# No HEALTHCHECK: what restarts containers asks /livez and /readyz itself, and Docker only notes the answer.
ENTRYPOINT ["/usr/bin/plimsoll"]
CMD ["run", "--config", "/etc/plimsoll/plimsoll.yaml"]
