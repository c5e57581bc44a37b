"""Samples and frames: what the convolutions of HuBERT, wav2vec 2.0 and WavLM make of 16 kHz audio, 50 a second."""

SAMPLE_RATE = 16_000
CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
RECEPTIVE_FIELD = 400
"""Samples that one frame sees."""
HOP = 320
"""Samples between two frames."""
FRAME_SECONDS = HOP / SAMPLE_RATE


def n_frames(n_samples: int) -> int:
    """Frames that the convolutions make of a clip; none for a clip shorter than the receptive field."""
    for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True):
        n_samples = (n_samples - kernel) // stride + 1
    return max(0, n_samples)
