# One image for CPUs and CUDA 13 GPUs: torch's wheels bring CUDA, the host brings the driver. See docs/install.md.
FROM python:3.11-slim-bookworm

# g++ is torch.compile's and FFCV's compiler; the other libraries are FFCV's.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ pkg-config libopencv-dev libturbojpeg0-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY recipes recipes
COPY fastssl fastssl
ARG EXTRAS=report,parquet,timm
RUN pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"

# Any user may run it: numba's kernels and the data live outside the image.
ENV NUMBA_CACHE_DIR=/tmp/numba
WORKDIR /data
ENTRYPOINT ["fastssl"]
