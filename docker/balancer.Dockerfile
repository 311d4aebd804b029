ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY balancer/requirements.lock balancer/requirements-tracing.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --quiet --root-user-action=ignore --prefix=/install --ignore-installed --no-deps --require-hashes \
        -r requirements.lock -r requirements-tracing.lock
COPY balancer /opt/groundserve/balancer
# The root file system is read-only at run time, so Python cannot compile anything later.
RUN python3 -m compileall -q /opt/groundserve/balancer

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="groundserve balancer" \
      org.opencontainers.image.description="One endpoint in front of SGLang replicas" \
      org.opencontainers.image.version="0.2.0.dev0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /install/lib /usr/local/lib
COPY docker/healthcheck.py /opt/groundserve/
COPY --from=build /opt/groundserve/balancer /opt/groundserve/balancer
# A new volume takes its owner from here.
RUN install --directory --owner=1000 --group=1000 --mode=700 /state
WORKDIR /opt/groundserve
ENV BALANCER_LISTEN=0.0.0.0:30001 \
    BALANCER_ADMIN=0.0.0.0:30002 \
    PYTHONUNBUFFERED=1
USER 1000:1000
EXPOSE 30001 30002
# /ready on the admin port, which speaks plain HTTP even if the endpoint uses TLS.
HEALTHCHECK --interval=5s --timeout=5s --retries=3 \
    CMD ["python3", "-I", "-S", "/opt/groundserve/healthcheck.py", "30002", "/ready"]
ENTRYPOINT ["python3", "-m", "balancer"]
