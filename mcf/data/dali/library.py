"""DALI's own modules, imported where a decoder is made and not before."""

from __future__ import annotations

import os

from mcf.errors import missing_package


def import_dali():
    """(fn, types, Pipeline, feed_ndarray), imported where a loader is made and not before."""
    # Without a driver the codecs report every GPU library they cannot open; a decode that fails is raised, not logged.
    os.environ.setdefault("DALI_NVIMGCODEC_LOG_LEVEL", "0")
    try:
        from nvidia.dali import Pipeline, fn, types
        from nvidia.dali.plugin.pytorch import feed_ndarray
    except ImportError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        raise missing_package("nvidia-dali", "reading shards", "nvidia-dali-cuda130") from None
    return fn, types, Pipeline, feed_ndarray
