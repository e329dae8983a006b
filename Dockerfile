# walferry with the pg_dump, pg_restore and psql that it runs, on a small Debian, as a user without rights. To be built by BuildKit.
#
#   docker build -t walferry --build-arg WALFERRY_COMMIT="$(git rev-parse HEAD)" .
#   docker run --rm walferry check --source postgres://… --target postgres://…
#
# Every image is pinned. Others can be given, from a registry of one's own for example; with POSTGRESQL_MAJOR= the programs of PostgreSQL
# are those that BASE_IMAGE has.
ARG RUST_IMAGE=rust:1.95.0-slim-trixie
ARG BASE_IMAGE=debian:trixie-20260713-slim
# `compiled` from the source, or `prebuilt`: the file `walferry` in the directory that is built from.
ARG PROGRAM=compiled

FROM ${RUST_IMAGE} AS compiled
WORKDIR /build
COPY . .
ARG WALFERRY_COMMIT=""
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    WALFERRY_COMMIT="$WALFERRY_COMMIT" cargo build --release --locked --bin walferry \
    && cp target/release/walferry /walferry \
    && strip /walferry

FROM scratch AS prebuilt
COPY walferry /walferry

FROM ${PROGRAM} AS program

# The newest programs of postgresql.org: they dump from every older server. Debian's own packages hold the key of their repository, so
# nothing is trusted that was only downloaded. Only the three programs, their libraries and the certificates go on.
FROM ${BASE_IMAGE} AS postgresql
ARG POSTGRESQL_MAJOR=18
RUN set -eu; \
    if [ -n "$POSTGRESQL_MAJOR" ]; then \
        export DEBIAN_FRONTEND=noninteractive key=/usr/share/postgresql-common/pgdg/apt.postgresql.org.asc; \
        . /etc/os-release; \
        apt-get update; \
        apt-get install -y --no-install-recommends ca-certificates; \
        (cd /tmp && apt-get download postgresql-common && dpkg-deb --fsys-tarfile postgresql-common_*.deb | tar -x -C / ".$key"); \
        echo "deb [signed-by=$key] https://apt.postgresql.org/pub/repos/apt $VERSION_CODENAME-pgdg main" \
            > /etc/apt/sources.list.d/postgresql.list; \
        apt-get update; \
        apt-get install -y --no-install-recommends "postgresql-client-$POSTGRESQL_MAJOR"; \
    fi; \
    mkdir -p /taken/usr/local/bin /taken/etc/ssl/certs /taken/var/lib/walferry; \
    for program in pg_dump pg_restore psql; do \
        cp "$(ls -d /usr/lib/postgresql/*/bin/$program | sort -V | tail -n 1)" /taken/usr/local/bin/; \
    done; \
    for library in $(ldd /taken/usr/local/bin/* | sed -n 's/.* => \(\/[^ ]*\) .*/\1/p' | sort -u); do \
        place="/taken/usr${library#/usr}"; \
        mkdir -p "$(dirname "$place")"; \
        cp -L "$library" "$place"; \
    done; \
    [ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp /etc/ssl/certs/ca-certificates.crt /taken/etc/ssl/certs/; \
    cp /etc/passwd /etc/group /taken/etc/; \
    echo "walferry:x:10001:10001::/var/lib/walferry:/usr/sbin/nologin" >> /taken/etc/passwd; \
    echo "walferry:x:10001:" >> /taken/etc/group; \
    chown 10001:10001 /taken/var/lib/walferry; \
    chmod 0700 /taken/var/lib/walferry

FROM ${BASE_IMAGE}
ARG WALFERRY_COMMIT=""
LABEL org.opencontainers.image.title="walferry" \
      org.opencontainers.image.description="Moves a live PostgreSQL database to another server: nothing lost, a short cutover, proven." \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.revision="$WALFERRY_COMMIT"
COPY --from=postgresql /taken/ /
COPY --from=program /walferry /usr/local/bin/walferry
ENV WALFERRY_DIR=/var/lib/walferry/state \
    WALFERRY_PG_BIN=/usr/local/bin
USER 10001:10001
WORKDIR /var/lib/walferry
# The queue and the state directory: a migration goes on where it was as long as this is kept.
VOLUME /var/lib/walferry
EXPOSE 9617
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["walferry", "status", "--exit-code"]
ENTRYPOINT ["walferry"]
CMD ["--help"]
