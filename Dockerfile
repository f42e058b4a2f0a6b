# feedfast in a container, by README's own line. A slim Python suffices: torch's wheels bring CUDA, and the host gives the
# driver. Build: `docker build -t feedfast .`; run: docs/install.md.
FROM python:3.12-slim

# What NVIDIA's container runtime looks for in images that are not NVIDIA's.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# Triton compiles the launcher of each kernel when it first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY feedfast feedfast
COPY kernels kernels
# hadolint ignore=DL3013
RUN pip install '.[cuda13]'

# By number, so that Kubernetes' runAsNonRoot can tell.
RUN useradd --create-home --uid 1000 feedfast && mkdir /work && chown feedfast /work
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["feedfast"]
CMD ["--help"]
