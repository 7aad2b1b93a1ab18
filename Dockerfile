# syntax=docker/dockerfile:1
# s2ft serve, by default; any other command of s2ft after the image's name. As a user without rights, in /work.
#
#   docker build --target cpu --tag s2ft:cpu .
#   docker build --target cuda --tag s2ft:cuda .
#   docker run --rm -p 8000:8000 -e S2FT_KEYS=a-key-of-yours s2ft:cpu
#   docker run --rm --gpus all -v "$PWD:/work" s2ft:cuda train --config run.yaml

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --home-dir /work --uid 1000 s2ft
COPY constraints.txt /constraints.txt

# torch for CPUs alone, a tenth of the size
FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --constraint /constraints.txt --index-url "$TORCH_INDEX" torch \
    && pip install --constraint /constraints.txt "$(echo /wheels/s2ft-*.whl)[serve,gguf]"
USER 1000:1000
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["s2ft"]
CMD ["serve", "--host", "0.0.0.0"]

# torch as PyPI has it for Linux, which brings CUDA's libraries; the host has the driver and NVIDIA's container toolkit
FROM base AS cuda
# Triton compiles what starts a kernel with the system's compiler
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --constraint /constraints.txt "$(echo /wheels/s2ft-*.whl)[serve,gguf,gpu]"
USER 1000:1000
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["s2ft"]
CMD ["serve", "--host", "0.0.0.0"]
