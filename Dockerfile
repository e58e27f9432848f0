# The sidecar and its Chatterbox worker as images.
#
#   docker build --target sidecar -t osiris-llm-sidecar .
#   docker build --target sidecar --build-arg ACCELERATOR=cuda -t osiris-llm-sidecar:cuda .
#   docker build --target chatterbox -t osiris-chatterbox .
#
# To build the same image every time, give the base image with its digest:
#   --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:<digest>

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# What both images run in: who they are, where they write and where models are mounted.
FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app \
    HOME=/tmp \
    NUMBA_CACHE_DIR=/tmp/numba
# A new named volume takes the owner of the folder that it covers. The empty model folders are there
# so that a runtime can mount over them with the root file system read-only.
RUN groupadd --gid 10001 osiris \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin osiris \
    && mkdir -p /app/models/llm_micro /app/models/phi3/adapters /app/hermes-model /models/tts/chatterbox \
    && install -d -o 10001 -g 10001 -m 0750 /app/lancedb_data /app/lancedb_log
WORKDIR /app


FROM base AS sidecar-packages
# cpu or cuda.
ARG ACCELERATOR=cpu
COPY requirements.txt requirements-gguf.txt /build/
# pip is configured by the base image, if at all: PYTHON_IMAGE can be one with an /etc/pip.conf.
RUN python3.11 -m venv /opt/venv \
    && case "$ACCELERATOR" in \
        cpu) ;; \
        cuda) sed -i -e 's/^onnxruntime-genai==/onnxruntime-genai-cuda==/' -e '/^onnxruntime==/d' \
            /build/requirements.txt ;; \
        *) echo "ACCELERATOR=$ACCELERATOR: it takes cpu or cuda" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir -r /build/requirements.txt -r /build/requirements-gguf.txt


FROM base AS sidecar
COPY --from=sidecar-packages /opt/venv /opt/venv
# onnxruntime looks for CUDA where the system has its libraries; torch brought them as packages.
RUN find /opt/venv -path '*/nvidia/*' -name '*.so*' -printf '%h\n' | sort -u > /etc/ld.so.conf.d/cuda.conf \
    && ldconfig
COPY pyproject.toml requirements.txt README.md ./
COPY llm_sidecar llm_sidecar
COPY osiris osiris
# Compiled now, as nothing can be written here later.
RUN python -m compileall -q llm_sidecar osiris
ENV PRELOAD_MODELS=true
USER 10001:10001
EXPOSE 8000
VOLUME ["/app/lancedb_data", "/app/lancedb_log"]
STOPSIGNAL SIGTERM
# Liveness, not readiness: a container that still loads a model, or whose Redis is away, is not sick.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
CMD ["python", "-m", "osiris", "--host", "0.0.0.0", "--port", "8000"]


FROM base AS chatterbox-packages
COPY requirements-chatterbox.txt /build/
RUN python3.11 -m venv /opt/venv \
    && pip install --no-cache-dir -r /build/requirements-chatterbox.txt


# The speech worker serves no port: it takes texts from the bus and gives WAVs to it.
FROM base AS chatterbox
COPY --from=chatterbox-packages /opt/venv /opt/venv
COPY llm_sidecar llm_sidecar
RUN python -m compileall -q llm_sidecar
USER 10001:10001
STOPSIGNAL SIGTERM
CMD ["python", "-m", "llm_sidecar.tts", "--voice", "chatterbox"]


# What a build without --target gives.
FROM sidecar
